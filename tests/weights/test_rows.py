"""The converter itself: sources, accounting and the folders it writes, on a small module of its own."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from safetensors.torch import save_file

from mi_jax.errors import InputError
from mi_jax.models.layers import LayerNorm, linear
from mi_jax.weights.native import load_into
from mi_jax.weights.rows import Outputs, Part, Row, Tensor, leaf_shapes, plan, write_model
from mi_jax.weights.sources import open_checkpoint

WIDTH, DEPTH = 6, 3


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = WIDTH):
        self.norm = LayerNorm(width)
        self.qk = linear(width, 2 * width, rngs=rngs)
        self.out = linear(width, width, bias=False, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = WIDTH):
        self.table = nnx.Param(jnp.zeros((5, width)))
        self.layers = jax.vmap(lambda rngs: Layer(rngs, width))(rngs.split(DEPTH))


TABLE = {
    "table": Tensor(("table.weight",)),
    "layers.norm": "blocks.{i}.norm",
    "layers.qk": Outputs(("blocks.{i}.q", "blocks.{i}.k")),
    "layers.out": Outputs(("blocks.{i}.both",), lambda x: x[:WIDTH]),
}


def build() -> Net:
    return Net(nnx.Rngs(0))


def tensors(dtype=torch.float32, width=WIDTH, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    named = {"table.weight": normal(5, width)}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        named |= {f"{block}.norm.weight": normal(width), f"{block}.norm.bias": normal(width)}
        for name in ("q", "k"):
            named |= {f"{block}.{name}.weight": normal(width, width), f"{block}.{name}.bias": normal(width)}
        named[f"{block}.both.weight"] = normal(2 * width, width)
    return named


def part_of(path, *, unused=()) -> Part:
    shapes = leaf_shapes(build)
    return Part("net", open_checkpoint(path), shapes, plan(shapes, TABLE), unused)


def leaves(module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def expected(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    stack = lambda make: np.stack([make(f"blocks.{i}").float().numpy() for i in range(DEPTH)])  # noqa: E731
    return {
        "table": named["table.weight"].float().numpy(),
        "layers.norm.scale": stack(lambda b: named[f"{b}.norm.weight"]),
        "layers.norm.bias": stack(lambda b: named[f"{b}.norm.bias"]),
        "layers.qk.kernel": stack(lambda b: torch.cat([named[f"{b}.{n}.weight"] for n in "qk"]).T),
        "layers.qk.bias": stack(lambda b: torch.cat([named[f"{b}.{n}.bias"] for n in "qk"])),
        "layers.out.kernel": stack(lambda b: named[f"{b}.both.weight"][:WIDTH].T),
    }


def write_split(folder, named: dict[str, torch.Tensor], count: int) -> None:
    """As on the hub: `count` files and an index."""
    folder.mkdir()
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        chosen = dict(list(named.items())[i::count])
        save_file({name: tensor.contiguous() for name, tensor in chosen.items()}, folder / file)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("kind", ["safetensors", "split", "pt", "old pt", "wrapped pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_file_becomes_the_same_leaves(tmp_path, kind, dtype):
    named, source = tensors(dtype), tmp_path / "source"
    if kind == "split":
        write_split(source, named, 3)
    else:
        source.mkdir()
        if kind == "safetensors":
            save_file(named, source / "model.safetensors")
        else:
            content = {"module": named} if kind == "wrapped pt" else named
            zipped = kind != "old pt"
            torch.save(content, source / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert write_model(tmp_path / "out", [part_of(source)], {"net": {}}) == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float32 if dtype.itemsize == 4 else jnp.bfloat16)}
    loaded, wanted = leaves(load_into(tmp_path / "out", "net", build)), expected(named)
    assert loaded.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(loaded[name], leaf, err_msg=name)


def test_large_leaves_are_split_over_files(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    written = []
    write_model(
        tmp_path / "out",
        [part_of(tmp_path / "a.safetensors")],
        {},
        max_shard_bytes=400,
        dtype=np.float16,
        progress=lambda done, total: written.append((done, total)),
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    total = 2 * sum(leaf.size for leaf in expected(tensors()).values())
    assert index["metadata"]["total_size"] == total
    assert written[-1] == (total, total)
    assert [done for done, _ in written] == sorted(done for done, _ in written)
    for name, leaf in leaves(load_into(tmp_path / "out", "net", build)).items():
        np.testing.assert_array_equal(leaf, expected(tensors())[name].astype(np.float16).astype(np.float32))


def test_every_name_is_accounted_for_and_listed(tmp_path):
    named = tensors()
    del named["blocks.1.q.bias"], named["table.weight"]
    named |= {f"extra.{i}": torch.zeros(1) for i in range(9)} | {"head.weight": torch.zeros(2)}
    named["blocks.2.k.weight"] = torch.zeros(WIDTH + 1, WIDTH)
    named["blocks.0.both.weight"] = torch.zeros(2 * WIDTH, WIDTH - 1)
    save_file(named, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as refused:
        write_model(tmp_path / "out", [part_of(tmp_path / "a.safetensors", unused=[r"head\..*"])], {})
    said = str(refused.value)
    assert said.startswith(f"{tmp_path}/a.safetensors: not the weights of this net: 9 unexpected: extra.0, extra.1,")
    assert "extra.8; 2 missing: blocks.1.q.bias, table.weight; 2 of another shape: " in said
    assert "blocks.2.q.weight (6, 6), blocks.2.k.weight (7, 6) (for layers.qk.kernel (6, 12))" in said
    assert "blocks.0.both.weight (12, 5) (for layers.out.kernel (6, 6))" in said
    assert "head" not in said
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_known_leftovers_are_reported(tmp_path):
    save_file(tensors() | {"head.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    part = part_of(tmp_path / "a.safetensors", unused=[r"head\..*"])
    assert write_model(tmp_path / "out", [part], {}) == ["head.weight"]


def test_rows_that_do_not_make_up_the_leaves_are_a_fault_of_the_map(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    part = part_of(tmp_path / "a.safetensors")
    rows = [row for row in part.rows if (row.leaf, row.index) != ("layers.out.kernel", 2)]
    broken = Part(part.name, part.checkpoint, part.shapes, rows)
    with pytest.raises(ValueError, match=r"is made of rows \[0, 1\]"):
        write_model(tmp_path / "out", [broken], {})


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_safetensors_cut_short_are_named(tmp_path, keep):
    save_file(tensors(), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.safetensors: cut short or not safetensors"):
        open_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {"dtype": "F32", "shape": [2], "data_offsets": ["x", 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]},
        {"dtype": "F32", "shape": "two", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_safetensors_with_a_wrong_header_are_named(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=r"a\.safetensors: (cut short or not safetensors|a is stored as)"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_pytorch_files_cut_short_or_with_code_are_named(tmp_path):
    path = tmp_path / "a.pt"
    path.write_text("<!doctype html>")  # what a hub sends to whom it does not know
    with pytest.raises(InputError, match=r"a\.pt: cut short or not PyTorch's"):
        open_checkpoint(path)
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"a\.pt: cut short or not PyTorch's"):
        open_checkpoint(path)
    torch.save({"a": torch.zeros(2), "model_args": Layer}, path)
    with pytest.raises(InputError, match=r"a\.pt: a pickle of more than tensors, which could run code"):
        open_checkpoint(path)
    torch.save({"a": torch.zeros(2), "epoch": 3}, path)
    with pytest.raises(InputError, match=r"a\.pt: holds more than named tensors"):
        open_checkpoint(path)
    torch.save({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(InputError, match=r"a\.pt: a is stored as torch\.float8_e4m3fn, which is not read"):
        open_checkpoint(path)


def test_folders_without_one_checkpoint_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no weights"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"several checkpoints: a\.safetensors, b\.safetensors; name one"):
        open_checkpoint(tmp_path)
    save_file(tensors(), tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"gone\.safetensors: No such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: not an index of weights"):
        open_checkpoint(tmp_path)


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    named = tensors()
    named["table.weight"][2, 1] = 1e5
    save_file(named, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"net\.table: holds values that are not finite as float16"):
        write_model(tmp_path / "out", [part_of(tmp_path / "a.safetensors")], {}, dtype=np.float16)
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_one_row(tmp_path):
    """300 rows of 64 KiB pass through a few rows' memory: no leaf is ever whole."""
    rows, width = 300, 128
    save_file({f"{i}.weight": torch.full((width, width), float(i)) for i in range(rows)}, tmp_path / "a.safetensors")
    shapes = {"kernel": (rows, width, width)}
    part = Part("net", open_checkpoint(tmp_path / "a.safetensors"), shapes, plan(shapes, {"": "{i}"}))
    tracemalloc.start()
    write_model(tmp_path / "out", [part], {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 4 * width**2 + 2 * 10**6
    kernel = load_file(tmp_path / "out" / "model.safetensors")["net.kernel"]
    np.testing.assert_array_equal(kernel[:, 5, 7], np.arange(rows))


def test_a_converter_killed_half_way_leaves_nothing_that_loads(tmp_path):
    """The process is stopped between two rows, and killed there; the next one begins anew."""
    save_file(tensors(), tmp_path / "a.safetensors")
    run = subprocess.Popen([sys.executable, __file__, str(tmp_path)])
    deadline = time.monotonic() + 300
    while not (tmp_path / "stopped").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    beside = tmp_path / ".out.partial"
    assert [path.name for path in beside.iterdir()] == ["model.safetensors"]
    assert not (tmp_path / "out").exists()
    write_model(tmp_path / "out", [part_of(tmp_path / "a.safetensors")], {})
    assert not beside.exists()
    load_into(tmp_path / "out", "net", build)


if __name__ == "__main__":
    import pathlib

    folder = pathlib.Path(sys.argv[1])
    whole = part_of(folder / "a.safetensors")

    def stop(*_) -> np.ndarray:
        (folder / "stopped").touch()
        time.sleep(300)
        raise AssertionError

    rows = [Row(row.leaf, row.index, row.sources, stop if row.index == 2 else row.make) for row in whole.rows]
    from mi_jax.weights import rows as engine

    engine.check = lambda part: []
    write_model(folder / "out", [Part("net", whole.checkpoint, whole.shapes, rows)], {})
