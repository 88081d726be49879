"""VAE, LLaVA, CLIP and wav2vec2 from the files and spellings in which they are public."""

import json

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo
from flax import nnx
from reference import fill, numpy_tensors
from safetensors.torch import load_file, save_file

from mi_jax.errors import InputError
from mi_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig
from mi_jax.models.llama import Llama, LlamaConfig
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from mi_jax.weights import clip, hunyuan_vae, llava, wav2vec2
from mi_jax.weights.clip import text_table
from mi_jax.weights.hunyuan_vae import vae_table
from mi_jax.weights.llava import llama_table
from mi_jax.weights.native import load_into
from mi_jax.weights.rows import Part, write_model
from mi_jax.weights.wav2vec2 import wav2vec2_table

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION |= {"image_size": 42, "patch_size": 14}
LANGUAGE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LANGUAGE |= {"num_key_value_heads": 2, "vocab_size": 70, "rms_norm_eps": 1e-5}
LLAMA = LlamaConfig(
    vocab_size=70, width=24, mlp_width=40, depth=2, heads=4, key_value_heads=2, rope_theta=5e5, norm_eps=1e-5
)
ROPE = {"rope_type": "default", "rope_theta": 5e5}


def noise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """No two numbers are equal, so that no two tensors can be taken for each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def loaded(tmp_path, part: Part, build) -> dict[str, np.ndarray]:
    """The leaves of a part after a way over the disk."""
    write_model(tmp_path / "out", [part], {}, overwrite=True)
    return leaves(load_into(tmp_path / "out", part.name, build))


def leaves(module: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def assert_equal(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 0) -> None:
    assert ours.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(ours[name], leaf, rtol=rtol, atol=rtol, err_msg=name)


def renamed(folder, rename) -> None:
    """Another spelling of the names in a folder's one file."""
    (path,) = folder.glob("*.safetensors")
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)


# --- VAE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["diffusers", "tencent"])
def test_vae_of_both_layouts(tmp_path, layout):
    config = VAEConfig(widths=(8, 8, 16, 16), norm_groups=4, latent_channels=4, encoder_blocks=1, decoder_blocks=2)
    sizes = {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    model = noise(AutoencoderKLHunyuanVideo(**sizes), 1)
    if layout == "diffusers":
        model.save_pretrained(tmp_path / "vae")
    else:
        (tmp_path / "vae").mkdir()
        state = {f"vae.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "vae" / "pytorch_model.pt")
        said = sizes | {"_class_name": "AutoencoderKLCausal3D", "scaling_factor": 0.476986, "time_compression_ratio": 4}
        (tmp_path / "vae" / "config.json").write_text(json.dumps(said))
    found, part = hunyuan_vae.vae(tmp_path / "vae")
    assert found == config
    build = lambda: VAE(config, rngs=nnx.Rngs(0))  # noqa: E731
    expected = leaves(fill(build, vae_table(config), numpy_tensors(model)))
    assert_equal(loaded(tmp_path, part, build), expected)


def test_other_vaes_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        hunyuan_vae.vae(tmp_path)
    said = {"latent_channels": 16, "block_out_channels": [8] * 5, "layers_per_block": 2, "norm_num_groups": 4}
    for more, message in (
        ({}, r"not the config of HunyuanVideo's VAE \(KeyError\('scaling_factor'"),
        ({"scaling_factor": 1.0}, "which has strides 4x8x8, four levels"),
        ({"scaling_factor": 1.0, "temporal_compression_ratio": 8}, "which has strides 4x8x8, four levels"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(said | more))
        with pytest.raises(InputError, match=message):
            hunyuan_vae.vae(tmp_path)


# --- LLaVA ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava_model():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LANGUAGE, rope_parameters=ROPE),
        image_token_id=65,
    )
    return noise(transformers.LlavaForConditionalGeneration(config), 2)


def test_llava_of_every_spelling(tmp_path, llava_model):
    """As of 2024, as since transformers 4.52, as now; with the vision tower's name as it was and as it is."""
    results = []
    for i, (original, old_vision) in enumerate([(True, True), (True, False), (False, True), (False, False)]):
        folder = tmp_path / str(i)
        llava_model.save_pretrained(folder, save_original_format=original)
        if original:  # as configs were written before transformers 5
            said = json.loads((folder / "config.json").read_text())
            text = said["text_config"]
            text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
            (folder / "config.json").write_text(json.dumps(said))
        if old_vision:
            renamed(folder, lambda name: name.replace("vision_tower.", "vision_tower.vision_model."))
        vision, language, image_token_id, part = llava.llava(folder)
        assert (language, image_token_id) == (LLAMA, 65)
        assert vision == CLIPVisionConfig(image_size=42, patch_size=14, width=16, mlp_width=24, depth=3, heads=2)
        unused = write_model(tmp_path / f"out{i}", [part], {})
        assert [name.rpartition(".")[0].rpartition(".")[2] for name in unused] == ["lm_head"]
        results.append((tmp_path / f"out{i}" / "model.safetensors").read_bytes())
    assert len(set(results)) == 1
    stored = numpy_tensors(llava_model.model)
    from safetensors.numpy import load

    ours = load(results[0])
    np.testing.assert_array_equal(
        ours["llava.language.layers.out.kernel"][1], stored["language_model.layers.1.self_attn.o_proj.weight"].T
    )
    np.testing.assert_array_equal(
        ours["llava.vision.layers.mlp_in.kernel"][2], stored["vision_tower.encoder.layers.2.mlp.fc1.weight"].T
    )
    np.testing.assert_array_equal(ours["llava.projector_out.kernel"], stored["multi_modal_projector.linear_2.weight"].T)


def test_the_llama_of_text_to_video_stands_alone(tmp_path, llava_model):
    """As Tencent's script saves it, with its head, and as diffusers' folders hold it."""
    tensors = numpy_tensors(llava_model.model.language_model)
    build = lambda: Llama(LLAMA, rngs=nnx.Rngs(0))  # noqa: E731
    expected = leaves(fill(build, llama_table(), tensors))
    config = llava_model.config.text_config
    for kind in (transformers.LlamaModel, transformers.LlamaForCausalLM):
        model = kind(config)
        (model.model if hasattr(model, "lm_head") else model).load_state_dict(
            llava_model.model.language_model.state_dict()
        )
        model.save_pretrained(tmp_path / kind.__name__)
        vision, language, image_token_id, part = llava.llava(tmp_path / kind.__name__)
        assert (vision, language, image_token_id) == (None, LLAMA, None)
        assert_equal(loaded(tmp_path, part, build), expected)


def test_models_that_ours_are_not_are_refused(tmp_path):
    transformers.LlamaModel(
        transformers.LlamaConfig(**LANGUAGE, attention_bias=True, rope_parameters=ROPE)
    ).save_pretrained(tmp_path / "bias")
    with pytest.raises(InputError, match=r"bias/config\.json: a Llama with attention_bias True is not read"):
        llava.llava(tmp_path / "bias")
    with pytest.raises(InputError, match=r"bias/config\.json: of a llama, not of a clip or clip_text_model"):
        clip.text_tower(tmp_path / "bias")
    (tmp_path / "bias" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"bias/config\.json: not JSON"):
        llava.llava(tmp_path / "bias")
    (tmp_path / "bias" / "config.json").unlink()
    with pytest.raises(InputError, match=r"bias/config\.json: No such file"):
        llava.llava(tmp_path / "bias")


# --- CLIP ----------------------------------------------------------------------------------------------------------


def test_clip_text_alone_and_inside_clip(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 60, "max_position_embeddings": 12, "bos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=60, eos_token_id=59, width=16, mlp_width=24, depth=2, heads=2, max_tokens=12)
    # 2 is what the configs of 2021 say.
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=sizes | {"eos_token_id": 2}, vision_config=VISION, projection_dim=8)
    )
    noise(whole, 4)
    alone = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, eos_token_id=59))
    state = {name.removeprefix("text_model."): tensor for name, tensor in whole.text_model.state_dict().items()}
    alone.load_state_dict(state)
    build = lambda: CLIPText(config, rngs=nnx.Rngs(0))  # noqa: E731
    expected = leaves(fill(build, text_table(), numpy_tensors(alone)))
    whole.save_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "alone")
    alone.save_pretrained(tmp_path / "old")
    renamed(tmp_path / "old", lambda name: f"text_model.{name}")
    for name in ("whole", "alone", "old"):
        found, part = clip.text_tower(tmp_path / name)
        assert found == config, name
        assert_equal(loaded(tmp_path, part, build), expected)


