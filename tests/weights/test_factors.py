"""Files of LoRA factors, and models that are adapted by them."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from tiny_avatar import draw_weights, make_avatar, portrait, tiny_config, voice

from mi_jax import cli
from mi_jax.avatar.folders import avatar_config, holds_model, load_part, part_state
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.models import lora
from mi_jax.models.dit import DiT
from mi_jax.sample.avatar import load
from mi_jax.sample.inputs import Speaker
from mi_jax.weights.factors import check_factors, combined, load_factors, read_adaptations, save_factors

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def factors() -> dict[str, lora.Factors]:
    zero = lora.init(
        nnx.state(draw_weights(DiT, CONFIG.dit, 0)), rank=2, key=jax.random.key(0), adapts=lora.blocks_alone
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), zero)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_avatar(CONFIG).save(folder)
    return folder


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_gives_what_was_saved(factors, tmp_path):
    save_factors(tmp_path / "a.safetensors", factors)
    jax.tree.map(np.testing.assert_array_equal, load_factors(tmp_path / "a.safetensors"), factors)
    save_factors(tmp_path / "half.safetensors", factors, dtype=jnp.bfloat16)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    half = load_factors(tmp_path / "half.safetensors")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), half, factors)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(np.float32)}
    with pytest.raises(InputError, match=r"a\.txt: factors are written to a \.safetensors file"):
        save_factors(tmp_path / "a.txt", factors)


def test_several_adaptations_add_up_at_their_weights(factors, tmp_path):
    other = jax.tree.map(lambda x: x[..., ::-1], factors)
    params = nnx.state(draw_weights(DiT, CONFIG.dit, 0))
    together = lora.merge(params, combined([(factors, 0.5), (other, -2.0)]))
    one_by_one = lora.merge(lora.merge(params, factors, 0.5), other, -2.0)
    for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_files_of_other_things_are_refused(factors, tmp_path):
    def refused(tensors) -> str:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(InputError) as fault:
            load_factors(tmp_path / "x.safetensors")
        return str(fault.value)

    down, up = np.zeros((4, 2), np.float32), np.zeros((2, 4), np.float32)
    assert "no file of LoRA factors (other.weight)" in refused({"a.down": down, "a.up": up, "other.weight": down})
    assert "(a)" in refused({"a.down": down})
    assert "(a)" in refused({"a.down": down, "a.up": np.zeros((3, 4), np.float32)})
    assert "(a.down, a.up)" in refused({"a.down": down.astype(np.int32), "a.up": up.astype(np.int32)})
    assert "it is empty" in refused({})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:5])
    long = f"{'x' * 300}.safetensors"
    for path, fault in (
        ("cut.safetensors", "cut short"),
        ("gone", "not found"),
        ("", "is a folder"),
        (long, "not found"),
    ):
        with pytest.raises(InputError, match=fault):
            load_factors(tmp_path / path)
    save_factors(tmp_path / "good.safetensors", factors)
    for entry, fault in (
        ((tmp_path / "good.safetensors", float("nan")), "its weight is nan"),
        ((tmp_path / "good.safetensors", 1e9), r"must lie in -100\.\.100"),
        (3, "lora takes files or"),
        ((tmp_path / "good.safetensors", "1"), "lora takes files or"),
    ):
        with pytest.raises(InputError, match=fault):
            read_adaptations([entry])


def test_factors_of_another_model_are_named_one_by_one(factors):
    shallow = nnx.state(draw_weights(DiT, dataclasses.replace(CONFIG.dit, audio=None), 0))
    strangers = [name for name in factors if ".audio." in name]
    assert len(strangers) == 6
    with pytest.raises(InputError) as fault:
        check_factors(shallow, factors, "f.safetensors")
    assert all(name in str(fault.value) for name in strangers)
    assert str(fault.value).startswith("f.safetensors: made for another model")
    wider = nnx.state(draw_weights(DiT, dataclasses.replace(CONFIG.dit, width=48, rope_axes=(4, 10, 10)), 0))
    with pytest.raises(InputError, match=r"factors of a kernel \(1, 32, 32\), this one is"):
        check_factors(wider, {name: factors[name] for name in factors if name.endswith("out.kernel")}, "f")


def velocity_of(avatar):
    from tiny_dit import conditions, latents_and_sigma

    latents, sigma = latents_and_sigma(CONFIG.dit)
    return np.asarray(jax.jit(lambda dit: dit(latents, sigma, conditions(CONFIG.dit)))(avatar.dit))


def test_a_loaded_model_is_adapted_by_its_files(model, factors, tmp_path):
    """In f32 as merged by hand; at weight 0 the model itself; and on a mesh the same."""
    file = tmp_path / "f.safetensors"
    save_factors(file, factors)
    plain = load(model, devices=1)
    graph, params = nnx.split(plain.dit)
    by_hand = dataclasses.replace(plain, dit=nnx.merge(graph, lora.merge(params, factors, 0.5)))
    expected = velocity_of(by_hand)
    assert np.abs(expected - velocity_of(plain)).max() > 0.05
    np.testing.assert_allclose(velocity_of(load(model, lora=[(file, 0.5)], devices=1)), expected, atol=1e-6)
    np.testing.assert_allclose(
        velocity_of(load(model, lora=[(file, 0.25), (file, 0.25)], devices=1)), expected, atol=1e-5
    )
    np.testing.assert_array_equal(velocity_of(load(model, lora=[(file, 0.0)], devices=1)), velocity_of(plain))
    np.testing.assert_array_equal(
        velocity_of(load(model, lora=file, devices=1)), velocity_of(load(model, lora=[file], devices=1))
    )
    spread = load(model, lora=[(file, 0.5)], mesh=make_mesh(data=4, seq=2))
    for one, two in zip(jax.tree.leaves(spread.dit), jax.tree.leaves(by_hand.dit), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_model_that_computes_in_bf16_keeps_its_kernels(model, factors, tmp_path):
    make_avatar(dataclasses.replace(CONFIG, dtype="bfloat16")).save(tmp_path / "low")
    save_factors(tmp_path / "f.safetensors", factors)
    plain, low = (load(tmp_path / "low", lora=files, devices=1) for files in ((), [tmp_path / "f.safetensors"]))
    kernels = {path: leaf for path, leaf in nnx.to_flat_state(nnx.state(low.dit)) if path[-1] == "kernel"}
    for path, leaf in nnx.to_flat_state(nnx.state(plain.dit)):
        if path[-1] == "kernel":
            np.testing.assert_array_equal(kernels[path][...], leaf[...])
    speaker = Speaker(voice(0.4), np.ones((40, 48), bool))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention of bf16 needs it
        video = low.animate(portrait(), [speaker], "She nods.", seconds=0.2, steps=1)
    assert video.shape == (5, 32, 32, 3)


def test_merged_for_good(model, factors, tmp_path, capsys):
    """`mi-jax export MODEL OUT --merge-lora FILE:WEIGHT` is `load(MODEL, lora=...)`, in another folder."""
    file = tmp_path / "f.safetensors"
    save_factors(file, factors)
    arguments = ["export", str(model), str(tmp_path / "out"), "--merge-lora", f"{file}:0.5", "--steps", "4"]
    assert cli.main(arguments) == 0
    merged, expected = load(tmp_path / "out", devices=1), load(model, lora=[(file, 0.5)], devices=1)
    assert merged.config == dataclasses.replace(expected.config, steps=4)
    for one, two in zip(jax.tree.leaves(merged.dit), jax.tree.leaves(expected.dit), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    capsys.readouterr()
    for words, fault in (
        ([str(model), str(tmp_path / "two")], "a model already"),
        ([str(model), str(tmp_path / "two"), "--merge-lora", f"{file}:x"], "after the colon comes a weight"),
        ([str(model), str(tmp_path / "two.safetensors"), "--merge-lora", str(file)], "made of a run that trains some"),
    ):
        assert cli.main(["export", *words]) == 2
        assert fault in capsys.readouterr().err
        assert not (tmp_path / words[1]).exists()


def test_animate_takes_files_with_weights_and_names_what_is_wrong(model, factors, tmp_path, capsys):
    Image.fromarray(portrait()).save(tmp_path / "p.png")
    save_factors(tmp_path / "f.safetensors", factors)
    other = {f"{name}x": pair for name, pair in factors.items()}
    save_factors(tmp_path / "other.safetensors", other)

    def animate(out, *lora):
        words = ["animate", str(tmp_path / "p.png"), "--model", str(model), "--seconds", "0.2", "--steps", "1"]
        code = cli.main([*words, "--out", str(tmp_path / out), *(w for file in lora for w in ("--lora", str(file)))])
        return code, capsys.readouterr().err.strip().splitlines()[-1:]

    assert animate("plain.mp4")[0] == 0
    assert animate("two.mp4", f"{tmp_path / 'f.safetensors'}:0.5", tmp_path / "f.safetensors")[0] == 0
    assert (tmp_path / "plain.mp4").read_bytes() != (tmp_path / "two.mp4").read_bytes()
    code, (line,) = animate("no.mp4", tmp_path / "other.safetensors")
    assert code == 2
    assert all(name in line for name in other)
    for wrong, fault in ((f"{tmp_path / 'f.safetensors'}:x", "comes a weight"), (tmp_path / "gone", "not found")):
        code, (line,) = animate("no.mp4", wrong)
        assert code == 2
        assert fault in line
    assert not (tmp_path / "no.mp4").exists()


@pytest.fixture
def shipped(model, factors, tmp_path, monkeypatch):
    """A folder of factors and of another way to sample, for the model that is shipped as "tiny"."""
    monkeypatch.setattr("mi_jax.avatar.folders.shipped_models", lambda: {"tiny": model})
    folder = tmp_path / "fast"
    folder.mkdir()
    save_factors(folder / "f.safetensors", factors)
    (folder / "config.json").write_text(json.dumps({"base": "tiny", "lora": ["f.safetensors"], "steps": 7}))
    return folder


def test_a_folder_may_be_a_shipped_model_with_factors(shipped, model):
    fast, by_hand = load(shipped, devices=1), load(model, lora=shipped / "f.safetensors", devices=1)
    assert fast.config == dataclasses.replace(by_hand.config, steps=7)
    assert avatar_config(shipped) == fast.config
    for one, two in zip(jax.tree.leaves(fast.dit), jax.tree.leaves(by_hand.dit), strict=True):
        np.testing.assert_array_equal(one, two)
    part = load_part(shipped, "dit")
    for read in (nnx.state(part), part_state(shipped, "dit")):
        for one, two in zip(jax.tree.leaves(read), jax.tree.leaves(nnx.state(by_hand.dit)), strict=True):
            np.testing.assert_array_equal(one, two)
    plain = load_part("tiny", "dit")
    kernels = [m.double.blocks.video.out.kernel[...] for m in (plain, load(model, devices=1).dit, part)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[2] - kernels[0]).max() > 0.01
    for one, two in zip(jax.tree.leaves(load_part(shipped, "vae")), jax.tree.leaves(by_hand.encoders.vae), strict=True):
        np.testing.assert_array_equal(one, two)
    assert holds_model(shipped)
    assert holds_model("tiny")
    assert not holds_model(shipped.parent)


def test_merging_into_such_a_folder_keeps_what_it_has(shipped, model, factors, tmp_path):
    arguments = ["export", str(shipped), str(tmp_path / "out"), "--merge-lora", f"{shipped / 'f.safetensors'}:0.5"]
    assert cli.main(arguments) == 0
    merged, expected = (
        load(tmp_path / "out", devices=1),
        load(model, lora=[(shipped / "f.safetensors", 1.5)], devices=1),
    )
    assert merged.config.steps == 7
    for one, two in zip(jax.tree.leaves(merged.dit), jax.tree.leaves(expected.dit), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    ("says", "fault"),
    [
        ({"base": "nowhere"}, "base is 'nowhere', no shipped model"),
        ({"base": "../tiny"}, "no shipped model"),
        ({"base": 3}, "base is 3, no shipped model"),
        ({"base": "tiny", "lora": "f.safetensors"}, "must be a list of files in the folder"),
        ({"base": "tiny", "lora": ["../f.safetensors"]}, "must be a list of files in the folder"),
        ({"base": "tiny", "lora": ["/f.safetensors"]}, "must be a list of files in the folder"),
        ({"base": "tiny", "lora": ["gone.safetensors"]}, "gone.safetensors"),
        ({"base": "tiny", "lora": [], "steps": 0}, "steps is 0"),
        ({"base": "tiny", "lora": [], "stepps": 4}, "stepps"),
    ],
)
def test_such_a_folder_that_cannot_be_read_is_one_line(shipped, says, fault):
    (shipped / "config.json").write_text(json.dumps(says))
    with pytest.raises(InputError, match=fault):
        load(shipped, devices=1)
