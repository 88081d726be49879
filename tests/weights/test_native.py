import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh, parameter_spec
from mi_jax.weights.native import load_into, read_config, save_model


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)


class Net(nnx.Module):
    """A stack by vmap, a list, a scalar and an integer: the kinds of leaves that the models hold."""

    def __init__(self, rngs, out=4):
        self.blocks = jax.vmap(Block)(rngs.split(3))
        self.heads = nnx.List([nnx.Linear(8, out, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.scale = nnx.Param(jnp.float32(0.3))
        self.ids = nnx.Param(jnp.arange(5))


def build(out=4):
    return Net(nnx.Rngs(0), out)


def leaves(module):
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", {"dit": build(), "vae": Block(nnx.Rngs(1))}, {"name": "test"}, dtype=np.float32)
    return tmp_path / "model"


def test_float32_comes_back_bit_for_bit_under_dotted_names(folder):
    stored = load_file(folder / "model.safetensors")
    assert {"dit.blocks.dense.kernel", "dit.heads.1.bias", "dit.scale", "dit.ids", "vae.dense.kernel"} < stored.keys()
    loaded = load_into(folder, "dit", build)
    for name, leaf in leaves(build()).items():
        assert leaves(loaded)[name].dtype == leaf.dtype
        np.testing.assert_array_equal(leaves(loaded)[name], leaf, err_msg=name)
    assert read_config(folder) == {"name": "test"}


def test_float16_halves_the_file_and_rounds_to_the_nearest(tmp_path):
    save_model(tmp_path / "half", {"dit": build()}, {})
    for dtype in (jnp.float32, jnp.bfloat16):
        loaded = leaves(load_into(tmp_path / "half", "dit", nnx.eval_shape(build), dtype=dtype))
        for name, leaf in leaves(build()).items():
            rounded = leaf if name == "ids" else leaf.astype(jnp.float16).astype(dtype)
            assert loaded[name].dtype == rounded.dtype
            np.testing.assert_array_equal(loaded[name], rounded, err_msg=name)


def test_large_models_are_split_and_indexed_as_on_the_hub(tmp_path):
    save_model(tmp_path / "split", {"dit": build()}, {}, dtype=np.float32, max_shard_bytes=500)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in leaves(build()).values())
    for name, leaf in leaves(load_into(tmp_path / "split", "dit", build)).items():
        np.testing.assert_array_equal(leaf, leaves(build())[name], err_msg=name)


def test_a_mesh_gets_its_shards(folder):
    mesh = make_mesh(data=4, seq=2)
    loaded = leaves(load_into(folder, "dit", build, mesh=mesh))
    kernel = loaded["blocks.dense.kernel"]
    assert kernel.sharding.spec == parameter_spec((3, 8, 8), mesh)
    assert kernel.addressable_shards[0].data.size == 3 * 8 * 8 // 8
    for name, leaf in leaves(build()).items():
        np.testing.assert_array_equal(loaded[name], leaf, err_msg=name)


def test_the_whole_model_computes_the_same_after_a_round_trip(folder):
    x = jnp.ones((2, 8))
    loaded = load_into(folder, "vae", lambda: Block(nnx.Rngs(7)))
    np.testing.assert_array_equal(loaded.dense(x), Block(nnx.Rngs(1)).dense(x))


def rewritten(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def test_every_weight_is_accounted_for(folder):
    rewritten(folder, lambda stored: stored.pop("dit.heads.0.bias"))
    with pytest.raises(InputError, match=r"weights of 'dit'.*1 missing: dit\.heads\.0\.bias$"):
        load_into(folder, "dit", build)
    rewritten(folder, lambda stored: stored.update({"dit.heads.0.bias": np.zeros(4, np.float32), "dit.x": np.zeros(1)}))
    with pytest.raises(InputError, match=r"1 unknown: dit\.x$"):
        load_into(folder, "dit", build)
    rewritten(folder, lambda stored: stored.pop("dit.x"))
    load_into(folder, "dit", build)
    with pytest.raises(InputError, match=r"2 of another shape: dit\.heads\.0\.bias is \(4,\), not \(6,\)"):
        load_into(folder, "dit", lambda: build(6))
    with pytest.raises(InputError, match=r"'other' .* 8 missing: .* and 3 more"):
        load_into(folder, "other", build)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_file_cut_short_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: cut short or not safetensors"):
        load_into(folder, "dit", build)


def test_a_missing_or_unreadable_file_is_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: No such file"):
        load_into(folder, "dit", build)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json: holds no JSON object"):
        load_into(folder, "dit", build)
    with pytest.raises(InputError, match=r"nowhere/config\.json: .*is no model folder"):
        read_config(tmp_path / "nowhere")
    for content in ("{", "[1]"):
        (folder / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json: (not JSON|holds no JSON object)"):
            read_config(folder)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    module = Block(nnx.Rngs(0))
    module.dense.bias[...] = jnp.full(8, 1e5)
    with pytest.raises(ValueError, match=r"vae\.dense\.bias: .*not finite as float16"):
        save_model(tmp_path / "model", {"vae": module}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_when_asked_and_only_as_a_whole(folder):
    with pytest.raises(InputError, match="exists already"):
        save_model(folder, {"vae": Block(nnx.Rngs(2))}, {})
    (folder / "stale.json").write_text("{}")
    save_model(folder, {"vae": Block(nnx.Rngs(2))}, {"name": "new"}, files={"words/a.json": b"{}"}, overwrite=True)
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["config.json", "model.safetensors", "words/a.json"]
    assert read_config(folder) == {"name": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_writer_killed_half_way_leaves_no_half_written_folder(tmp_path):
    """The process is stopped between two shards, and killed there."""
    run = subprocess.Popen([sys.executable, __file__, str(tmp_path / "model")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "stopped").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    beside = tmp_path / ".model.partial"
    assert len(list(beside.glob("*.safetensors"))) == 1
    assert not (tmp_path / "model").exists()
    save_model(tmp_path / "model", {"vae": Block(nnx.Rngs(0))}, {})
    assert not beside.exists()
    load_into(tmp_path / "model", "vae", lambda: Block(nnx.Rngs(0)))


if __name__ == "__main__":
    from mi_jax.weights import native

    written = native.save_file

    def stop_at_the_second(tensors, path):
        if path.name.startswith("model-00002"):
            (path.parent.parent / "stopped").touch()
            time.sleep(60)
        written(tensors, path)

    native.save_file = stop_at_the_second
    save_model(sys.argv[1], {"vae": Block(nnx.Rngs(0))}, {}, max_shard_bytes=100)