# --- wav2vec2 ------------------------------------------------------------------------------------------------------

W2V = Wav2Vec2Config(
    conv_dim=8, width=16, num_layers=2, num_heads=2, mlp_width=24, position_kernel=6, position_groups=2
)


def w2v_config(**changes) -> transformers.Wav2Vec2Config:
    sizes = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 6, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    return transformers.Wav2Vec2Config(**sizes | changes)


@pytest.mark.parametrize("kind", ["Wav2Vec2Model", "Wav2Vec2ForPreTraining", "Wav2Vec2ForCTC"])
def test_wav2vec2_of_both_weight_norms(tmp_path, kind):
    model = noise(getattr(transformers, kind)(w2v_config()), 5)
    inner = getattr(model, "wav2vec2", model)
    build = lambda: Wav2Vec2(W2V, rngs=nnx.Rngs(0))  # noqa: E731
    expected = leaves(fill(build, wav2vec2_table(W2V), numpy_tensors(inner)))
    # The kernel that PyTorch itself convolves with.
    kernel = inner.encoder.pos_conv_embed.conv.weight.detach().numpy().transpose(2, 1, 0)
    np.testing.assert_allclose(expected["position.kernel"], kernel, rtol=1e-5, atol=1e-6)
    for old in (False, True):
        folder = tmp_path / str(old)
        model.save_pretrained(folder)
        if old:
            renamed(
                folder,
                lambda name: name.replace("parametrizations.weight.original0", "weight_g").replace(
                    "parametrizations.weight.original1", "weight_v"
                ),
            )
        found, part = wav2vec2.wav2vec2(folder)
        assert found == W2V
        assert_equal(loaded(tmp_path, part, build), expected)


def test_chinese_wav2vec2_as_its_repository_has_it(tmp_path):
    """A pytorch_model.bin, and the weights once more as fairseq wrote them, which are not read."""
    model = noise(transformers.Wav2Vec2ForPreTraining(w2v_config()), 6)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"args": None, "model": {}}, tmp_path / "chinese-wav2vec2-base-fairseq-ckpt.pt")
    build = lambda: Wav2Vec2(W2V, rngs=nnx.Rngs(0))  # noqa: E731
    found, part = wav2vec2.wav2vec2(tmp_path)
    assert found == W2V
    expected = leaves(fill(build, wav2vec2_table(W2V), numpy_tensors(model.wav2vec2)))
    assert_equal(loaded(tmp_path, part, build), expected)


def test_the_large_wav2vec2_is_refused(tmp_path):
    config = w2v_config(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"config\.json: of wav2vec2's architectures only that of the base models"):
        wav2vec2.wav2vec2(tmp_path)
