"""`mi-jax plan`."""

import contextlib
import re
from typing import Annotated

import tyro

from mi_jax.bounds import Devices, Guidance, LatentFrames, Seconds, Within
from mi_jax.commands.terminal import parse_size, parsing
from mi_jax.errors import InputError


def plan(
    config: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="CONFIG.py|MODEL")]],
    topology: str,
    overrides: tyro.conf.Suppress[tuple[str, ...]] = (),
    data: Devices | None = None,
    seq: Devices | None = None,
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None,
    turn: str | None = None,
    sample: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None,
    latent_frames: Annotated[int, Within(1, 10**6)] | None = None,
    seconds: Seconds | None = None,
    window: LatentFrames = 33,
    overlap: LatentFrames = 8,
    speakers: Annotated[int, Within(1, 64)] = 1,
    guidance_audio: Guidance | None = None,
    guidance_text: Guidance | None = None,
    json: bool = False,
) -> None:
    """Whether training or sampling fits a machine, and how fast it can be there, before the machine is.

    Compiles the real program for the topology and prints memory, FLOPs, what moves between devices, and the least time
    that leaves. Exit code 2 if it does not fit. Further options override a training config's fields, as in
    `mi-jax train`.

    Args:
      config: an experiment's file, a model folder, or a preset (puppet, magic-infinite-13b).
      topology: h100:8, h200:25x8 (hosts x GPUs), v5p-256, v6e-8, v7x-8, v5p:2x2x2 (chips along each axis), cpu:8.
      data: devices that share out clips, or windows and guidance branches; by default all that --seq leaves.
      seq: devices that share out the tokens of one video; by default the training config's; where neither this nor
        --data is given, sampling is spread as `mi-jax animate` does.
      size: pictures to plan training for, where the records are not there yet.
      turn: whose training step, where several parts are trained in turn; by default the first one's.
      sample: plan sampling videos of this size, instead of training.
      latent_frames: length of the sampled video, in latent frames (of 4 video frames); by default one window.
      seconds: the same in seconds of video.
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
    from mi_jax.sample.inputs import num_frames
    from mi_jax.train.objective import load_config

    experiment = None
    if config.endswith(".py"):
        with parsing(f"mi-jax plan {config}"):
            experiment = load_config(config, overrides)
    elif overrides:
        raise InputError(
            f"{' '.join(overrides)}: no such option, and {config} is no experiment whose fields it could set"
        )
    where = {"topology": topology, "data": data, "seq": seq}
    if sample is None and experiment is not None:
        where["seq"] = experiment.seq if seq is None else seq
        size = None if size is None else parse_size("--size", size)
        made = plan_training(experiment, **where, size=size, turn=turn)
    else:
        model = sampled_model(config if experiment is None else experiment.objective)
        height, width = (None, None) if sample is None else parse_size("--sample", sample)
        guidance = {"guidance_audio": guidance_audio, "guidance_text": guidance_text}
        model = model.replace(height=height, width=width, **guidance)
        if seconds is not None:
            if latent_frames is not None:
                raise InputError("--seconds and --latent-frames: one of them says how long the video is")
            latent_frames = -(-(num_frames(seconds) - 1) // model.vae.temporal_stride) + 1
        latent_frames = window if latent_frames is None else latent_frames
        lengths = {"latent_frames": latent_frames, "window": window, "overlap": overlap, "speakers": speakers}
        made = plan_sampling(model, **where, **lengths)
    if json:
        import json as as_text

        print(as_text.dumps(made.as_json(), indent=2))
    else:
        print(made.table())
    if not made.memory.fits:
        raise SystemExit(2)
