"""Pretraining of the puppets' multimodal encoder: read what a prompt directs and what a portrait shows.

The large models' encoders come pretrained; the puppets' learns here, from labels that the drawing gives for free, to
carry in its tokens what the denoiser has to know. Linear heads read the directions (expression, head motion and tempo,
background motion) from the mean of the text tokens and, separately, from the pooled vector, and the looks (style,
colours, shapes, where the face is) from the mean of the image tokens that the denoiser gets. The heads are dropped
afterwards.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

from mi_jax.bounds import Batch, Share, Weight, Within, check_fields
from mi_jax.data.batches import batches
from mi_jax.mesh import gather_parameters
from mi_jax.models.layers import linear
from mi_jax.models.mllm import MLLM, MLLMConfig
from mi_jax.models.prompts import Prompter
from mi_jax.puppets.backgrounds import KINDS, MOTIONS
from mi_jax.puppets.clips import draw_portrait
from mi_jax.puppets.looks import BEARDS, CLOTHES, EYES, GLASSES, HAIRS, HAIRSTYLES, HATS, HEADS, SKINS, STYLES, Look
from mi_jax.puppets.motion import EXPRESSIONS, HEAD_MOTIONS, TEMPOS, sample_direction
from mi_jax.puppets.prompts import vocabulary, write_prompt
from mi_jax.puppets.words import COMMON_WORDS, build_puppet_tokenizer

Classes = dict[str, tuple[str, ...]]

DIRECTIONS: Classes = {
    "expression": EXPRESSIONS,
    "head_motion": HEAD_MOTIONS,
    "tempo": TEMPOS,
    "background_motion": MOTIONS,
}
"""What a prompt says. What it leaves unsaid is at rest, neutral, of medium tempo."""
LOOKS: Classes = {
    "style": STYLES,
    "skin_name": tuple(SKINS),
    "hair_name": tuple(HAIRS),
    "hairstyle": HAIRSTYLES,
    "head": tuple(HEADS),
    "eyes": EYES,
    "hat": HATS,
    "beard": BEARDS,
    "glasses": GLASSES,
    "top_name": tuple(CLOTHES),
    "background": tuple(KINDS),
}
"""What a portrait shows."""
BOX_MEAN, BOX_SPREAD = (0.21, 0.17, 0.79, 0.86), (0.07, 0.05, 0.07, 0.05)
"""Of the face's left, top, right and bottom over the puppets, as fractions of the picture."""

UNKNOWN_WORD = "□"  # in no vocabulary, so read as [UNK]
SMALL_WORDS = ("a", "an", "the", "is", "with", "of", "and", "in")
"""Words that a direction is clear without."""


