"""Configs that ask for more than their weights are: refused before memory is taken or a weight is read."""

import json
import os
import shutil
import tracemalloc

import jax
import pytest
from flax import nnx
from tiny_avatar import make_avatar

from mi_jax.avatar.folders import load_encoders, load_part
from mi_jax.errors import InputError
from mi_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from mi_jax.sample.avatar import load
from mi_jax.weights import native

MIB = 2**20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders") / "model"
    make_avatar().save(folder)
    return folder


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(native, "_read_leaf", lambda *_: pytest.fail("a weight was read"))


def changed(model, folder, *place, value):
    """The model with another value at a place of its config."""
    shutil.copytree(model, folder, copy_function=os.link)
    stored = inside = json.loads((folder / "config.json").read_text())
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def refused(call) -> str:
    before = len(jax.live_arrays())
    with pytest.raises(InputError) as caught:
        call()
    assert len(jax.live_arrays()) <= before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("dit", "audio", "tokens"), 10**9, "config.json: dit.audio.tokens is 1000000000, must lie in [1, 256]"),
        (("mllm", "prompts", "max_tokens"), 10**9, "config.json: mllm.prompts.max_tokens is 1000000000, must lie in"),
        (("dit", "double_depth"), 10**6, "config.json: dit.double_depth is 1000000, must lie in [1, 1024]"),
        (("dit", "heads"), 0, "config.json: dit.heads is 0, must lie in [1, 1024]"),
        (("dit", "width"), [32], "config.json: dit.width is (32,), must be a whole number"),
        (("dit", "audio", "tokens"), 256, "weights of 'dit' do not fit its config"),
        (("dit", "single_depth"), 1024, "weights of 'dit' do not fit its config"),
        (("mllm", "language", "vocab_size"), 2**24, "weights of 'mllm' do not fit its config"),
        (("mllm", "language", "mlp_width"), 2**17, "weights of 'mllm' do not fit its config"),
        (("vae", "widths"), [16384, 16384, 16384], "weights of 'vae' do not fit its config"),
        (("wav2vec2", "conv_dim"), 16384, "weights of 'wav2vec2' do not fit its config"),
    ],
)
def test_a_config_larger_than_its_weights(model, tmp_path, unread, place, value, fault):
    folder = changed(model, tmp_path / "model", *place, value=value)
    assert fault in refused(lambda: load_part(folder, place[0]))
    if "must" in fault:
        assert fault in refused(lambda: load(folder, devices=1))
        assert fault in refused(lambda: load_encoders(folder))


def test_a_model_whose_last_part_does_not_fit_is_refused_before_its_first_is_read(model, tmp_path, unread):
    folder = changed(model, tmp_path / "model", "dit", "refiner_depth", value=1024)
    assert "weights of 'dit' do not fit its config" in refused(lambda: load(folder, devices=1))


def test_the_largest_audio_encoder_is_described_in_little_memory():
    """Its queries start as a formula, which NumPy computes even where nothing is to be made."""
    largest = AudioEncoderConfig(input_dim=8192, layers=256, width=1024, tokens=256, heads=1, depth=1)
    tracemalloc.start()
    abstract = nnx.eval_shape(lambda: AudioEncoder(largest, rngs=nnx.Rngs(0)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abstract.queries.shape == (256, 8192)
    assert peak < 200 * MIB
