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

from mi_jax import cli
from mi_jax.errors import InputError
from mi_jax.files import locked
from mi_jax.mesh import make_mesh
from mi_jax.train.checkpoints import load_ema_state, named_leaves, open_checkpoints, start_from
from mi_jax.train.export import averaged_checkpoint
from mi_jax.train.fingerprints import fingerprints, words
from mi_jax.train.loop import train


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


def test_fingerprints_tell_trees_apart_wherever_they_lie():
    tree = {
        "a": np.arange(16, dtype=np.float32).reshape(8, 2), "b": np.ones(8, np.float32), "c": np.ones(3, bool),
        "d": np.ones(8, jax.numpy.bfloat16), "e": np.int32(7),
    }  # fmt: skip
    prints = lambda tree: words(fingerprints(jax.tree.map(jax.numpy.asarray, tree)))  # noqa: E731
    first = prints(tree)
    assert len(set(first)) == 5
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        spread = {
            name: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data") if np.size(x) >= 8 else jax.P()))
            for name, x in tree.items()
        }
        assert words(fingerprints(spread)) == first
    swapped, nudged = tree["a"][::-1], np.nextafter(tree["b"], 2, dtype=np.float32)
    assert [a == b for a, b in zip(prints({**tree, "a": swapped, "b": nudged}), first)] == [False, False] + [True] * 3


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


# --- Damage

# Orbax reads many leaves at once; when one cannot be read, the others find its event loop closed.
others_are_cut_off = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(config of 12 steps, folder of a run of 8, the state of a run of all 12). Nothing may change the folder."""
    folder, settings = tmp_path_factory.mktemp("begun"), config(steps=8, checkpoint_every=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        train(settings, folder / "run")
        whole = dataclasses.replace(settings, steps=12)
        return whole, folder / "run", train(whole, folder / "whole")


def numbers_of(checkpoint):
    """The file that holds a checkpoint's numbers."""
    return next((checkpoint / "state" / "d").iterdir())


def put_other_numbers(checkpoint, tmp_path):
    """Whole, but for its numbers: another run's, under the old fingerprints."""
    other = train(config(steps=8, checkpoint_every=4, seed=1), tmp_path / "other").step
    assert int(other) == 8
    metadata = next(checkpoint.rglob("_CHECKPOINT_METADATA")).read_bytes()
    shutil.rmtree(checkpoint)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "8", checkpoint)
    next(checkpoint.rglob("_CHECKPOINT_METADATA")).write_bytes(metadata)


@others_are_cut_off
@pytest.mark.parametrize(
    "kind", ["another number", "cut short", "a file less", "empty", "nothing said of it", "nothing but a folder"]
)
def test_a_damaged_checkpoint_is_said_and_an_older_one_taken(begun, kind, tmp_path, caplog):
    settings, folder, expected = begun
    run = shutil.copytree(folder, tmp_path / "run")
    newest = run / "checkpoints" / "8"
    if kind == "another number":
        put_other_numbers(newest, tmp_path)
    elif kind == "cut short":
        path = numbers_of(newest)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "a file less":
        numbers_of(newest).unlink()
    elif kind == "nothing said of it":
        next(newest.rglob("_CHECKPOINT_METADATA")).write_bytes(b"")
    elif kind == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        (run / "checkpoints" / "99").mkdir()
    with caplog.at_level(logging.WARNING, "mi_jax"):
        state = train(settings, run)
    assert digests(state) == digests(expected)
    assert "damaged, an older checkpoint is looked for" in caplog.text
    assert [p.name for p in (run / "damaged").iterdir()] == ["99" if kind.startswith("nothing but") else "8"]
    assert [int(row["step"]) for row in rows(run)] == [4, 8, 12]


@pytest.mark.parametrize("together", [2**30, 200, 1])
def test_averages_are_the_same_however_many_are_read_together(begun, monkeypatch, together):
    """And in whatever order they are asked for."""
    monkeypatch.setattr("mi_jax.train.checkpoints.READ_BYTES", together)
    wanted = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(load_ema_state(begun[1]))}
    tensors = averaged_checkpoint(begun[1]).tensors
    assert tensors.keys() == wanted.keys()
    names = sorted(tensors, key=lambda name: tensors[name].place)
    for order in (names, names[::-1], names[1::2] + names[::2], [names[0]] * 2):
        for name in order:
            np.testing.assert_array_equal(tensors[name].read(), wanted[name][...], err_msg=name)


@others_are_cut_off
def test_check_names_what_is_damaged(begun, tmp_path, capsys):
    run = shutil.copytree(begun[1], tmp_path / "run")
    assert cli.main(["check", str(run)]) == 0
    assert [line.rpartition(": ")[2].startswith("whole") for line in capsys.readouterr().out.splitlines()] == [True] * 2
    numbers_of(run / "checkpoints" / "8").unlink()
    assert cli.main(["check", str(run)]) == 2
    told = capsys.readouterr()
    assert [": damaged (" in line for line in told.out.splitlines()] == [False, True]
    assert told.err.strip() == f"mi-jax: error: {run}: 1 damaged checkpoint"
    assert told.out.count(str(run)) == 2
    with pytest.raises(InputError, match=r"checkpoints/8: damaged \("):  # also for those that take its averages
        load_ema_state(run)
    next((run / "checkpoints" / "4").rglob("_CHECKPOINT_METADATA")).write_bytes(b"")
    assert cli.main(["check", str(run)]) == 2
    assert capsys.readouterr().out.count(": damaged (") == 2
    assert cli.main(["check", str(tmp_path)]) == 2


@others_are_cut_off
def test_other_numbers_are_told_from_those_that_were_saved(begun, tmp_path, capsys):
    """By all who read a checkpoint without going on from it."""
    run = shutil.copytree(begun[1], tmp_path / "run")
    put_other_numbers(run / "checkpoints" / "8", tmp_path)
    assert cli.main(["check", str(run)]) == 2
    assert "8: damaged (" in capsys.readouterr().out
    for read in (load_ema_state, lambda run: [x.read() for x in averaged_checkpoint(run).tensors.values()]):
        with pytest.raises(InputError, match=r"checkpoints/8: damaged \(.* not as they were saved"):
            read(run)


@others_are_cut_off
def test_a_run_without_a_whole_checkpoint_is_refused_and_keeps_its_files(begun, tmp_path):
    settings, folder, _ = begun
    run = shutil.copytree(folder, tmp_path / "run")
    for step in ("4", "8"):
        numbers_of(run / "checkpoints" / step).unlink()
    before = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    with pytest.raises(InputError, match="none of its 2 checkpoints is whole"):
        train(settings, run)
    assert sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file()) == before


def test_two_trainings_do_not_share_a_folder(begun, tmp_path):
    with locked(tmp_path, "a training"), pytest.raises(InputError, match="a training is under way there"):
        train(begun[0], tmp_path)
    assert int(train(config(steps=2), tmp_path).step) == 2


def test_a_run_that_fails_before_its_first_log_line_keeps_its_checkpoint(tmp_path):
    with pytest.raises(InputError, match="ends after 3 batches"):
        train(config(Regression(batches=3), checkpoint_every=2, log_every=100), tmp_path / "new")
    assert open_checkpoints(tmp_path / "new", 2).latest.step == 2


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="ends after 1 batches"):
        train(config(Regression(batches=1)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
