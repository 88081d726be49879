"""What the puppets' encoder is pretrained to read."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.models.mllm import MLLMConfig
from mi_jax.puppets.attributes import (
    BOX_MEAN,
    DIRECTIONS,
    LOOKS,
    AttributeObjective,
    labels,
    puppet_prompter,
    strew,
)
from mi_jax.puppets.clips import draw, draw_portrait
from mi_jax.puppets.prompts import vocabulary


@functools.cache
def objective():
    """The puppet's encoder at one layer and a width of 32."""
    c = MLLMConfig.puppet()
    small = c.replace(
        vision=dataclasses.replace(c.vision, width=32, mlp_width=48, depth=1, heads=2),
        language=dataclasses.replace(c.language, width=32, mlp_width=48, depth=1, heads=2, key_value_heads=1),
        clip_text=dataclasses.replace(c.clip_text, width=24, mlp_width=48, depth=1, heads=2),
    )
    return AttributeObjective(mllm=small, batch_size=4)


@functools.cache
def batch():
    return next(iter(objective().dataset(0)))


@functools.cache
def model():
    """The reader with NumPy's random weights, which takes no compilation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective().init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.2), x.dtype), shapes)


def test_labels_are_the_puppets_own():
    """Every label names the class that the clip's attributes name; the portrait is the clip's first frame."""
    clip = draw(3, window=(0, 1))
    portrait, prompt, attributes = draw_portrait(3)
    assert prompt == clip.prompt
    assert np.abs(portrait.astype(int) - clip.video[0]).mean() < 1.0  # but for the mouth
    found = labels(attributes)
    for name, classes in LOOKS.items():
        expected = clip.attributes["background"]["kind"] if name == "background" else clip.attributes["look"][name]
        assert classes[found[f"is/{name}"]] == expected
    for name in ("expression", "head_motion", "background_motion"):
        assert DIRECTIONS[name][found[f"is/{name}"]] == clip.attributes[name]
    assert DIRECTIONS["tempo"][labels(still())["is/tempo"]] == "medium"


def still():
    attributes = draw_portrait(0)[2]
    return attributes | {"direction": attributes["direction"] | {"head_motion": "still", "tempo": "quick"}}


def test_every_directed_prompt_is_read_whole():
    """No word of any prompt is unknown, the words fit the tables, and no prompt loses more than its last two tokens."""
    config = MLLMConfig.puppet()
    prompter = puppet_prompter(config)
    ids = prompter.tokenizer(vocabulary())["input_ids"]
    assert all(prompter.tokenizer.unk_token_id not in row for row in ids)
    assert len(prompter.tokenizer) <= config.language.vocab_size
    prompts = [draw_portrait(i, split=split)[1] for split in ("train", "test") for i in range(60)]
    assert prompter.tokenize(prompts, image=True).dropped.max() <= 2


def test_strewn_words_direct_nothing():
    """Strewing keeps every word of a direction in its order and adds only unknown words or ones that no prompt has."""
    prompt = "A puppet talks, nodding the head quickly, with leaves drifting left behind."
    strewn = [strew(prompt, 0.5, np.random.default_rng(i)).split() for i in range(20)]
    for words in strewn:
        kept = [word for word in words if word in prompt.split() and word not in ("A", "the", "with")]
        assert kept == [word for word in prompt.split() if word not in ("A", "the", "with")]
        assert not set(words) - set(prompt.split()) & set(vocabulary())
    assert any("□" in words for words in strewn)
    assert strew(prompt, 0.0, np.random.default_rng(0)) == prompt


def test_batches_depend_on_the_seed_alone():
    again = next(iter(objective().dataset(0)))
    for name, leaf in batch().items():
        np.testing.assert_array_equal(leaf, again[name])
    other = next(iter(objective().dataset(1)))
    assert (other["input_ids"] != again["input_ids"]).any()


def test_portraits_return_with_new_prompts():
    """A pool of two portraits: every batch of four shows each twice, and the two differ in their directions."""
    o = dataclasses.replace(objective(), portraits=2)
    batches = [b for b, _ in zip(o.dataset(0), range(4))]
    images = np.concatenate([b["image"] for b in batches])
    assert len(np.unique(images.reshape(16, -1), axis=0)) == 2
    prompts = np.concatenate([b["clip_ids"] for b in batches])
    assert len(np.unique(prompts, axis=0)) >= 14
    expected = {draw_portrait(i)[2]["look"]["style"] for i in range(2)}
    assert {LOOKS["style"][k] for b in batches for k in b["is/style"]} == expected


def test_loss_of_ignorant_heads_is_the_entropy_of_the_classes():
    """With heads of zeros every class is as likely as any other; and the gradient reaches all that the tokens pass."""
    o = objective()
    blank = nnx.clone(model())
    for head in (blank.text_head, blank.pooled_head, blank.image_head):
        head.kernel[...], head.bias[...] = jnp.zeros_like(head.kernel[...]), jnp.zeros_like(head.bias[...])
    graph, state = nnx.split(model())

    def mean_loss(state, batch):
        losses, extras = o.loss(nnx.merge(graph, state), batch, jax.random.key(0))
        return losses.mean(), (losses, extras)

    step = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (_, (losses, extras)), _ = step(nnx.state(blank), batch())
    entropy = 2 * sum(math.log(len(c)) for c in DIRECTIONS.values()) + sum(math.log(len(c)) for c in LOOKS.values())
    box = np.abs((batch()["box"] - np.asarray(BOX_MEAN)) / np.asarray((0.07, 0.05, 0.07, 0.05))).mean(axis=1)
    np.testing.assert_allclose(losses, entropy + o.box_weight * box, rtol=1e-5)
    assert set(extras) == {"text_accuracy", "pooled_accuracy", "image_accuracy"}
    _, grads = step(state, batch())
    unread = [path for path, leaf in nnx.to_flat_state(grads) if not np.asarray(leaf[...]).any()]
    assert {".".join(map(str, path[:3])) for path in unread} == {"mllm.vision.post_norm"}


def test_looks_are_read_from_the_portrait_alone():
    """Image tokens stand before the words and never see them; the pooled vector never sees the portrait."""
    o = objective()
    read = functools.partial(jax.jit(o._read), model())
    names = ("input_ids", "attention_mask", "text_positions", "clip_ids")
    one = read(batch())
    words = read(batch() | {name: batch()[name][::-1] for name in names})
    picture = read(batch() | {"image": batch()["image"][::-1]})
    np.testing.assert_allclose(one["image"]["style"], words["image"]["style"], atol=1e-6)
    assert np.abs(one["image"]["style"] - picture["image"]["style"]).max() > 1e-3
    np.testing.assert_allclose(one["pooled"]["expression"], picture["pooled"]["expression"], atol=1e-6)
    assert np.abs(one["text"]["expression"] - words["text"]["expression"]).max() > 1e-3
