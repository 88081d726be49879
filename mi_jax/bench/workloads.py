"""What is measured: the denoiser, its training step, the VAE and the whole sampler, at a preset's sizes.

Weights are random. They are drawn where they are used, in the dtype that they are used in: 13B parameters are 26 GB in
bf16, and never exist in f32 or in host memory.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from mi_jax.avatar.config import AvatarConfig
from mi_jax.conditions import Conditions
from mi_jax.diffusion import sample_sigma, sigma_schedule
from mi_jax.errors import InputError
from mi_jax.models import tiling
from mi_jax.models.attention import Implementation
from mi_jax.models.dit import DiT
from mi_jax.models.dit_config import DiTConfig
from mi_jax.models.flops import dit_flops, vae_decode_flops, vae_encode_flops
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.sliding_window import sliding_window
from mi_jax.sample.windows import plan_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A model's sizes, and those of the work it is for.

    height, width: pixels. latent_frames: of a training clip or a window. text_tokens, image_tokens: of the MLLM.
    """

    dit: DiTConfig
    vae: VAEConfig
    height: int
    width: int
    latent_frames: int = 33
    text_tokens: int
    image_tokens: int = 0
    steps: int
    shift: float


def presets() -> dict[str, Preset]:
    """The presets by name. One ending in `-stage1` is without audio attention, like HunyuanVideo and diffusers'."""
    puppet, large = AvatarConfig.puppet(), AvatarConfig.magic_infinite_13b()
    plain = {"vae": large.vae, "text_tokens": large.mllm.prompts.max_tokens, "steps": large.steps, "shift": large.shift}
    height, width = large.padded_size
    return {
        "puppet": _preset_of(puppet, puppet.dit),
        "puppet-stage1": _preset_of(puppet, DiTConfig.puppet(audio=False)),
        "hyvideo-s2": Preset(dit=hyvideo_s2(), height=256, width=256, latent_frames=5, **plain),
        "magic-infinite-13b": _preset_of(large, large.dit),
        "magic-infinite-13b-stage1": _preset_of(large, DiTConfig.magic_infinite_13b(audio=False)),
        "hunyuan-video": Preset(dit=DiTConfig.hunyuan_video(), height=height, width=width, **plain),
    }


def _preset_of(config: AvatarConfig, dit: DiTConfig) -> Preset:
    height, width = config.padded_size
    return Preset(
        dit=dit, vae=config.vae, height=height, width=width, steps=config.steps, shift=config.shift,
        text_tokens=config.mllm.prompts.max_tokens, image_tokens=config.mllm.num_image_tokens,
    )  # fmt: skip


