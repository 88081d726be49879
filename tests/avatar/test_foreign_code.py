"""Folders that bring code of their own are refused by every loader, in a line, and none of it runs."""

import builtins
import functools
import json
import os
import shutil
import sys

import pytest
import transformers
from tiny_avatar import make_avatar
from tiny_hub import noise, write_hub

from mi_jax import cli
from mi_jax.avatar.export import export_denoiser
from mi_jax.avatar.families import convert
from mi_jax.avatar.folders import avatar_config, load_encoders, load_part, part_config
from mi_jax.errors import InputError
from mi_jax.models.prompts import Prompter, read_tokenizer
from mi_jax.sample.avatar import load
from mi_jax.weights import native
from mi_jax.weights.sources import open_checkpoint

AUTO_MAP = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"], "AutoModel": "own.Own"}
FAMILIES = {  # their folders, beside the places of a model's own tokenizers
    "hunyuan-video": (".", ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    "hunyuan-video-i2v": (".", ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    "magic-141": (".", ("transformer",)),
    "hunyuan-vae": ("vae", ("vae",)),
    "llava-llama-3": ("text_encoder", ("text_encoder", "tokenizer")),
    "clip-text": ("text_encoder_2", ("text_encoder_2",)),
    "wav2vec2": ("wav2vec2", ("wav2vec2",)),
}


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    root = tmp_path_factory.mktemp("hubs")
    found = {}
    for family, condition in (("hunyuan-video", None), ("hunyuan-video-i2v", "token_replace")):
        found[family] = write_hub(root / family, condition)
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    noise(transformers.Wav2Vec2Model(config), 5).save_pretrained(found["hunyuan-video-i2v"] / "wav2vec2")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "model"
    make_avatar().save(folder)
    return folder


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """A file that foreign code would write; whoever asks on the terminal fails the test, and is answered "y"."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "ran"
    assert not asked
    assert not (tmp_path / "ran").exists()


def bring_code(folder, how, ran):
    """`how`: a Python file alone, or a JSON file that names its class. What is there already stays beside it."""
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import PreTrainedConfig, PreTrainedTokenizerFast\n"
        "class Own(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    if how != "own.py":
        path = folder / how
        stored = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)  # it may be a link to what other tests read
        path.write_text(json.dumps(stored | {"auto_map": AUTO_MAP}))


def refused(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


HOW = ["own.py", "config.json", "tokenizer_config.json", "tokenizer.json"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("family", "place"), [(family, place) for family, (_, places) in FAMILIES.items() for place in places]
)
def test_conversion(hubs, tmp_path, ran, family, place, how):
    source = tmp_path / "source"
    shutil.copytree(hubs.get(family, hubs["hunyuan-video-i2v"]), source, copy_function=os.link)
    bring_code(source / place, how, ran)
    said = refused(lambda: convert(family, source / FAMILIES[family][0], tmp_path / "out"))
    assert said.startswith(str(source / place))
    assert "own" in said
    (source / place / "own.py").unlink()  # the JSON alone, as of code that lies on the hub
    if how != "own.py":
        said = refused(lambda: convert(family, source / FAMILIES[family][0], tmp_path / "out"))
        assert said.startswith(f"{source / place / how}: its auto_map asks to run code")
    assert not (tmp_path / "out").exists()


LOADERS = {
    "load": lambda folder: load(folder, devices=1),
    "load_encoders": load_encoders,
    "load_part": lambda folder: load_part(folder, "vae"),
    "avatar_config": avatar_config,
    "part_config": lambda folder: part_config(folder, "vae"),
    "open_checkpoint": open_checkpoint,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_model_folders(model, tmp_path, ran, loader, how):
    shutil.copytree(model, tmp_path / "model", copy_function=os.link)
    bring_code(tmp_path / "model", how, ran)
    assert refused(lambda: loader(tmp_path / "model")).startswith(str(tmp_path / "model"))
    (tmp_path / "model" / "own.py").unlink()
    if how != "own.py":
        assert f"{how}: its auto_map" in refused(lambda: loader(tmp_path / "model"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", ["tokenizer", "tokenizer_2"])
def test_tokenizers_before_any_weight_is_read(model, tmp_path, ran, monkeypatch, place, how):
    monkeypatch.setattr(native, "_read_leaf", lambda *_: pytest.fail("a weight was read"))
    folder = tmp_path / "model"
    shutil.copytree(model, folder, copy_function=os.link)
    bring_code(folder / place, how, ran)
    config = avatar_config(model).mllm.prompts
    for loader in (
        lambda: load(folder, devices=1),
        lambda: load_encoders(folder),
        lambda: Prompter.load(folder, config),
        lambda: read_tokenizer(folder / place),
    ):
        assert refused(loader).startswith(str(folder / place))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_half_a_tokenizer_is_refused_before_any_weight_is_read(model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(native, "_read_leaf", lambda *_: pytest.fail("a weight was read"))
    for place in ("tokenizer", "tokenizer_2"):
        folder = tmp_path / place
        shutil.copytree(model, folder, copy_function=os.link)
        (folder / place / name).unlink()
        said = refused(lambda folder=folder: load(folder, devices=1))
        assert said.startswith(str(folder / place))


def test_transformers_is_told_to_run_nothing(model, hubs, monkeypatch):
    """Should a way to name code be missed, nobody is asked, and the answer is no."""
    told = []
    for kind in (transformers.AutoTokenizer, transformers.AutoConfig):
        called = kind.from_pretrained

        def spy(*args, called=called, **options):
            told.append(options)
            return called(*args, **options)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    read_tokenizer(model / "tokenizer")
    convert("clip-text", hubs["hunyuan-video-i2v"] / "text_encoder_2", model.parent / "clip")
    asked = [options for options in told if "_from_auto" not in options]  # not what it asks itself
    assert len(asked) >= 2
    assert all(options["trust_remote_code"] is False and options["local_files_only"] for options in asked)


def test_the_commands_say_so_in_a_line(model, tmp_path, ran, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model", copy_function=os.link)
    bring_code(tmp_path / "model" / "tokenizer", "tokenizer_config.json", ran)
    argv = ["prepare", "--out", "records", "--puppets", "1", "--model", "model"]
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "model/tokenizer/own.py: code that a model brings is not run" in lines[0]


def test_a_base_for_export(model, tmp_path, ran):
    """Its tokenizers would be copied as they are."""
    for place in (".", "tokenizer", "tokenizer_2"):
        base = tmp_path / f"base of {place}"
        shutil.copytree(model, base, copy_function=os.link)
        bring_code(base / place, "own.py", ran)
        export = functools.partial(export_denoiser, open_checkpoint(model), avatar_config(model).dit, base=base)
        assert f"{base / place / 'own.py'}: code that" in refused(lambda export=export: export(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
