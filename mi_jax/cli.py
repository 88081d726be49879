"""`mi-jax`: the commands, each a thin call into the library.

Exit codes: 0 done; 2 bad arguments or input, with one line on standard error that names the file and the fault; 1
the rest.
Imports are inside the commands: `mi-jax --help` answers at once.
"""

import contextlib
import functools
import inspect
import io
import logging
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from mi_jax.errors import InputError

Path = pathlib.Path


def animate(
    out: Annotated[Path, tyro.conf.arg(metavar="VIDEO.mp4")],
    portrait: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[PORTRAIT]")]] = None,
    audio: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[AUDIO ...]")]] = (),
    prompt: str = "",
    model: Annotated[str, tyro.conf.arg(metavar="puppet|DIR")] = "puppet",
    mask: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PNG [PNG ...]")] = (),
    steps: int | None = None,
    window: int = 33,
    overlap: int = 8,
    seed: int = 0,
    guidance_audio: float | None = None,
    guidance_text: float | None = None,
    seconds: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """A portrait, a voice and a sentence become a talking video.

    Without AUDIO the video is silent; without PORTRAIT it is made of the sentence alone, if the model can do that.

    Args:
      out: the video to write.
      portrait: a picture: png, jpg, webp, ...
      audio: one sound file per speaker, from left to right: wav, mp3, flac, m4a, mp4, ...
      prompt: a sentence of direction: expression, movement, background.
      model: a shipped model or a model folder.
      mask: one picture per voice, white where its face is; by default the face is looked for.
      steps: denoising steps; by default the model's.
      window: latent frames (of 4 video frames) that the denoiser sees at a time.
      overlap: latent frames that neighbouring windows share.
      seed: of the noise: the same seed makes the same video.
      guidance_audio: how strongly the voice is followed; by default the model's.
      guidance_text: how strongly the prompt is followed; by default the model's.
      seconds: length of the video; by default that of the longest voice.
      height: of the video in pixels; by default the model's.
      width: of the video in pixels; by default the model's.
    """
    from mi_jax.data import media
    from mi_jax.sample import avatar
    from mi_jax.sample.folders import avatar_config
    from mi_jax.sample.windows import plan_windows

    # Whatever can be wrong is found before a model is loaded: a mistake costs a second, not a minute.
    media.check_video_path(out)
    options = {
        "steps": steps,
        "guidance_audio": guidance_audio,
        "guidance_text": guidance_text,
        "height": height,
        "width": width,
    }
    config = avatar_config(model).replace(**options)
    avatar.check_request(config, portrait=portrait is not None, voices=len(audio), seconds=seconds, seed=seed)
    if mask and len(mask) != len(audio):
        raise InputError(f"{len(mask)} masks for {len(audio)} voices: give one --mask picture per voice, or none")
    plan_windows(1, window, overlap)
    pixels = None if portrait is None else media.read_image(portrait)
    voices = [media.read_audio(path) for path in audio]
    for path in mask:
        media.read_mask(path)
    loaded = avatar.load(model)
    with _ProgressBar("denoising", "step") as bar:
        video = loaded.animate(
            pixels,
            [avatar.Speaker(voice, path) for voice, path in zip(voices, mask or [None] * len(voices))],
            prompt,
            seed=seed,
            window=window,
            overlap=overlap,
            seconds=seconds,
            progress=bar,
            **options,
        )
    avatar.save_video(out, video, list(audio) or None)
    frames, height, width, _ = video.shape
    print(f"{out}: {frames / avatar.FPS:.2f} s, {frames} frames of {width}x{height}")


def puppets(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    count: int = 1,
    seed: int = 0,
    seconds: float = 5.16,
    split: Literal["train", "test"] = "train",
    size: int = 96,
    duets: bool = False,
) -> None:
    """Draws talking puppets with the truth beside them.

    Each has a folder of its own: portrait.png, mask.png, speech.wav, prompt.txt, video.mp4, mouth.csv, attributes.json.
    A duet has mask_1.png and mask_2.png, and so on, from left to right.

    Args:
      out: the folder to write to.
      count: how many.
      seed: another seed draws other puppets; the same seed the same ones on every machine.
      seconds: length of each; the frames are the nearest number of the form 4k + 1.
      split: faces, voices and sentences to train on, or those held out.
      size: side of the picture in pixels.
      duets: two puppets in each picture.
    """
    if not 16 <= size <= 1024:
        raise InputError(f"--size is {size}, must lie in 16 .. 1024")
    try:
        from mi_jax.data.puppets import write_puppets

        folders = write_puppets(out, count, seed, seconds, split=split, size=size, duets=duets)
    except ModuleNotFoundError as missing:
        raise InputError(f"puppets need {missing.name}: pip install 'mi-jax[puppets]'") from missing
    print(f"{out}: {len(folders)} clip{'s' * (len(folders) > 1)}")


def prepare(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    puppets: Annotated[int, tyro.conf.arg(metavar="COUNT")],
    duets: int = 0,
    model: Annotated[str, tyro.conf.arg(metavar="puppet|DIR")] = "puppet",
    first: int = 0,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    seconds: float = 5.16,
    workers: int = 0,
) -> None:
    """Computes the features of clips once, as records to train on.

    Args:
      out: the folder to write; it must not exist yet.
      puppets: how many puppet clips to draw.
      duets: how many clips of two puppets to add, each with its own voice.
      model: whose encoders: a shipped model or a model folder (a denoiser is not needed).
      first: number of the first clip, and of the first duet.
      seed: of the puppets.
      split: faces, voices and sentences to train on, or those held out.
      seconds: length of each clip.
      workers: processes that draw ahead; 0 takes one per core.
    """
    if puppets < 1:
        raise InputError(f"--puppets is {puppets}, at least 1 is needed")
    if duets < 0:
        raise InputError(f"--duets is {duets}, must not be negative")
    import os

    from mi_jax.data.prepare import prepare_puppets
    from mi_jax.sample.folders import load_encoders

    config, encoders = load_encoders(model)
    if encoders.wav2vec2 is None or encoders.mllm.vision is None:
        raise InputError(f"{model}: records need a model that hears voices and sees portraits")
    prepare_puppets(
        encoders,
        out,
        puppets,
        duets=duets,
        first=first,
        seed=seed,
        split=split,
        seconds=seconds,
        size=config.height,
        workers=workers or os.cpu_count() or 1,
    )


def convert(
    family: tyro.conf.Positional[
        Annotated[
            Literal[
                "puppet",
                "hunyuan-video",
                "hunyuan-video-i2v",
                "magic-141",
                "hunyuan-vae",
                "llava-llama-3",
                "clip-text",
                "wav2vec2",
            ],
            tyro.conf.arg(metavar="FAMILY"),
        ]
    ],
    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]],
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    extend: Literal["magic-infinite", "magic-infinite-stage1"] | None = None,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    clip: Path | None = None,
    wav2vec2: Path | None = None,
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source",
    seed: int = 0,
    base: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a model folder that `animate` reads from weights of another form.

    docs/weights.md says which public files become what.

    Args:
      family: whose weights: puppet (the runs of configs/puppet_*.py), a denoiser with the encoders beside it
        (hunyuan-video, hunyuan-video-i2v, magic-141), or one part (hunyuan-vae, llava-llama-3, clip-text, wav2vec2).
      source: a folder as its repository has it, or the file of the weights.
      out: the model folder to write.
      extend: makes a denoiser the start of MagicInfinite's training: with portrait and audio inputs that change
        nothing yet, or, for stage 1, without audio.
      vae: where HunyuanVideo's VAE is, if not in SOURCE.
      text_encoder: where the LLaVA (or Llama) is, if not in SOURCE.
      clip: where CLIP's text tower is, if not in SOURCE.
      wav2vec2: where wav2vec2 is, if not in SOURCE.
      dtype: of the weights written; by default that of the source.
      seed: of the weights that --extend adds.
      base: for puppet: a model folder whose encoders stand in for runs that are not there.
      overwrite: replace what is there.
    """
    given = {"vae": vae, "text_encoder": text_encoder, "clip_text": clip, "audio_encoder": wav2vec2}
    if family == "puppet":
        from mi_jax.train.export import export_puppet

        if extend or dtype != "source" or any(given.values()):
            raise InputError("convert puppet takes --base and --overwrite alone")
        export_puppet(source, out, base=base, overwrite=overwrite)
        print(f"{out}: written")
        return
    if base is not None:
        raise InputError(f"--base is for puppet, not for {family}")
    import jax.numpy as jnp

    from mi_jax.sample.convert import convert as run

    with _ProgressBar("converting", "B", unit_scale=True) as bar:
        made = run(
            family,
            source,
            out,
            extend=extend,
            **given,
            dtype=None if dtype == "source" else jnp.dtype(dtype),
            seed=seed,
            overwrite=overwrite,
            progress=bar,
        )
    if made.unused:
        print(f"not used, {len(made.unused)}: {', '.join(made.unused)}")
    print(
        f"{out}: {', '.join(made.parts)}"
        + (f"; no whole avatar without {', '.join(made.missing)}" * bool(made.missing))
    )


def train(argv: Sequence[str]) -> None:
    """Trains the experiment of a config file; a run that was stopped goes on where it was.

    mi-jax train CONFIG.py [--out DIR] [--distributed auto|HOST:PORT,COUNT,INDEX] [--steps 1000 --objective.shift 5 ...]

    --out DIR is where checkpoints, logs and samples go (default runs/NAME), for all processes of a run the same folder.
    --distributed joins the processes of a run on several hosts, each started with the same command: `auto` where JAX
    knows the cluster (TPU pods, Slurm, Open MPI, Kubernetes), else process 0's address, the number of processes and
    which of them this one is. Every other option overrides a field of the config: `mi-jax train CONFIG.py --help` lists
    them.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(train.__doc__)
        return
    config_path, *overrides = argv
    out, cluster = _taken(overrides, "--out"), _taken(overrides, "--distributed")
    if cluster is not None:
        _join(cluster)
    from mi_jax.train.objective import load_config

    with _parsing(f"mi-jax train {config_path}"):
        config = load_config(config_path, overrides)
    from mi_jax.train.loop import train as run

    run(config, Path(out) if out else Path("runs") / config.name)


