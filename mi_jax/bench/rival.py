"""The same work in PyTorch (diffusers), in a child process: the two share the machine, but no memory pool."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from mi_jax.bench.workloads import Preset, token_grid
from mi_jax.errors import InputError


def check(what: str, preset: Preset) -> None:
    """Whether diffusers can do this work.

    Raises:
      InputError: torch or diffusers is not installed, or the work or the model is one that diffusers lacks.
    """
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--against diffusers needs {' and '.join(missing)}: pip install 'mi-jax[test]'")
    if what not in ("dit", "step"):
        raise InputError(f"--against diffusers runs dit and step, not {what}")
    if preset.dit.audio is not None:
        raise InputError("diffusers has no audio attention: take a preset without, such as magic-infinite-13b-stage1")


def spec(
    what: str, preset: Preset, *, batch: int, dtype: jnp.dtype, compile: bool, threads: int | None = None
) -> dict[str, Any]:
    """What the child process is to do. Image tokens are text tokens there: the cost is the same."""
    config = preset.dit
    return {
        "what": what,
        "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        "dtype": jnp.dtype(dtype).name,
        "threads": threads or cores(),
        "compile": compile,
        "remat": config.remat != "none",
        "batch": batch,
        "grid": token_grid(preset),
        "text_tokens": preset.text_tokens + preset.image_tokens,
        "model": {
            "in_channels": config.in_channels,
            "out_channels": config.latent_channels,
            "num_attention_heads": config.heads,
            "attention_head_dim": config.head_dim,
            "num_layers": config.double_depth,
            "num_single_layers": config.single_depth,
            "num_refiner_layers": config.refiner_depth,
            "mlp_ratio": float(config.mlp_ratio),
            "patch_size": config.patch[1],
            "patch_size_t": config.patch[0],
            "guidance_embeds": config.guidance_embedding,
            "text_embed_dim": config.text_dim,
            "pooled_projection_dim": config.pooled_dim,
            "rope_theta": config.rope_theta,
            "rope_axes_dim": config.rope_axes,
            "image_condition_type": "token_replace" if config.token_replace else None,
        },
    }


def cores() -> int:
    """Cores this process may run on: what XLA takes, and what PyTorch is given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Rival:
    """A started child process, warmed up. `run()` keeps the seconds of one run in `seconds` and the processor's in
    `processor_seconds`; `about` says on what. Use it in a `with`."""

    def __init__(self, task: dict[str, Any]):
        # Not a pipe: one that nobody reads would stop a talkative child.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mi_jax.bench.pytorch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # OpenMP's threads spin where they wait: with other work beside, PyTorch then takes several times as long.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []
        self.about = self._ask(json.dumps(task))

    def run(self) -> None:
        answer = self._ask("run")
        self.seconds.append(answer["seconds"])
        self.processor_seconds.append(answer["processor_seconds"])

    def _ask(self, line: str) -> dict[str, Any]:
        """Raises ChildProcessError with the last it said, if the child has ended."""
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            output = self._end().strip().splitlines()
            raise ChildProcessError(f"diffusers' process ended: {output[-1] if output else 'without a word'}")
        return json.loads(answer)

    def __enter__(self) -> "Rival":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def _end(self) -> str:
        """Waits for the child's end; gives what it said."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        with self._said:
            self._said.seek(0)
            return self._said.read()
