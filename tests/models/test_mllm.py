"""The multimodal encoder against transformers' PyTorch classes, and the laws of its prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from reference import fill, numpy_tensors, relative_error

from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh, shard_parameters
from mi_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from mi_jax.models.llama import LlamaConfig
from mi_jax.models.mllm import MLLM, MLLMConfig
from mi_jax.models.prompts import HUNYUAN_IMAGE_TO_VIDEO, HUNYUAN_VIDEO, PromptConfig, Prompter, PromptTemplate
from mi_jax.puppets.words import SYNONYMS, build_puppet_tokenizer
from mi_jax.weights.clip import text_table, vision_table
from mi_jax.weights.llava import llava_table

VISION = CLIPVisionConfig(image_size=42, patch_size=14, width=48, mlp_width=80, depth=3, heads=4)
TEXT = CLIPTextConfig(vocab_size=60, eos_token_id=59, width=40, mlp_width=72, depth=2, heads=4, max_tokens=12)
LANGUAGE = LlamaConfig(vocab_size=70, width=64, mlp_width=112, depth=4, heads=8, key_value_heads=2, rope_theta=5e5)
IMAGE_ID = 65
PROMPTS = ["A happy person nods.", "The sad man tilts the head; the background drifts."]


def prompt_config(**changes):
    template = PromptTemplate(text="<image>{}", crop_start=2)
    defaults = {
        "text": template, "image": template, "max_tokens": 8, "image_tokens": 9, "image_token_id": IMAGE_ID,
        "clip_max_tokens": 12, "eos_token_id": 59,
    }  # fmt: skip
    return PromptConfig(**defaults | changes)


CONFIG = MLLMConfig(vision=VISION, language=LANGUAGE, clip_text=TEXT, prompts=prompt_config(), image_token_stride=4)


def randomise(module, seed):
    """Random weights everywhere, norms and biases too, so that every parameter matters to the parity."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
            if parameter.ndim == 1:
                parameter.add_(0.7)
    return module.eval()


def vision_reference():
    c = VISION
    return transformers.CLIPVisionConfig(
        hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        image_size=c.image_size, patch_size=c.patch_size,
    )  # fmt: skip


def language_reference(c):
    return transformers.LlamaConfig(
        hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        num_key_value_heads=c.key_value_heads, vocab_size=c.vocab_size, rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, attn_implementation="eager",
    )  # fmt: skip


def text_reference():
    c = TEXT
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.depth,
            num_attention_heads=c.heads, max_position_embeddings=c.max_tokens, eos_token_id=c.eos_token_id,
            bos_token_id=58, pad_token_id=59,
        )
    )  # fmt: skip


def made(cls, config):
    """A module with NumPy's random weights, which takes no compilation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.2), x.dtype), shapes)


@functools.cache
def mllm():
    return made(MLLM, CONFIG)


@functools.cache
def states_of(skip):
    """Jitted hidden states at the layer `skip` before the end."""

    def states(model, *arguments):
        model.config = CONFIG.replace(hidden_state_skip_layer=skip)
        return model.hidden_states(*arguments)

    return jax.jit(states)


@functools.cache
def llava_pair(seed=0):
    reference = transformers.LlavaModel(
        transformers.LlavaConfig(
            vision_config=vision_reference(), text_config=language_reference(LANGUAGE), image_token_id=IMAGE_ID,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
        )
    )  # fmt: skip
    randomise(reference, seed)
    build = lambda: MLLM(CONFIG.replace(clip_text=None), rngs=nnx.Rngs(0))  # noqa: E731
    return fill(build, llava_table(), numpy_tensors(reference)), reference


def sequences(seed=1):
    """Two sequences with nine image tokens at different places, the second one padded on the right."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (2, 20)).astype(np.int32)
    ids[0, 3:12] = ids[1, 1:10] = IMAGE_ID
    mask = np.ones((2, 20), bool)
    mask[1, 15:] = False
    return ids, mask


@functools.cache
def normalised():
    images = np.random.default_rng(2).random((2, 42, 42, 3), dtype=np.float32)
    mean, std = (np.asarray(v, np.float32) for v in (VISION.mean, VISION.std))
    return images, torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("feature_layer", [-1, -2, 1])
