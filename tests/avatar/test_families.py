"""Whole public folders become avatars: diffusers' layout and Tencent's, and the command that converts them."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from tiny_avatar import portrait, voice
from tiny_hub import IMAGE_ID, SENTENCES, noise, write_hub

import mi_jax
from mi_jax import cli
from mi_jax.avatar.families import convert
from mi_jax.avatar.folders import load_part
from mi_jax.diffusion import add_noise, sigma_schedule
from mi_jax.errors import InputError
from mi_jax.models.prompts import IMAGE_TOKEN
from mi_jax.puppets.words import build_puppet_tokenizer
from mi_jax.sample.avatar import Avatar, load
from mi_jax.sample.inputs import Speaker
from mi_jax.sample.noise import FrameNoise


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder as HunyuanVideo-I2V's on the hub (token replace, embedded guidance), a few channels wide."""
    return write_hub(tmp_path_factory.mktemp("hub"), "token_replace")


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wav2vec2")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    noise(transformers.Wav2Vec2ForPreTraining(config), 5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    made = convert("hunyuan-video-i2v", hub, out)
    assert sorted(made.parts) == ["dit", "mllm", "vae"]
    assert (made.missing, made.unused) == ([], ["language_model.lm_head.weight"])
    return out


def leaves(module: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def smaller(avatar: Avatar) -> Avatar:
    return dataclasses.replace(avatar, config=avatar.config.replace(height=24, width=32))


@pytest.mark.long
def test_an_image_to_video_folder_makes_a_silent_video_that_begins_with_the_portrait(converted):
    avatar = smaller(load(converted, devices=1))
    config = avatar.config
    assert config.dit.token_replace
    assert (config.wav2vec2, config.embedded_guidance, config.dtype) == (None, 6.0, "float32")
    assert (config.mllm.hidden_state_skip_layer, config.mllm.image_token_stride) == (2, 4)
    assert (config.mllm.prompts.image_tokens, config.mllm.prompts.image_token_id) == (4, IMAGE_ID)
    video = avatar.animate(portrait(), [], "She is happy.", seconds=0.2, steps=2)
    assert video.shape == (5, 24, 32, 3)
    told = avatar.conditions(portrait(), [], [], "She is happy.", 2)
    assert float(told.guidance[0]) == 6.0
    latents = avatar.denoise(told, seed=0, steps=2, window=33, overlap=8, weights={}, latent_frames=2)
    np.testing.assert_allclose(latents[0], told.portrait[0], atol=1e-4)
    assert np.abs(latents[1] - np.asarray(told.portrait[0])).max() > 0.1
    guided = avatar.denoise(
        told, seed=0, steps=2, window=33, overlap=8, weights={"audio": 0.0, "text": 1.5}, latent_frames=2
    )
    by_hand, noise = None, FrameNoise(jax.random.key(0), (1, 4, 4, 4)).window(0, 2)
    for start, end in itertools.pairwise(sigma_schedule(2, config.shift)):
        x = add_noise(told.portrait[:, None], noise, jnp.float32(0.999)) if by_hand is None else by_hand
        u, none = (avatar.dit(x, start[None], c) for c in (told, told.drop(text=True, image=True)))
        by_hand = x + (end - start) * (u + 1.5 * (u - none))
    np.testing.assert_allclose(guided, by_hand[0], atol=1e-3)
    late = dataclasses.replace(avatar, config=dataclasses.replace(config, lead_in=4))  # the first four are not shown
    told = late.conditions(portrait(), [], [], "She is happy.", 3)
    latents = late.denoise(told, seed=0, steps=2, window=33, overlap=8, weights={}, latent_frames=3)
    shown = late.animate(portrait(), [], "She is happy.", seconds=0.2, steps=2)
    np.testing.assert_array_equal(shown, late.decode(latents)[4:9])
    with pytest.raises(InputError, match="no audio attention"):
        avatar.animate(portrait(), [Speaker(voice(0.2))])
    with pytest.raises(InputError, match="needs its length in seconds"):
        avatar.animate(portrait(), [])


def test_the_command_refuses_voices_that_a_model_cannot_hear_before_it_loads(converted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mi_jax.sample.avatar.load", lambda *_, **__: pytest.fail("the long work began"))
    told = ["--model", str(converted), "--out", str(tmp_path / "out.mp4")]
    for more, fault in ((["portrait.png", "speech.wav"], "no audio attention"), (["--seconds", "1"], "no portrait")):
        assert cli.main(["animate", *more, *told]) == 2
        assert fault in capsys.readouterr().err


def test_an_extended_folder_is_an_avatar_with_ears(hub, wav2vec2, tmp_path, capsys):
    """The whole command: MagicInfinite's start from public parts, read by `mi_jax.load`."""
    argv = ["convert", "hunyuan-video-i2v", str(hub), str(tmp_path / "out"), "--extend", "magic-infinite"]
    assert cli.main([*argv, "--wav2vec2", str(wav2vec2)]) == 0
    said = capsys.readouterr().out
    assert "not used, 9: " in said
    assert "wav2vec2.masked_spec_embed" in said
    assert re.search(r"out: (?=.*dit)(?=.*vae)(?=.*mllm)(?=.*wav2vec2)", said)
    avatar = mi_jax.load(tmp_path / "out", devices=1)
    dit = avatar.config.dit
    assert (dit.image_to_video, dit.token_replace, dit.guidance_embedding) == (True, False, False)
    assert (dit.audio.input_dim, dit.audio.layers, dit.audio.width) == (16, 2, 768)
    assert (avatar.config.height, avatar.config.guidance_audio) == (540, 4.0)
    assert avatar.encoders.wav2vec2.config.width == 16
    assert leaves(avatar.dit)["double.audio.kv.kernel"].shape == (1, 768, 64)


def test_parts_alone_are_folders_of_their_part(hub, wav2vec2, converted, tmp_path):
    for family, source, name in (
        ("hunyuan-vae", hub / "vae", "vae"),
        ("wav2vec2", wav2vec2, "wav2vec2"),
        ("clip-text", hub / "text_encoder_2", "clip_text"),
        ("llava-llama-3", hub / "text_encoder", "mllm"),
    ):
        assert convert(family, source, tmp_path / name).parts == [name]
        part = load_part(tmp_path / name, name)
        if name in ("vae", "mllm"):
            whole = leaves(load_part(converted, name))
            for leaf, value in leaves(part).items():
                np.testing.assert_array_equal(value, whole[leaf], err_msg=leaf)
    text = leaves(load_part(converted, "mllm").clip_text)
    for leaf, value in leaves(load_part(tmp_path / "clip_text", "clip_text")).items():
        np.testing.assert_array_equal(value, text[leaf], err_msg=leaf)
    assert (tmp_path / "mllm" / "tokenizer" / "tokenizer.json").is_file()
    with pytest.raises(InputError, match=r"vae/config\.json: says nothing of 'dit'"):
        load_part(tmp_path / "vae", "dit")


def test_tencents_folder_gives_the_same_model(hub, converted, tmp_path):
    """ckpts/ as Tencent's README has it filled: the same parts under other names, tokenizers inside the encoders."""
    root = tmp_path / "ckpts"
    shutil.copytree(hub / "vae", root / "hunyuan-video-i2v-720p" / "vae")
    for encoder, tokenizer, name in (
        ("text_encoder", "tokenizer", "text_encoder_i2v"),
        ("text_encoder_2", "tokenizer_2", "text_encoder_2"),
    ):
        shutil.copytree(hub / encoder, root / name)
        shutil.copytree(hub / tokenizer, root / name, dirs_exist_ok=True)
    shutil.copytree(hub / "transformer", root / "hunyuan-video-i2v-720p" / "transformers")
    # Text to video's files beside them are not those of this family.
    for name in ("hunyuan-video-t2v-720p/transformers", "hunyuan-video-t2v-720p/vae", "text_encoder"):
        (root / name).mkdir(parents=True)
        save_file({"other": torch.zeros(1)}, root / name / "model.safetensors")
    convert("hunyuan-video-i2v", root, tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (converted / name).read_bytes(), name


@pytest.mark.long
def test_a_text_to_video_folder_makes_videos_of_text_alone(hub, tmp_path, capsys):
    """HunyuanVideo's text encoder is the Llama alone."""
    llava = transformers.LlavaForConditionalGeneration.from_pretrained(hub / "text_encoder")
    llava.model.language_model.save_pretrained(tmp_path / "hub" / "text_encoder")
    for name in ("vae", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer"):
        shutil.copytree(hub / name, tmp_path / "hub" / name)
    config = tmp_path / "hub" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"token_replace"', "null"))
    assert convert("hunyuan-video", tmp_path / "hub", tmp_path / "out").missing == []
    avatar = load(tmp_path / "out", devices=1)
    assert (avatar.config.mllm.vision, avatar.encoders.mllm.vision) == (None, None)
    whole = llava.model.language_model.layers[2].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(avatar.encoders.mllm.language.layers.up.kernel[2], whole.T)
    with pytest.raises(InputError, match="from text alone"):
        avatar.animate(portrait(), [], seconds=1.0)
    said = ["--model", str(tmp_path / "out"), "--out", str(tmp_path / "out.mp4"), "--prompt", "She is happy."]
    size = ["--seconds", "0.2", "--height", "32", "--width", "48", "--steps", "2", "--devices", "1"]
    assert cli.main(["animate", *said, *size]) == 0
    assert "0.20 s, 5 frames of 48x32" in capsys.readouterr().out
    assert cli.main(["animate", *said]) == 2
    assert "length in seconds" in capsys.readouterr().err
    # MagicInfinite needs eyes: the Llama is left out, or a LLaVA is given.
    extend = {"extend": "magic-infinite-stage1"}
    assert convert("hunyuan-video", tmp_path / "hub", tmp_path / "start", **extend).missing == ["mllm"]
    given = {"text_encoder": hub / "text_encoder", "clip_text": hub / "text_encoder_2"}
    assert convert("hunyuan-video", tmp_path / "hub", tmp_path / "whole", **extend, **given).missing == []
    assert load(tmp_path / "whole", devices=1).config.mllm.vision is not None
    shutil.rmtree(tmp_path / "hub" / "transformer")
    shutil.copytree(hub / "transformer", tmp_path / "hub" / "transformer")
    with pytest.raises(InputError, match="a Llama without a vision tower"):
        convert("hunyuan-video-i2v", tmp_path / "hub", tmp_path / "again")


def test_what_is_written_is_what_is_loaded(hub, tmp_path):
    convert("hunyuan-video-i2v", hub, tmp_path / "out", dtype=jnp.dtype("bfloat16"))
    avatar = load(tmp_path / "out", devices=1)
    assert (avatar.config.dtype, avatar.dit.dtype) == ("bfloat16", jnp.bfloat16)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(hub, tmp_path, monkeypatch):
    shutil.copytree(hub, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def refused(capsys, *argv: str) -> str:
    """Code 2 and one line on standard error, and nothing written."""
    before = sorted(str(path) for path in Path.cwd().rglob("*"))
    assert cli.main(["convert", *argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert (captured.out, len(lines)) == ("", 1), captured
    assert sorted(str(path) for path in Path.cwd().rglob("*")) == before
    return lines[0].removeprefix("mi-jax: error: ")


def test_what_is_missing_or_damaged_is_one_line(copy, capsys):
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    whole = vae.read_bytes()
    vae.write_bytes(whole[:-10])
    assert (
        refused(capsys, "hunyuan-video-i2v", "hub", "out")
        == f"{vae.relative_to(copy.parent)}: cut short or not safetensors"
    )
    vae.write_bytes(whole)
    named = load_file(vae)
    first = sorted(named)[:30]
    save_file({name: tensor for name, tensor in named.items() if name not in first}, vae)
    said = refused(capsys, "hunyuan-vae", "hub/vae", "out")
    assert f"not the weights of this vae: 30 missing: {', '.join(first)}" in said
    vae.write_bytes(whole)
    shutil.rmtree(copy / "tokenizer")
    assert "text_encoder: not a readable tokenizer" in refused(capsys, "hunyuan-video-i2v", "hub", "out")
    shutil.rmtree(copy / "text_encoder_2")
    assert "no text tower of CLIP (text_encoder_2) beside it" in refused(capsys, "hunyuan-video-i2v", "hub", "out")
    (copy / "transformer" / "config.json").unlink()
    said = refused(capsys, "hunyuan-video-i2v", "hub", "out")
    assert said == "hub/transformer/config.json: No such file or directory"
    assert refused(capsys, "hunyuan-video-i2v", "nowhere", "out") == "nowhere: no such file or folder"


def test_what_does_not_fit_together_is_one_line(copy, wav2vec2, capsys):
    said = refused(capsys, "hunyuan-video", "hub", "out")
    assert "replaces the first frame's tokens is no hunyuan-video (but hunyuan-video-i2v)" in said
    build_puppet_tokenizer(SENTENCES).save_pretrained(copy / "tokenizer")
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace(IMAGE_TOKEN, "<picture>"))
    assert f"gives <image> no id {IMAGE_ID}" in refused(capsys, "hunyuan-video-i2v", "hub", "out")
    assert "--wav2vec2 belongs to a denoiser" in refused(
        capsys, "hunyuan-vae", "hub/vae", "out", "--wav2vec2", str(wav2vec2)
    )
    assert "--extend belongs to a denoiser" in refused(
        capsys, "wav2vec2", str(wav2vec2), "out", "--extend", "magic-infinite"
    )
    assert "--base is for puppet" in refused(capsys, "wav2vec2", str(wav2vec2), "out", "--base", "hub")
    assert "convert puppet takes --base" in refused(capsys, "puppet", "hub", "out", "--dtype", "float16")
    (copy.parent / "out").mkdir()
    (copy.parent / "out" / "mine.txt").write_text("mine")
    assert refused(capsys, "wav2vec2", str(wav2vec2), "out") == "out: exists already"


def test_tokenizers_of_other_models_are_refused(copy, capsys):
    clip = copy / "tokenizer_2"
    told = json.loads((clip / "tokenizer.json").read_text())
    whole = json.dumps(told)
    swapped = {"[EOS]": told["model"]["vocab"]["[UNK]"], "[UNK]": told["model"]["vocab"]["[EOS]"]}
    told["model"]["vocab"] |= swapped
    for token in told["added_tokens"]:
        token["id"] = told["model"]["vocab"][token["content"]]
    (clip / "tokenizer.json").write_text(json.dumps(told))
    assert "its tokenizer ends texts with" in refused(capsys, "hunyuan-video-i2v", "hub", "out")
    (clip / "tokenizer.json").write_text(whole)
    llama = copy / "tokenizer"
    for path in llama.glob("*.json"):
        path.write_text(path.read_text().replace("<|end_header_id|>", "<|other|>"))
    assert "does not know <|end_header_id|>" in refused(capsys, "hunyuan-video-i2v", "hub", "out")


def test_the_source_is_never_written_over(copy, capsys):
    said = "the source lies there; write to another folder"
    assert said in refused(capsys, "hunyuan-video-i2v", "hub", "hub", "--overwrite")
    assert said in refused(capsys, "hunyuan-video-i2v", "hub", ".", "--overwrite")
    shutil.copytree(copy / "vae", "old/vae")
    assert said in refused(capsys, "hunyuan-video-i2v", "hub", "old", "--vae", "old/vae", "--overwrite")


def test_a_half_written_folder_is_no_model(converted, tmp_path):
    """What a killed conversion leaves has no config.json; and a config without its weights is none either."""
    shutil.copytree(converted, tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    with pytest.raises(InputError, match=r"half/config\.json: .*is no model folder"):
        load(tmp_path / "half", devices=1)
    shutil.copytree(converted, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"model\.safetensors: cut short"):
        load(tmp_path / "cut", devices=1)


def test_a_denoiser_alone_says_what_an_avatar_lacks(hub, tmp_path):
    made = convert("hunyuan-video-i2v", hub / "transformer", tmp_path / "out", dtype=jnp.bfloat16)
    assert (made.parts, made.missing) == (["dit"], ["vae", "mllm"])
    assert load_part(tmp_path / "out", "dit").config.token_replace
    with pytest.raises(InputError, match=r"out/config\.json: of a folder of parts \(dit\), not of a whole avatar"):
        load(tmp_path / "out", devices=1)