def _taken(arguments: list[str], name: str) -> str | None:
    """The value of an option, which is taken out of `arguments`; None where it is not there."""
    for i, word in enumerate(arguments):
        if word == name or word.startswith(f"{name}="):
            value = arguments[i + 1 : i + 2] if word == name else [word.removeprefix(f"{name}=")]
            if not value or not value[0]:
                raise InputError(f"{name} needs a value")
            del arguments[i : i + (2 if word == name else 1)]
            return value[0]
    return None


def _join(cluster: str) -> None:
    """Makes this process one of a run's (`jax.distributed`), as `--distributed` says."""
    import jax

    try:
        address, count, index = cluster.split(",") if cluster != "auto" else (None, "1", "0")
        told = {} if address is None else {
            "coordinator_address": address, "num_processes": int(count), "process_id": int(index)
        }  # fmt: skip
        if not 0 <= int(index) < int(count):
            raise ValueError
    except ValueError:
        raise InputError(f"--distributed is {cluster}: auto or HOST:PORT,COUNT,INDEX with INDEX < COUNT") from None
    try:
        jax.distributed.initialize(**told)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--distributed {cluster}: {str(error).splitlines()[0]}") from None


def bench(
    what: tyro.conf.Positional[
        Annotated[Literal["dit", "step", "vae", "sampler"], tyro.conf.arg(metavar="dit|step|vae|sampler")]
    ],
    preset: str = "puppet",
    height: int | None = None,
    width: int | None = None,
    latent_frames: int | None = None,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    repeats: int = 5,
    against: Literal["diffusers"] | None = None,
    compile: bool = False,
    steps: int | None = None,
    window: int = 33,
    overlap: int = 8,
    group: int = 1,
    json: bool = False,
    out: Path | None = None,
) -> None:
    """How fast a model runs here, and what share of the hardware it uses.

    dit is the denoiser's velocity, step a training step, vae encoding and decoding, sampler the whole denoising loop.
    Weights are random. Programs are kept in JAX's compilation cache (JAX_COMPILATION_CACHE_DIR, by default
    ~/.cache/mi_jax/programs), so that compiling is cold only once.

    Args:
      what: is measured.
      preset: puppet, hyvideo-s2, magic-infinite-13b, hunyuan-video, or one of the models without audio attention,
        puppet-stage1 and magic-infinite-13b-stage1.
      height: of the video in pixels; by default the preset's.
      width: of the video in pixels; by default the preset's.
      latent_frames: of the video, 4 video frames each; by default the preset's.
      batch: videos at a time.
      dtype: computed in; by default float32 on a CPU, else bfloat16.
      attention: the kernel.
      repeats: runs that are timed.
      against: the same work in PyTorch, alternating with ours: dit and step, for presets without audio attention.
      compile: torch.compile for PyTorch.
      steps: of the sampler; by default the preset's.
      window: latent frames that the sampler's denoiser sees at a time.
      overlap: latent frames that the sampler's windows share.
      group: windows on the network at a time.
      json: print one JSON object instead of lines.
      out: a folder to write that object to, in a file named by date and device.
    """
    import os

    if against:
        # Two processes share one accelerator: neither may take all of its memory in advance.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from mi_jax.bench import run

    options = run.Options(
        what=what,
        preset=preset,
        height=height,
        width=width,
        latent_frames=latent_frames,
        batch=batch,
        dtype=dtype,
        attention=attention,
        repeats=repeats,
        against=against,
        compiled_rival=compile,
        steps=steps,
        window=window,
        overlap=overlap,
        group=group,
    )
    record = run.bench(options, (lambda line: None) if json else print)
    if json:
        import json as encoder

        print(encoder.dumps(record))
    if out is not None:
        path = run.write(record, out)
        if not json:
            print(f"{path}: written")