def test_vision_tower_is_transformers(feature_layer):
    reference = randomise(transformers.CLIPVisionModel(vision_reference()), 3)
    config = CLIPVisionConfig(**{**vars(VISION), "feature_layer": feature_layer})
    ours = fill(lambda: CLIPVision(config, rngs=nnx.Rngs(0)), vision_table(), numpy_tensors(reference))
    images, pixels = normalised()
    states = reference(pixels, output_hidden_states=True).hidden_states
    assert relative_error(jax.jit(type(ours).__call__)(ours, images), states[feature_layer][:, 1:]) <= 1e-5


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_clip_text_pools_the_first_end_of_text(seed):
    reference = randomise(text_reference(), seed)
    ours = fill(lambda: CLIPText(TEXT, rngs=nnx.Rngs(0)), text_table(), numpy_tensors(reference))
    ids = np.random.default_rng(5).integers(0, 57, (3, 12)).astype(np.int32)
    for row, end in enumerate((11, 4, 1)):  # as CLIP pads: with end-of-text again
        ids[row, end:] = 59
    pooled = reference(torch.from_numpy(ids).long()).pooler_output
    assert relative_error(jax.jit(type(ours).__call__)(ours, ids), pooled) <= 1e-5


@pytest.mark.parametrize(("skip", "seed"), [(0, 0), (1, 0), (2, 0), (2, 7), (2, 8)])
def test_llava_hidden_states_are_transformers(skip, seed):
    """skip 0 is after the final norm, the others before it, as in transformers' list; padded positions mean nothing."""
    ours, reference = llava_pair(seed)
    ids, mask = sequences(seed + 1)
    images, pixels = normalised()
    states = reference(
        input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), pixel_values=pixels,
        output_hidden_states=True,
    ).hidden_states[-(skip + 1)]  # fmt: skip
    result = states_of(skip)(ours, images, ids, mask)
    assert relative_error(np.asarray(result)[mask], states[torch.from_numpy(mask)]) <= 1e-5


def test_text_alone_is_transformers():
    ours, reference = llava_pair()
    ids, mask = sequences()
    ids = np.minimum(ids, 60)
    states = reference(
        input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), output_hidden_states=True
    ).hidden_states[-3]
    result = states_of(2)(ours, None, ids, mask)
    assert relative_error(np.asarray(result)[mask], states[torch.from_numpy(mask)]) <= 1e-5


def test_encode_reads_image_and_text_positions():
    """Image tokens: every 4th of the nine, from where they stand; text tokens: the given positions."""
    model = mllm()
    ids, mask = sequences()
    images = normalised()[0]
    positions = np.stack([np.arange(12, 20), np.arange(10, 18)]).astype(np.int32)
    clip_ids = np.full((2, 12), 59, np.int32)
    arguments = [jnp.asarray(x) for x in (images, ids, mask, positions, clip_ids)]
    image_tokens, text_tokens, text_mask, pooled = jax.jit(MLLM.encode)(model, *arguments)
    states = states_of(2)(model, images, ids, mask)
    np.testing.assert_allclose(image_tokens[0], states[0, 3:12:4], rtol=1e-5)
    np.testing.assert_allclose(image_tokens[1], states[1, 1:10:4], rtol=1e-5)
    np.testing.assert_allclose(text_tokens[1], states[1, 10:18], rtol=1e-5)
    assert text_mask.tolist() == [[True] * 8, [True] * 5 + [False] * 3]
    assert pooled.shape == (2, 40)
    with pytest.raises(ValueError, match="clip_ids"):
        model.encode(*arguments[:4])


def test_padding_has_no_effect():
    model = mllm()
    ids, mask = sequences()
    images = normalised()[0]
    one, two = (states_of(2)(model, images, x, mask) for x in (ids, np.where(mask, ids, 7).astype(np.int32)))
    np.testing.assert_array_equal(np.asarray(one)[mask], np.asarray(two)[mask])


