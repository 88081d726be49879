"""`mi-jax bench`, of the machine that is here, and `plan`, of those that are not."""

import contextlib
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.commands.terminal import parse_size, parsing
from mi_jax.errors import InputError


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
    if out is not None:
        run.open_folder(out)
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
        with parsing(f"mi-jax plan {config}"):
            experiment = load_config(config, overrides)
    elif overrides:
        raise InputError(
            f"{' '.join(overrides)}: no such option, and {config} is no experiment whose fields it could set"
        )
    own = experiment.seq if experiment is not None and sample is None else 1
    where = {"topology": topology, "data": data, "seq": own if seq is None else seq}
    if sample is None and experiment is not None:
        made = plan_training(experiment, **where, size=None if size is None else parse_size("--size", size))
    else:
        model = sampled_model(config if experiment is None else experiment.objective)
        height, width = (None, None) if sample is None else parse_size("--sample", sample)
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