def plan(
    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG.py|MODEL")]],
    topology: str,
    overrides: tyro.conf.Suppress[tuple[str, ...]] = (),
    data: int | None = None,
    seq: int | None = None,
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None,
    sample: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None,
    latent_frames: int = 33,
    window: int = 33,
    overlap: int = 8,
    speakers: int = 1,
    guidance_audio: float | None = None,
    guidance_text: float | None = None,
    json: bool = False,
) -> None:
    """Whether training or sampling fits a machine, and how fast it can be there, before the machine is.

    Compiles the real program for the topology and prints memory, FLOPs, what moves between devices, and the least time
    that leaves. Exit code 2 if it does not fit. Further options override a training config's fields, as in
    `mi-jax train`.

    Args:
      config: an experiment's file, a model folder, or a preset (puppet, magic-infinite-13b).
      topology: h100:8, h200:25x8 (hosts x GPUs), v5p-256, v6e-8, v7x-8, v5p:2x2x2 (chips along each axis), cpu:8.
      data: devices that share out clips or windows; by default all that --seq leaves.
      seq: devices that share out the tokens of one video; by default the training config's, 1 for sampling.
      size: pictures to plan training for, where the records are not there yet.
      sample: plan sampling videos of this size, instead of training.
      latent_frames: length of the sampled video, in latent frames (of 4 video frames).
      window: latent frames that the denoiser sees at a time.
      overlap: latent frames that neighbouring windows share.
      speakers: voices in the sampled video.
      guidance_audio: by default the model's; 0 costs no branch.
      guidance_text: by default the model's; 0 costs no branch.
      json: print the plan as JSON.
    """
    import os

    # libtpu else looks for the machine that it is on, and complains at length.
    for name, value in {"ACCELERATOR_TYPE": "v5p-8", "WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}.items():
        os.environ.setdefault(f"TPU_{name}", value)
    import jax

    with contextlib.suppress(RuntimeError):  # too late in a process that has computed already
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: a machine's own devices are left alone
        if re.fullmatch(r"cpu:[1-9]\d*", topology):
            jax.config.update("jax_num_cpu_devices", int(topology.removeprefix("cpu:")))
    from mi_jax.plan import plan_sampling, plan_training, sampled_model
    from mi_jax.train.objective import load_config

    experiment = None
    if config.endswith(".py"):
        with _parsing(f"mi-jax plan {config}"):
            experiment = load_config(config, overrides)
    elif overrides:
        raise InputError(
            f"{' '.join(overrides)}: no such option, and {config} is no experiment whose fields it could set"
        )
    own = experiment.seq if experiment is not None and sample is None else 1
    where = {"topology": topology, "data": data, "seq": own if seq is None else seq}
    if sample is None and experiment is not None:
        made = plan_training(experiment, **where, size=None if size is None else _size("--size", size))
    else:
        model = sampled_model(config if experiment is None else experiment.objective)
        height, width = (None, None) if sample is None else _size("--sample", sample)
        guidance = {"guidance_audio": guidance_audio, "guidance_text": guidance_text}
        model = model.replace(height=height, width=width, **guidance)
        lengths = {"latent_frames": latent_frames, "window": window, "overlap": overlap, "speakers": speakers}
        made = plan_sampling(model, **where, **lengths)
    if json:
        import json as as_text

        print(as_text.dumps(made.as_json(), indent=2))
    else:
        print(made.table())
    if not made.memory.fits:
        raise SystemExit(2)


def _size(option: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"{option} is {text!r}, must be HEIGHTxWIDTH in pixels")
    return int(match[1]), int(match[2])


def _tyro(command: Callable[..., None]) -> Callable[[Sequence[str]], None]:
    """The command with its arguments parsed by their annotations; those that are not its own are its `overrides`, if it
    takes any."""

    @functools.wraps(command)
    def bound(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    def run(argv: Sequence[str]) -> None:
        prog = f"mi-jax {command.__name__}"
        with _parsing(prog):
            if takes_overrides:
                call, rest = tyro.cli(bound, args=list(argv), prog=prog, return_unknown_args=True)
                call.keywords["overrides"] = tuple(rest)
            else:
                call = tyro.cli(bound, args=list(argv), prog=prog)
        call()

    takes_overrides = "overrides" in inspect.signature(command).parameters
    return run


@contextlib.contextmanager
def _parsing(prog: str) -> Iterator[None]:
    """Turns tyro's box about bad arguments into the one line that every bad input gets."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        box = said.getvalue().split("For full helptext")[0]
        # The frame is drawn in Unicode or, where that cannot be shown, in ASCII.
        lines = [re.sub(r"^- |-{3,}", "", line.strip("│╭╮╰╯─|+ ")).strip() for line in box.splitlines()]
        raise InputError(f"{' '.join(line for line in lines if line)} ({prog} --help tells more)") from None
    sys.stderr.write(said.getvalue())


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    command.__name__: (run, command.__doc__.splitlines()[0])
    for command, run in (
        (animate, _tyro(animate)),
        (puppets, _tyro(puppets)),
        (prepare, _tyro(prepare)),
        (convert, _tyro(convert)),
        (bench, _tyro(bench)),
        (train, train),
        (plan, _tyro(plan)),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Faults that are not the input's are raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            _show_log()
            COMMANDS[argv[0]][0](argv[1:])
            return 0
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] == "--version":
            from importlib.metadata import version

            print(version("mi-jax"))
            return 0
        raise InputError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    except InputError as fault:
        print(f"mi-jax: error: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro: 0 after --help, 2 after bad arguments
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print("mi-jax: interrupted", file=sys.stderr)
        return 1


def entry() -> None:
    """The console script."""
    sys.exit(main())


def _usage() -> str:
    lines = [f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: mi-jax COMMAND ...", "", *lines, "", "mi-jax COMMAND --help tells more."])


def _show_log() -> None:
    """What the library has to say (which mask, what was cut) goes to standard error, one line each."""
    log = logging.getLogger("mi_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].setFormatter(logging.Formatter("mi-jax: %(message)s"))


class _ProgressBar:
    """A bar that appears with the first call `bar(done, total)`, after all that is said before."""

    def __init__(self, what: str, unit: str, **options: Any):
        self.options = {"desc": what, "unit": unit, "leave": False, **options}
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, **self.options)
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