def test_parameters_of_the_full_preset():
    """The count of transformers' own classes on the meta device, without Llama's language head."""
    c = MLLMConfig.llava_llama3_8b()
    with torch.device("meta"):
        llava = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(
                    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                    image_size=336, patch_size=14,
                ),
                text_config=transformers.LlamaConfig(
                    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                    num_key_value_heads=8, vocab_size=128_320, tie_word_embeddings=False,
                ),
                image_token_id=128_257,
            )
        )  # fmt: skip
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49_408
            )
        )
    expected = sum(p.numel() for p in llava.model.parameters()) + sum(p.numel() for p in text.parameters())
    shapes = jax.eval_shape(lambda: MLLM(c, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(shapes, nnx.Param)))
    assert count == expected
    assert c.num_image_tokens == 144
    puppet = jax.eval_shape(lambda: MLLM(MLLMConfig.puppet(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(puppet, nnx.Param))) == 1_210_656


def test_encode_spreads_over_a_mesh():
    """The same tokens with batch and parameters split over eight devices as on one."""
    model = mllm()
    rng = np.random.default_rng(6)
    ids = rng.integers(0, 64, (8, 20)).astype(np.int32)
    ids[:, 1:10] = IMAGE_ID
    arguments = (
        rng.random((8, 42, 42, 3), dtype=np.float32), ids, np.ones((8, 20), bool),
        np.tile(np.arange(10, 18, dtype=np.int32), (8, 1)), np.full((8, 12), 59, np.int32),
    )  # fmt: skip
    encode = jax.jit(MLLM.encode)
    alone = encode(model, *arguments)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        split = jax.device_put(arguments, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
        spread = encode(shard_parameters(model, mesh), *split)
    for one, other in zip(alone, spread):
        assert jax.typeof(other).sharding.spec[0] == "data"
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=3e-5)


# --- Prompts


def puppet_prompter():
    return Prompter(
        PromptConfig.puppet(), build_puppet_tokenizer(PROMPTS), build_puppet_tokenizer(PROMPTS, closed=True)
    )


def test_puppet_crop_begins_with_the_prompt():
    """With and without a portrait the text tokens are the prompt's words, then the end of text, then padding."""
    prompter = puppet_prompter()
    for image in (True, False):
        prompts = prompter.tokenize(["A happy person nods.", ""], image=image)
        words = np.take_along_axis(prompts.input_ids, prompts.text_positions, axis=1)
        read = prompter.tokenizer.convert_ids_to_tokens(words[0][:7])
        assert read == ["a", "happy", "person", "nods", ".", "[EOS]", "[PAD]"]
        assert np.take_along_axis(prompts.attention_mask, prompts.text_positions, axis=1).sum(axis=1).tolist() == [6, 1]
        assert words.shape == (2, 32)
        assert (prompts.input_ids == prompter.config.image_token_id).sum(axis=1).tolist() == [36 * image] * 2
        assert prompts.dropped.tolist() == [0, 0]
    assert prompter.clip_tokenizer.convert_ids_to_tokens(prompts.clip_ids[1][:3]) == ["[BOS]", "[EOS]", "[PAD]"]


def test_long_prompts_are_cut_and_counted():
    prompter = puppet_prompter()
    prompts = prompter.tokenize(["nods " * 32, "nods " * 33, "nods " * 10_000], image=True)
    assert prompts.dropped.tolist() == [0, 1, 9_968]
    assert prompts.input_ids.shape == (3, 36 + 3 + 32)
    assert prompts.attention_mask.all()
    assert (prompts.clip_ids[:, -1] == prompter.config.eos_token_id).all()


def test_special_tokens_written_in_a_prompt_are_taken_out():
    prompter = puppet_prompter()
    clean, dirty = (prompter.tokenize([text], image=True) for text in ("a  {} man", "a <image>[EOS] {} man"))
    for one, other in zip(clean.arrays, dirty.arrays):
        np.testing.assert_array_equal(one, other)


def test_words_fold_case_synonyms_and_the_unknown():
    tokenizer = build_puppet_tokenizer(PROMPTS)
    read = lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[1:]  # noqa: E731
    assert read("The ECSTATIC xyzzy man...") == ["the", "happy", "[UNK]", "man", ".", ".", "."]
    assert "ecstatic" in SYNONYMS["happy"]
    known = build_puppet_tokenizer([*PROMPTS, "ecstatic"])
    assert known.convert_ids_to_tokens(known("ecstatic")["input_ids"]) == ["[BOS]", "ecstatic"]


def test_prompter_is_the_same_after_saving(tmp_path):
    prompter = puppet_prompter()
    prompter.save(tmp_path)
    other = Prompter.load(tmp_path, prompter.config)
    text = ["An ecstatic PERSON tilts, then nods?"]
    for one, two in zip(prompter.tokenize(text, image=True).arrays, other.tokenize(text, image=True).arrays):
        np.testing.assert_array_equal(one, two)


def test_missing_or_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer folder"):
        Prompter.load(tmp_path, PromptConfig.puppet())
    puppet_prompter().save(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        Prompter.load(tmp_path, PromptConfig.puppet())


class PipelineTokenizer:
    """One id per word or special token, called as the diffusers pipeline calls Llama's tokenizer."""

    def __init__(self, words):
        from tokenizers import Regex, Tokenizer, pre_tokenizers
        from tokenizers.models import WordLevel
        from tokenizers.processors import TemplateProcessing

        special = ["<pad>", "<s>", "<unk>", "<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        vocabulary = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\S+"), "removed", invert=True)
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        self.fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
            additional_special_tokens=special[3:],
        )  # fmt: skip


