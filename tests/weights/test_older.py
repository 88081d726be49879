"""Model folders of the older layout read as today's: bit for bit, whole, in shards, and for a warm start."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_dit import TALKING, random_dit

from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh, parameter_spec
from mi_jax.models.dit import DiT
from mi_jax.weights.native import load_into, load_state, save_model


def leaves(state) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_dit(TALKING)


@pytest.fixture
def folder(model, tmp_path):
    """The model as it was once saved."""
    save_model(tmp_path / "model", {"dit": model}, {}, dtype=np.float32)
    path = tmp_path / "model" / "model.safetensors"
    old = {}
    for name, array in load_file(path).items():
        if name.startswith("dit.double.blocks."):
            old[name.replace("blocks", "block", 1)] = array[:, 0].copy()
        elif name.startswith("dit.single.blocks."):
            old[name.replace("blocks", "first", 1)] = array[:, 0].copy()
            old[name.replace("blocks", "second", 1)] = array[:, 1].copy()
        else:
            old[name] = array
    assert "dit.single.second.mlp_in.kernel" in old
    save_file(old, path)
    return tmp_path / "model"


def test_every_leaf_is_the_same(model, folder):
    read = leaves(nnx.state(load_into(folder, "dit", lambda: DiT(TALKING, rngs=nnx.Rngs(0)))))
    started = leaves(load_state(folder, "dit"))
    expected = leaves(nnx.state(model))
    assert read.keys() == started.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(read[name], leaf, err_msg=name)
        np.testing.assert_array_equal(started[name], leaf, err_msg=name)


def test_shards_are_read_as_such(model, folder):
    mesh = make_mesh(data=4, seq=2)
    read = leaves(nnx.state(load_into(folder, "dit", lambda: DiT(TALKING, rngs=nnx.Rngs(0)), mesh=mesh)))
    for name, leaf in leaves(nnx.state(model)).items():
        assert read[name].sharding.is_equivalent_to(
            jax.NamedSharding(mesh, parameter_spec(leaf.shape, mesh)), leaf.ndim
        )
        np.testing.assert_array_equal(read[name], leaf, err_msg=name)
    assert read["single.blocks.mlp_in.kernel"].addressable_shards[0].data.shape == (2, 2, 48, 24)


def test_a_block_that_is_missing_is_missed(folder):
    path = folder / "model.safetensors"
    stored = load_file(path)
    del stored["dit.single.second.mlp_in.bias"]
    save_file(stored, path)
    with pytest.raises(InputError, match=r"dit\.single\.blocks\.mlp_in\.bias is \(2, 1, 192\), not \(2, 2, 192\)"):
        load_into(folder, "dit", lambda: DiT(TALKING, rngs=nnx.Rngs(0)))