def hyvideo_s2() -> DiTConfig:
    """HunyuanVideo-I2V's small config `HYVideo-S/2` (its `hyvideo/modules/models.py`): 6 double and 12 single blocks
    of width 480, 5 heads."""
    return DiTConfig(width=480, heads=5, double_depth=6, single_depth=12, rope_axes=(12, 42, 42), remat="none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Something to time.

    programs: the jitted functions it runs, each with arguments, which compiling does not use up.
    run: does it once, with the compiled programs, and waits for the result, which it returns.
    flops: by formula (`mi_jax.models.flops`). sizes: of the work, for the record.
    """

    name: str
    programs: tuple[tuple[Any, tuple], ...]
    run: Callable[..., Any]
    flops: int
    sizes: dict[str, int]


def draw_state(build: Callable[[], nnx.Module], dtype: jnp.dtype, seed: int = 0) -> tuple[Any, Any]:
    """(graph definition, parameters) of the module that `build` makes, random, in `dtype`, leaf by leaf.

    Kernels have variance 1 / fan-in, norm scales are around 1, all else is small: nothing is zero, not even what
    training starts at zero, since zeros are faster to multiply.
    """
    graph, abstract = nnx.split(nnx.eval_shape(build))
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    drawn = []
    for i, (path, leaf) in enumerate(leaves):
        names = {getattr(entry, "key", None) for entry in path}
        # The kernel of a convolution has its taps first, that of a linear map at most axes of layers.
        fan_in = math.prod(leaf.shape[:-1]) if leaf.ndim == 5 else leaf.shape[-2] if leaf.ndim > 1 else 1
        scale = fan_in**-0.5 if "kernel" in names else 0.05
        salt = np.uint32((0x9E3779B9 * (1 + seed + 1009 * i)) % 2**32)
        drawn.append(_uniform(leaf.shape, dtype, salt, np.float32(scale), np.float32("scale" in names)))
    return graph, jax.tree.unflatten(tree, drawn)


@partial(jax.jit, static_argnums=(0, 1))
def _uniform(shape: tuple[int, ...], dtype: jnp.dtype, salt: Array, scale: Array, mean: Array) -> Array:
    """Numbers of deviation `scale` around `mean`: a hash (MurmurHash3's finaliser) of each one's place.

    One loop that compiles in milliseconds and writes nothing but its result; JAX's generators take 10 s to compile for
    the leaves of a denoiser, and seconds or twice the memory to run for 13B.
    """
    place, stride = jnp.broadcast_to(salt, shape), 1
    for axis in reversed(range(len(shape))):
        place = place + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        place = (place ^ (place >> np.uint32(shift))) * np.uint32(factor)
    place = place ^ (place >> np.uint32(16))
    unit = (place >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24) - np.float32(0.5)
    return (mean + np.float32(12**0.5) * scale * unit).astype(dtype)


def random_conditions(preset: Preset, grid: tuple[int, int, int], batch: int, dtype: jnp.dtype) -> dict[str, Array]:
    """The fields of `Conditions` with all that the preset's denoiser can be told of `grid` (t, h, w) latents: all text
    valid, one speaker whose face is the middle half of the picture."""
    config, (t, h, w) = preset.dit, grid
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(dtype)

    parts = {
        "text_tokens": normal(batch, preset.text_tokens, config.text_dim),
        "text_mask": np.ones((batch, preset.text_tokens), bool),
    }
    if config.pooled_dim:
        parts["text_pooled"] = normal(batch, config.pooled_dim)
    if config.guidance_embedding:
        parts["guidance"] = np.full((batch,), 6.0, np.float32)
    if preset.image_tokens:
        parts["image_tokens"] = normal(batch, preset.image_tokens, config.text_dim)
        parts["image_mask"] = np.ones((batch, preset.image_tokens), bool)
    if config.image_to_video:
        parts |= {"portrait": normal(batch, h, w, config.latent_channels), "is_start": np.ones((batch,), np.float32)}
    if config.audio is not None:
        face = np.zeros((batch, 1, h, w), np.float32)
        face[:, :, h // 4 : h - h // 4, w // 4 : w - w // 4] = 1.0
        parts |= {"audio": normal(batch, 1, t, config.audio.tokens, config.audio.width), "face_mask": face}
    return {name: jnp.asarray(part) for name, part in parts.items()}


def _noise(preset: Preset, grid: tuple[int, int, int], batch: int) -> Float[Array, "b t h w c"]:
    shape = (batch, *grid, preset.dit.latent_channels)
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))


def latent_grid(preset: Preset, *, multiple: int = 1) -> tuple[int, int, int]:
    """(t, h, w) latents of the preset's pixels.

    Raises:
      InputError: height and width are no multiples of what a latent (times `multiple`) is of pixels, or nothing.
    """
    side = preset.vae.spatial_stride * multiple
    if preset.latent_frames < 1:
        raise InputError(f"{preset.latent_frames} latent frames: at least 1 is needed")
    for name, pixels in (("height", preset.height), ("width", preset.width)):
        if pixels < side or pixels % side:
            raise InputError(f"{name} is {pixels} pixels, must be a multiple of {side}")
    return preset.latent_frames, preset.height // preset.vae.spatial_stride, preset.width // preset.vae.spatial_stride


def token_grid(preset: Preset) -> tuple[int, int, int]:
    """(t, h, w) latents that the preset's denoiser can cut into patches; raises as `latent_grid`."""
    patch = preset.dit.patch
    return latent_grid(preset, multiple=math.lcm(*patch[1:]))


def _sizes(preset: Preset, grid: tuple[int, int, int], batch: int) -> dict[str, int]:
    t, h, w = grid
    return {
        "batch": batch,
        "height": preset.height,
        "width": preset.width,
        "frames": preset.vae.temporal_stride * (t - 1) + 1,
        "latent_frames": t,
        "latent_height": h,
        "latent_width": w,
    }


def _token_sizes(preset: Preset, grid: tuple[int, int, int], batch: int) -> dict[str, int]:
    text = preset.text_tokens + preset.image_tokens
    return _sizes(preset, grid, batch) | {
        "video_tokens": math.prod(grid) // math.prod(preset.dit.patch),
        "text_tokens": text,
    }


def _told_flops(preset: Preset, grid: tuple[int, int, int], batch: int) -> int:
    one = dit_flops(preset.dit, *grid, text_tokens=preset.text_tokens + preset.image_tokens)
    return round((one * batch).forward)


def _build(preset: Preset) -> Callable[[], DiT]:
    return lambda: DiT(preset.dit, rngs=nnx.Rngs(0))


def with_attention(preset: Preset, implementation: Implementation) -> Preset:
    return dataclasses.replace(preset, dit=dataclasses.replace(preset.dit, attention=implementation))


def forward_work(preset: Preset, *, batch: int, dtype: jnp.dtype, weights: Any = None) -> Work:
    """One velocity. `weights`: parameters drawn for this denoiser before (`draw_state`), at whatever size of video."""
    grid = token_grid(preset)
    if weights is None:
        graph, weights = draw_state(_build(preset), dtype)
    else:
        graph = nnx.split(nnx.eval_shape(_build(preset)))[0]
    x = _noise(preset, grid, batch)
    sigma = jnp.full((batch,), 0.7, jnp.float32)
    conditions = random_conditions(preset, grid, batch, dtype)

    @jax.jit
    def forward(weights, x, sigma, conditions):
        return nnx.merge(graph, weights)(x, sigma, Conditions(**conditions))

    arguments = (weights, x, sigma, conditions)
    return Work(
        name="forward",
        programs=((forward, arguments),),
        run=lambda program: jax.block_until_ready(program(*arguments)),
        flops=_told_flops(preset, grid, batch),
        sizes=_token_sizes(preset, grid, batch),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """The plain objective, `L_base` at the noise levels of training, on a batch of latents and the fields of
    `Conditions`."""

    dit: DiTConfig
    shift: float

    def init(self, key: Key[Array, ""]) -> DiT:
        return DiT(self.dit, rngs=nnx.Rngs(key))

    def dataset(self, seed: int):
        raise NotImplementedError("a bench trains on one random batch")

    def loss(
        self,
        model: DiT,
        batch: dict[str, Any],
        key: Key[Array, ""],
        turn: str = "model",
        step: Array | int = 0,
    ) -> tuple[Float[Array, "b"], dict[str, Array]]:
        from mi_jax.train.flow import base_loss, squared_error

        conditions = {name: leaf for name, leaf in batch.items() if name != "latents"}
        clean, keys = batch["latents"], jax.random.split(key)
        sigma = sample_sigma(keys[0], (clean.shape[0],), self.shift)
        noise = jax.random.normal(keys[1], clean.shape, jnp.float32)
        return base_loss(squared_error(model, clean, noise, sigma, Conditions(**conditions))), {}


def step_work(preset: Preset, *, batch: int, dtype: jnp.dtype) -> Work:
    """One optimiser step of the trainer (`mi_jax.train.state`): f32 masters, the loss in `dtype`, clipping, AdamW and
    EMA; the state is donated."""
    from mi_jax.train.objective import TrainConfig
    from mi_jax.train.state import init_state, make_step
    from mi_jax.train.turns import OptimizerConfig, Turn

    grid = token_grid(preset)
    config = TrainConfig(
        name="bench",
        objective=FlowMatching(dit=preset.dit, shift=preset.shift),
        steps=1_000_000,
        optimizer=OptimizerConfig(learning_rate=1e-5),
        compute_dtype=jnp.dtype(dtype).name,
    )
    graph, params = draw_state(_build(preset), jnp.dtype(jnp.float32))
    rest = nnx.State({})
    state = [init_state(config, {Turn().name: params}, jax.random.key(3))]
    data = {"latents": _noise(preset, grid, batch), **random_conditions(preset, grid, batch, jnp.dtype(jnp.float32))}
    del params

    def run(program):
        state[0], metrics = jax.block_until_ready(program(state[0], rest, data))
        return metrics["loss"]

    return Work(
        name="step",
        programs=((make_step(config, graph), (state[0], rest, data)),),
        run=run,
        flops=3 * _told_flops(preset, grid, batch),
        sizes=_token_sizes(preset, grid, batch),
    )


def vae_works(preset: Preset, *, batch: int, dtype: jnp.dtype) -> list[Work]:
    """Encoding and decoding as the avatar does it: tile by tile, from host memory to host memory."""
    grid = latent_grid(preset)
    config = preset.vae
    frames = config.temporal_stride * (grid[0] - 1) + 1
    graph, weights = draw_state(lambda: VAE(config, rngs=nnx.Rngs(0)), dtype)
    vae = nnx.merge(graph, weights)
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (batch, frames, preset.height, preset.width, 3)).astype(dtype)
    latents = rng.normal(size=(batch, *grid, config.latent_channels)).astype(dtype)
    sizes = _sizes(preset, grid, batch)
    encoded, decoded = tiling.tile_shapes(config, video.shape[1:4]), tiling.latent_tile_shapes(config, grid)

    def program(method, tiles, x):
        """The largest tile's."""
        tile = jax.ShapeDtypeStruct((batch, *max(tiles, key=math.prod), x.shape[-1]), x.dtype)
        return jax.jit(lambda weights, x: method(nnx.merge(graph, weights), x)), (weights, tile)

    return [
        Work(
            name="encode",
            programs=(program(VAE.encode, encoded, video),),
            run=lambda _: tiling.encode_tiled(vae, video),
            flops=sum(vae_encode_flops(config, tile, batch=batch) for tile in encoded),
            sizes=sizes | {"tiles": len(encoded)},
        ),
        Work(
            name="decode",
            programs=(program(VAE.decode, decoded, latents),),
            run=lambda _: tiling.decode_tiled(vae, latents),
            flops=sum(vae_decode_flops(config, tile, batch=batch) for tile in decoded),
            sizes=sizes | {"tiles": len(decoded)},
        ),
    ]


def sampler_work(preset: Preset, *, batch: int, dtype: jnp.dtype, window: int, overlap: int, group: int) -> Work:
    """Latents of a whole video from noise: every step, every window, and the branches of guidance by voice and text
    (all, no voice, none; without audio attention: all and none)."""
    grid, steps = token_grid(preset), preset.steps
    windows = len(plan_windows(grid[0], window, overlap))
    graph, weights = draw_state(_build(preset), dtype)
    weighted = {"audio": 4.0, "text": 4.0} if preset.dit.audio else {"audio": 4.0, "two_fold_above": -1.0}
    branches = 3 if preset.dit.audio else 2
    noise = _noise(preset, grid, batch)
    sigmas, conditions = sigma_schedule(steps, preset.shift), random_conditions(preset, grid, batch, dtype)

    @jax.jit
    def sample(weights, noise, sigmas, conditions):
        velocity = Guidance(**weighted)(nnx.merge(graph, weights))
        return sliding_window(
            velocity, noise, sigmas, Conditions(**conditions), window=window, overlap=overlap, group=group
        )

    arguments = (weights, noise, sigmas, conditions)
    one = _told_flops(preset, (min(window, grid[0]), *grid[1:]), batch)
    evaluations = steps * branches * windows  # those that fill up the last group are no work done
    return Work(
        name="sampler",
        programs=((sample, arguments),),
        run=lambda program: jax.block_until_ready(program(*arguments)),
        flops=evaluations * one,
        sizes=_token_sizes(preset, grid, batch) | {"steps": steps, "windows": windows, "branches": branches},
    )