@pytest.mark.parametrize("length", [3, 400])
def test_image_to_video_crop_is_the_pipelines(length):
    """Image and text tokens of HunyuanVideo-I2V's template are those that diffusers' pipeline reads, in its order."""
    from diffusers import HunyuanVideoImageToVideoPipeline

    words = ["system", "user", "assistant", "\n\n", "\n", *(f"w{i}" for i in range(9))]
    tokenizer = PipelineTokenizer(words).fast
    prompt = " ".join(f"w{i % 9}" for i in range(length))
    crop = len(tokenizer(HUNYUAN_IMAGE_TO_VIDEO.text.split("{}")[0])["input_ids"])
    template = PromptTemplate(
        text=HUNYUAN_IMAGE_TO_VIDEO.text, crop_start=crop, cut_marker="<|end_header_id|>", cut_length=4
    )
    config = prompt_config(text=template, image=template, max_tokens=256, image_tokens=9, image_token_id=3)
    ours = Prompter(config, tokenizer).tokenize([prompt], image=True)

    class Echo(torch.nn.Module):
        """A text encoder whose hidden state at a position is (id, position)."""

        dtype = torch.float32
        config = type("Config", (), {"image_token_index": 3, "pad_token_id": 0})

        def forward(self, input_ids, **_):
            states = torch.stack([input_ids, torch.arange(input_ids.shape[1])[None]], dim=-1).float()
            return type("Output", (), {"hidden_states": [states] * 3})

    pipeline = object.__new__(HunyuanVideoImageToVideoPipeline)
    object.__setattr__(pipeline, "_internal_dict", {})
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, Echo()
    pipeline.image_processor = lambda image, return_tensors: type("Pixels", (), {"pixel_values": torch.zeros(1)})
    embeds, mask = pipeline._get_llama_prompt_embeds(
        None, [prompt],
        {"template": template.text, "crop_start": crop, "image_emb_start": 5, "image_emb_end": 14, "image_emb_len": 9},
        device=torch.device("cpu"), dtype=torch.float32, image_embed_interleave=4,
    )  # fmt: skip
    text = embeds[0, 3:].numpy()
    np.testing.assert_array_equal(text[:, 1], ours.text_positions[0])
    np.testing.assert_array_equal(text[:, 0], ours.input_ids[0][ours.text_positions[0]])
    np.testing.assert_array_equal(mask[0, 3:].bool().numpy(), ours.attention_mask[0][ours.text_positions[0]])
    np.testing.assert_array_equal(embeds[0, :3, 1].numpy(), [5, 9, 13])
    assert np.flatnonzero(ours.input_ids[0] == 3).tolist() == list(range(5, 14))


def test_templates_are_diffusers():
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video

    for module, ours in (
        (pipeline_hunyuan_video, HUNYUAN_VIDEO),
        (pipeline_hunyuan_video_image2video, HUNYUAN_IMAGE_TO_VIDEO),
    ):
        reference = module.DEFAULT_PROMPT_TEMPLATE
        assert (ours.text, ours.crop_start) == (reference["template"], reference["crop_start"])
