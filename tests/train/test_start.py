"""Where a run begins, and what it refuses to go on with."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_training import Regression, config, digests, rows

from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.train.checkpoints import load_ema_state, named_leaves, open_checkpoints, start_from
from mi_jax.train.loop import train
from mi_jax.train.state import fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started(Regression):
    init_from: str | None = None

    def warm_start(self, model):
        return model if self.init_from is None else start_from(model, self.init_from, "")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))


def test_what_a_run_started_from_is_needed_only_once(tmp_path):
    first = train(config(steps=4), tmp_path / "first")
    started = config(Started(init_from=str(tmp_path / "first")), steps=3)
    begun = train(started, tmp_path / "run")
    assert not np.array_equal(begun.params["model"]["inner"]["kernel"][...], first.ema["model"]["inner"]["kernel"][...])
    shutil.rmtree(tmp_path / "first")
    again = train(dataclasses.replace(started, steps=6), tmp_path / "run")
    assert int(again.step) == 6
    with pytest.raises(InputError, match="first: holds no finished checkpoint"):
        train(started, tmp_path / "other")


def test_other_frozen_weights_are_refused_and_other_changes_said(tmp_path, caplog):
    frozen = config(Regression(frozen="inner"), steps=3)
    train(frozen, tmp_path)
    with pytest.raises(InputError, match="are no longer those that the run began with"):
        train(dataclasses.replace(frozen, seed=1, steps=6), tmp_path)
    with caplog.at_level(logging.WARNING, "mi_jax"):
        again = train(dataclasses.replace(frozen, steps=6, log_every=2), tmp_path)
    assert int(again.step) == 6
    assert caplog.messages[1:] == [f"{tmp_path} goes on with another config: log_every 4 -> 2, steps 3 -> 6"]


def test_a_fingerprint_tells_trees_apart_wherever_they_lie():
    tree = {"a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.ones(8, np.float32)}
    print_of = lambda tree: np.asarray(fingerprint(jax.tree.map(jax.numpy.asarray, tree))).tolist()  # noqa: E731
    first = print_of(tree)
    spread = jax.device_put(tree, jax.NamedSharding(make_mesh(), jax.P("data")))
    assert np.asarray(fingerprint(spread)).tolist() == first
    assert print_of({**tree, "b": np.nextafter(tree["b"], 2, dtype=np.float32)}) != first
    assert print_of({"a": tree["b"], "b": tree["a"]}) != first


def test_ten_skipped_steps_in_a_row_end_the_run_and_leave_its_last_checkpoint(tmp_path):
    """Steps 3 to 9 are bad, then one is good; from 11 on all are."""
    poisoned = config(Regression(poisoned=(*range(3, 10), *range(11, 40))), steps=40, checkpoint_every=5, log_every=1)
    with pytest.raises(InputError) as fault:
        train(poisoned, tmp_path)
    assert "the last 10 steps up to 21 were skipped" in str(fault.value)
    assert "the checkpoint of step 20 stays" in str(fault.value)
    assert open_checkpoints(tmp_path, 2).latest.step == 20
    assert [row["skipped"] for row in rows(tmp_path)][-1] == "17"
    kernel = load_ema_state(tmp_path)["inner"]["kernel"][...]
    assert np.isfinite(kernel).all()


def test_a_checkpoint_of_before_turns_is_read(tmp_path):
    """Its leaves are named without the turn: params.inner.kernel."""
    whole, cut = config(steps=8, checkpoint_every=4), config(steps=4, checkpoint_every=4)
    expected = train(whole, tmp_path / "whole")
    state = train(cut, tmp_path / "new")
    older = tmp_path / "older"
    older.mkdir()
    checkpoints = open_checkpoints(older, 2)
    leaves = {name.replace(".model.", "."): leaf for name, leaf in named_leaves(state).items()}
    checkpoints.save_checkpointables(4, {"state": leaves}, custom_metadata={"data": json.dumps({"batches": 4})})
    checkpoints.close()
    assert digests(load_ema_state(older)) == digests(load_ema_state(tmp_path / "new"))
    assert digests(train(whole, older)) == digests(expected)
    assert nnx.to_flat_state(load_ema_state(older))