class AttributeReader(nnx.Module):
    """The encoder and its linear heads."""

    def __init__(self, config: MLLMConfig, directions: Classes, looks: Classes, numbers: int, *, rngs: nnx.Rngs):
        self.mllm = MLLM(config, rngs=rngs)
        self.text_head = linear(config.width, sum(map(len, directions.values())), rngs=rngs)
        self.pooled_head = linear(config.pooled_width, sum(map(len, directions.values())), rngs=rngs)
        self.image_head = linear(config.width, sum(map(len, looks.values())) + numbers, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b H W 3"], *prompts: Array
    ) -> tuple[Float[Array, "b t"], Float[Array, "b t"], Float[Array, "b i"]]:
        """Logits of the directions from the text tokens, the same from the pooled vector, and of the looks."""
        image_tokens, text_tokens, text_mask, pooled = self.mllm.encode(images, *prompts)
        weight = text_mask.astype(text_tokens.dtype)[..., None]
        text = (text_tokens * weight).sum(axis=1) / weight.sum(axis=1)
        return self.text_head(text), self.pooled_head(pooled), self.image_head(image_tokens.mean(axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttributeObjective:
    """Cross-entropy of every direction (from text tokens and from the pooled vector) and look, and the face's box."""

    mllm: MLLMConfig = dataclasses.field(default_factory=MLLMConfig.puppet)
    batch_size: Batch = 64
    split: Literal["train", "test"] = "train"
    portraits: Annotated[int, Within(1, 10**7)] = 12_288
    """How many are drawn, once each, and shown again and again with new prompts: drawing costs as much as a step."""
    noise: Share = 0.08
    """Share of the places between words at which a word that directs nothing, or an unknown one, is strewn in."""
    box_weight: Weight = 4.0
    """Of the face box's absolute error, in units of its spread over the puppets."""

    def __post_init__(self):
        check_fields(self)

    def init(self, key: Key[Array, ""]) -> AttributeReader:
        # Compiled as one function: eager initialisation compiles a program for every shape.
        make = lambda key: AttributeReader(self.mllm, DIRECTIONS, LOOKS, len(BOX_MEAN), rngs=nnx.Rngs(key))  # noqa: E731
        return jax.jit(make)(key)

    def dataset(self, seed: int, share: int = 0, shares: int = 1) -> grain.IterDataset:
        """Puppets without end; the test split has other faces, in wordings as they are given, unstrewn."""
        puppet_prompter(self.mllm)  # made here, because transformers' lazy imports do not bear two threads at once
        indices = grain.MapDataset.range(self.portraits).seed(seed).shuffle().repeat()
        drawn = batches(indices.random_map(self._example), self.batch_size, share, shares).map(self._tokenize)
        # Drawing is Python: more threads would not draw faster.
        return drawn.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))

    def _example(self, index: int, rng: np.random.Generator) -> dict:
        """A portrait of the pool, directed anew."""
        portrait, attributes = _portrait(int(index), self.split, self.mllm.image_size)
        look, kind = Look(**attributes["look"]), attributes["background"]["kind"]
        direction = sample_direction(rng)
        motions = KINDS[kind]
        motion = motions[int(rng.integers(len(motions)))]
        prompt = write_prompt(rng, look, direction, kind, motion)
        if self.split == "train":
            prompt = strew(prompt, self.noise, rng)
        attributes = attributes | {"direction": dataclasses.asdict(direction), "background_motion": motion}
        return {"image": portrait, "prompt": prompt, **labels(attributes)}

    def _tokenize(self, batch: dict) -> dict:
        prompts = puppet_prompter(self.mllm).tokenize([str(prompt) for prompt in batch.pop("prompt")], image=True)
        names = ("input_ids", "attention_mask", "text_positions", "clip_ids")
        return batch | dict(zip(names, prompts.arrays))

    def _read(self, model: AttributeReader, batch: dict) -> dict[str, dict[str, Array]]:
        """Logits by head and attribute; the box under image/box."""
        images = batch["image"].astype(jnp.float32) / 255.0
        text, pooled, image = model(
            images, batch["input_ids"], batch["attention_mask"], batch["text_positions"], batch["clip_ids"]
        )
        return {
            "text": _by_name(text, DIRECTIONS),
            "pooled": _by_name(pooled, DIRECTIONS),
            "image": {**_by_name(image[:, :-4], LOOKS), "box": image[:, -4:]},
        }

    def loss(
        self,
        model: AttributeReader,
        batch: dict[str, Array | np.ndarray],
        key: Key[Array, ""],
        turn: str = "model",
        step: Array | int = 0,
    ) -> tuple[Float[Array, "b"], dict[str, Array]]:
        """The sum of all cross-entropies and the box's error; accuracies as scalars."""
        del key  # nothing is drawn here: the dataset strews the words
        losses, accuracy = jnp.zeros(batch["box"].shape[0]), {}
        for head, logits in self._read(gather_parameters(model), batch).items():
            hits = []
            for name, logit in logits.items():
                logit = logit.astype(jnp.float32)
                if name == "box":
                    target = (batch["box"] - jnp.asarray(BOX_MEAN)[None]) / jnp.asarray(BOX_SPREAD)[None]
                    losses += self.box_weight * jnp.abs(logit - target).mean(axis=1)
                else:
                    losses += optax.softmax_cross_entropy_with_integer_labels(logit, batch[f"is/{name}"])
                    hits.append((jnp.argmax(logit, axis=1) == batch[f"is/{name}"]).mean())
            accuracy[f"{head}_accuracy"] = jnp.stack(hits).mean()
        return losses, accuracy


