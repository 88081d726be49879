"""One run on several processes: the same batches, the same losses, killed and taken up by another number of them."""

import csv
import os
import pathlib
import signal
import socket
import subprocess
import sys

import grain
import jax
import numpy as np
import pytest
from tiny_training import Regression, config

from mi_jax.data.batches import batches
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.train.loop import train

CONFIG = """
import sys; sys.path[:0] = [{here!r}]
from tiny_training import Regression, config
config = config(Regression(die={die}), steps=12, log_every=1, checkpoint_every=2, sample_every=6, workers={workers})
"""


def test_shares_of_a_batch_joined_are_the_batch():
    examples = grain.MapDataset.range(100).seed(3).shuffle().random_map(lambda x, rng: np.array([x, rng.integers(1e6)]))
    whole = batches(examples, 12)
    shares = [batches(examples, 12, i, 3) for i in range(3)]
    for k in range(len(whole)):
        np.testing.assert_array_equal(np.concatenate([share[k] for share in shares]), whole[k])
    assert [len(share) for share in shares] == [len(whole)] * 3
    with pytest.raises(InputError, match="a batch of 12 does not divide into 5 shares"):
        batches(examples, 12, 0, 5)


def start(folder: pathlib.Path, out: pathlib.Path, count: int, die: bool, workers: int = 0) -> list[subprocess.Popen]:
    """`count` processes of one device each, on this machine."""
    path = folder / "experiment.py"
    path.write_text(CONFIG.format(here=str(pathlib.Path(__file__).parents[1]), die=die, workers=workers))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "mi_jax", "train", str(path), "--out", str(out)]
    return [
        subprocess.Popen(
            [*command, *([] if count == 1 else ["--distributed", f"{address},{count},{i}"])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def losses(out: pathlib.Path) -> dict[int, float]:
    with (out / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


@pytest.mark.long
def test_a_run_killed_on_two_processes_goes_on_on_four(tmp_path, monkeypatch):
    """The loss curve is that of a run on one process that nobody killed."""
    out, whole = tmp_path / "broken", tmp_path / "whole"
    two = start(tmp_path, out, 2, die=True)
    assert two[0].wait(timeout=240) == -signal.SIGKILL  # at step 6, by its own hand
    two[1].kill()
    [process.communicate() for process in two]
    assert {2, 4} & {int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()}
    finish(start(tmp_path, out, 4, die=False))
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    train(config(Regression(), steps=12, log_every=1), whole)
    broken, unbroken = losses(out), losses(whole)
    assert list(unbroken) == list(range(1, 13))
    assert list(broken) == list(unbroken)
    np.testing.assert_allclose(list(broken.values()), list(unbroken.values()), rtol=1e-5)
