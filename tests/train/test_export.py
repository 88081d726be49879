"""A run becomes a model folder, and the folder a video: for denoisers of every kind and width."""

import dataclasses
import json
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open
from tiny_avatar import make_avatar, portrait, tiny_config, voice

from mi_jax import cli
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.puppets.prepare import prepare_puppets
from mi_jax.sample.avatar import load
from mi_jax.sample.inputs import Speaker
from mi_jax.train.adaptation import AdaptationObjective
from mi_jax.train.checkpoints import load_ema
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.dmd2 import DMD2Objective
from mi_jax.train.export import averaged_checkpoint
from mi_jax.train.loop import train
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig
from mi_jax.weights.factors import load_factors

CONFIG = tiny_config()
DENOISERS = {
    "stage 1": dataclasses.replace(CONFIG.dit, audio=None),
    "stage 2, of another width": dataclasses.replace(CONFIG.dit, width=48, rope_axes=(4, 10, 10)),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(model folder, records)."""
    folder, avatar = tmp_path_factory.mktemp("prepared"), make_avatar(CONFIG)
    avatar.save(folder / "base")
    prepare_puppets(avatar.encoders, folder / "records", 2, seconds=0.84, size=32)
    return folder / "base", folder / "records"


@pytest.mark.long
@pytest.mark.parametrize("kind", DENOISERS)
def test_a_run_becomes_a_model_that_animates(prepared, kind, tmp_path, monkeypatch, capsys):
    base, records = prepared
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    objective = CurriculumObjective(dit=DENOISERS[kind], records=str(records), windows=((3, 2),), window_weights=(1.0,))
    config = TrainConfig(
        name="run", objective=objective, steps=2, optimizer=OptimizerConfig(learning_rate=1e-2), sample_every=0
    )
    train(config, tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(base)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: written\n"

    model, start = (load(folder, devices=1) for folder in (tmp_path / "out", base))
    assert model.config.dit == DENOISERS[kind]
    assert (model.config.wav2vec2 is None) == (kind == "stage 1")
    trained = dict(nnx.to_flat_state(nnx.state(load_ema(tmp_path / "run", objective))))
    for path, leaf in nnx.to_flat_state(nnx.state(model.dit)):
        np.testing.assert_array_equal(leaf[...], trained[path][...], err_msg=str(path))
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m.encoders.vae)) for m in (model, start)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    mask = np.ones((40, 48), bool)
    speakers = [] if kind == "stage 1" else [Speaker(voice(0.4), mask)]
    video = model.animate(portrait(), speakers, "She is happy and nods.", seconds=0.4, steps=1)
    assert video.shape == (10, 32, 32, 3)


@pytest.mark.long
@pytest.mark.parametrize("form", ["own records", "a student of factors", "a student of all weights"])
def test_a_run_of_factors_becomes_a_file_and_a_model(prepared, form, tmp_path, monkeypatch):
    """`load(base, lora=FILE)` is `load(OUT)`; a distilled student is sampled in its own steps without guidance."""
    base, records = prepared
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    told = {"dit": CONFIG.dit, "records": str(records), "windows": ((3, 2),), "window_weights": (1.0,)}
    if form == "own records":
        objective = AdaptationObjective(**told, init_from=str(base), rank=2, base_dtype="float32")
    else:
        rank = None if form == "a student of all weights" else 2
        objective = DMD2Objective(
            **told, teacher=str(base), teacher_dtype="float32", student_rank=rank, critic_rank=2, critic_turns=1
        )
    config = TrainConfig(
        name="run", objective=objective, steps=2, optimizer=OptimizerConfig(learning_rate=1e-2), sample_every=0
    )
    state = train(config, tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(base)]) == 0
    out = load(tmp_path / "out", devices=1)
    kernel = out.dit.double.blocks.video.out.kernel[...]
    assert np.abs(kernel - load(base, devices=1).dit.double.blocks.video.out.kernel[...]).max() > 1e-4
    if form == "own records":
        assert out.config == CONFIG
    else:
        assert (out.config.steps, out.config.guidance_audio, out.config.guidance_text) == (4, 0.0, 0.0)
    file = str(tmp_path / "f.safetensors")
    if form == "a student of all weights":
        np.testing.assert_array_equal(
            kernel, state.ema["student"]["student"]["double"]["blocks"]["video"]["out"]["kernel"][...]
        )
        assert cli.main(["export", str(tmp_path / "run"), file]) == 2
        return
    assert cli.main(["export", str(tmp_path / "run"), file]) == 0
    assert cli.main(["export", str(tmp_path / "run"), file]) == 2  # is there already
    adapted = load(base, lora=file, devices=1)
    for one, two in zip(jax.tree.leaves(adapted.dit), jax.tree.leaves(out.dit), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    half = tmp_path / "half.safetensors"
    assert cli.main(["export", str(tmp_path / "run"), str(half), "--dtype", "bfloat16"]) == 0
    assert half.stat().st_size < 0.8 * pathlib.Path(file).stat().st_size
    whole, rounded = load_factors(file), load_factors(half)
    for name, pair in whole.items():
        for side in ("down", "up"):
            expected = getattr(pair, side).astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(getattr(rounded[name], side), expected, err_msg=f"{name}.{side}")


def test_what_cannot_be_exported_is_one_line(prepared, tmp_path, capsys):
    base, _ = prepared

    def refused(*arguments):
        assert cli.main(["export", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert not (tmp_path / "out").exists()
        return line

    assert "config.json: No such file" in refused(tmp_path / "run", tmp_path / "out", "--base", base)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"objective": {"vae": {}}}))
    assert "its objective trains no denoiser" in refused(run, tmp_path / "out", "--base", base)
    (run / "config.json").write_text(json.dumps({"objective": {"dit": {"class": "x.DiTConfig", "width": 3}}}))
    assert "rope_axes" in refused(run, tmp_path / "out", "--base", base)
    dit = dataclasses.asdict(CONFIG.dit)
    (run / "config.json").write_text(json.dumps({"objective": {"dit": dit}}))
    assert "run: holds no finished checkpoint" in refused(run, tmp_path / "out", "--base", base)
    with ocp.training.Checkpointer(run / "checkpoints") as checkpoints:
        for step in (2, 4):
            checkpoints.save_checkpointables(step, {"state": {"params.model.x": np.ones(step)}})
    line = refused(run, tmp_path / "out", "--base", base, "--checkpoint", "3")
    assert "run: holds no finished checkpoint of step 3, only of 2, 4" in line


def test_a_checkpoint_is_taken_by_its_step(tmp_path):
    with ocp.training.Checkpointer(tmp_path / "checkpoints") as checkpoints:
        for step in (2, 4):
            state = {"params.model.x": np.full(3, step, np.float32)}
            checkpoints.save_checkpointables(step, {"state": state}, custom_metadata={"data": "0"})
    for step, value in ((None, 4), (4, 4), (2, 2)):
        (tensor,) = averaged_checkpoint(tmp_path, step=step).tensors.values()
        np.testing.assert_array_equal(tensor.read(), np.full(3, value))


def test_encoders_that_do_not_feed_the_denoiser_are_named(prepared, tmp_path):
    from mi_jax.avatar.export import export_denoiser
    from mi_jax.weights.sources import Checkpoint

    base, _ = prepared
    for change, fault in (
        ({"text_dim": 12}, "gives text tokens of 16, the denoiser takes 12"),
        ({"latent_channels": 8}, "gives latent channels of 4, the denoiser takes 8"),
        ({"audio": dataclasses.replace(CONFIG.dit.audio, layers=3)}, r"wav2vec2 of \(2, 16\), the denoiser takes \(3"),
    ):
        dit = dataclasses.replace(CONFIG.dit, **change)
        with pytest.raises(InputError, match=fault):
            export_denoiser(Checkpoint(tmp_path / "run", {}), dit, tmp_path / "out", base=base)


def test_an_avatar_is_saved_in_what_it_computes_in(prepared, tmp_path):
    """The denoiser and the MLLM in the config's dtype, the others in f32."""
    low = make_avatar(dataclasses.replace(CONFIG, dtype="bfloat16"))
    low.save(tmp_path / "low")
    with safe_open(tmp_path / "low" / "model.safetensors", "numpy") as file:
        dtypes = {(key.split(".")[0], file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    assert dtypes == {("dit", "BF16"), ("mllm", "BF16"), ("vae", "F32"), ("wav2vec2", "F32")}


SAVE = """
import sys, jax
address, index, out = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
import numpy as np
from flax import nnx
from mi_jax.mesh import make_mesh, shard_parameters
from mi_jax.weights.native import save_model

linear = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
graph, state = nnx.split(linear)
spread = shard_parameters(state, make_mesh())
assert not spread["kernel"][...].is_fully_addressable
save_model(out, {"net": nnx.merge(graph, spread)}, {}, dtype=np.float32)
"""


def test_two_processes_save_one_model(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PATH": ""}
    root = pathlib.Path(cli.__file__).parents[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE, address, str(i), str(tmp_path / "out")],
            env=environment, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    expected = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        np.testing.assert_allclose(file.get_tensor("net.kernel"), expected.kernel[...], atol=1e-6)
