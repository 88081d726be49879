"""`mi-jax bench`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.bounds import Batch, LatentFrames, Pixels, SamplingSteps, Within


def bench(
    what: tyro.conf.Positional[
        Annotated[Literal["dit", "step", "vae", "sampler"], tyro.conf.arg(metavar="dit|step|vae|sampler")]
    ],
    preset: str = "puppet",
    height: Pixels | None = None,
    width: Pixels | None = None,
    latent_frames: LatentFrames | None = None,
    batch: Batch = 1,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attention: Literal["auto", "xla", "cudnn", "tokamax"] = "auto",
    repeats: Annotated[int, Within(1, 10**6)] = 5,
    against: Literal["diffusers"] | None = None,
    compile: bool = False,
    steps: SamplingSteps | None = None,
    window: LatentFrames = 33,
    overlap: LatentFrames = 8,
    group: Annotated[int, Within(1, 10_000)] = 1,
    json: bool = False,
    out: Path | None = None,
) -> None:
    """How fast a model runs here, and what share of the hardware it uses.

    dit is the denoiser's velocity, step a training step, vae encoding and decoding, sampler the whole denoising loop.
    Weights are random. All programs, however small, are kept in JAX's compilation cache (`mi-jax env` says where), so
    that compiling is cold only once.

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