@functools.lru_cache(maxsize=16_384)
def _portrait(index: int, split: str, size: int) -> tuple[UInt8[np.ndarray, "H W 3"], dict]:
    portrait, _, attributes = draw_portrait(index, split=split, size=size)
    return portrait, attributes


def labels(attributes: dict) -> dict[str, np.ndarray | np.int32]:
    """The class of every direction and look, under `is/<name>`, and the face's box, of a puppet's attributes."""
    look, direction = attributes["look"], attributes["direction"]
    still = direction["head_motion"] == "still"  # then no tempo is said
    values = {
        **look,
        "expression": direction["expression"],
        "head_motion": direction["head_motion"],
        "tempo": "medium" if still else direction["tempo"],
        "background_motion": attributes["background_motion"],
        "background": attributes["background"]["kind"],
    }
    classes = {f"is/{name}": np.int32(names.index(values[name])) for name, names in (DIRECTIONS | LOOKS).items()}
    return {**classes, "box": np.asarray(attributes["face_box"], np.float32)}


def accuracy(
    model: AttributeReader, objective: AttributeObjective, batches: int = 16, seed: int = 1
) -> dict[str, float]:
    """Share of attributes read correctly, by head and attribute, over `batches` of the objective's split.

    `image/box` is the mean absolute error of the box's numbers, as fractions of the picture.
    """
    read = jax.jit(objective._read)
    hits: dict[str, list[float]] = {}
    for batch, _ in zip(objective.dataset(seed), range(batches)):
        for head, logits in read(model, batch).items():
            for name, logit in logits.items():
                logit = np.asarray(logit)
                if name == "box":
                    value = np.abs(logit * BOX_SPREAD + BOX_MEAN - batch["box"]).mean()
                else:
                    value = (logit.argmax(axis=1) == batch[f"is/{name}"]).mean()
                hits.setdefault(f"{head}/{name}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in hits.items()}


def strew(prompt: str, share: float, rng: np.random.Generator) -> str:
    """The prompt with words in between that direct nothing, half of them unknown; small words may be lost.

    So wordings that no puppet was ever given are read by the words in them that matter.
    """
    words = []
    for word in prompt.split():
        if rng.random() < share:
            words.append(UNKNOWN_WORD if rng.random() < 0.5 else _strewn()[rng.integers(len(_strewn()))])
        if word.lower() in SMALL_WORDS and rng.random() < share:
            continue
        words.append(word)
    return " ".join(words)


@functools.cache
def _strewn() -> tuple[str, ...]:
    """Common words that no direction uses."""
    return tuple(sorted(set(COMMON_WORDS) - set(vocabulary())))


@functools.cache
def puppet_prompter(config: MLLMConfig) -> Prompter:
    """The tokenizers of the puppets' world: every word that directs a puppet, in either split.

    Raises:
        ValueError: there are more words than the embedding tables have rows.
    """
    prompts = vocabulary()
    tokenizers = build_puppet_tokenizer(prompts), build_puppet_tokenizer(prompts, closed=True)
    if len(tokenizers[0]) > min(config.language.vocab_size, config.clip_text.vocab_size):
        raise ValueError(f"{len(tokenizers[0])} words, the tables have {config.language.vocab_size} rows")
    return Prompter(config.prompts, *tokenizers)


def _by_name(logits: Array, classes: Classes) -> dict[str, Array]:
    ends = np.cumsum([len(names) for names in classes.values()])[:-1].tolist()
    return dict(zip(classes, jnp.split(logits, ends, axis=1)))
