"""From sentences to token ids: templates, image placeholders, crops and tokenizers. NumPy in, NumPy out.

A multimodal prompt is `template.format(prompt)`. The template's own words direct the language model; the hidden states
handed to the denoiser begin after them (`crop_start`). `<image>` is one token in the text and is widened here to as
many as the image has patches, as LLaVA in transformers 5 expects.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Int

from mi_jax.bounds import TokenId, Tokens, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.files import reason
from mi_jax.untrusted import check_folder

IMAGE_TOKEN = "<image>"
PUPPET_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", IMAGE_TOKEN)
"""Special tokens of the puppets' tokenizer, by id."""


TOKENIZERS = ("tokenizer", "tokenizer_2")
"""Their folders, in a model's or beside an encoder's: of the language model, and of CLIP."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """A sentence around the prompt, and what is read after it.

    text: holds `{}` for the prompt and, for multimodal prompts, one `<image>`.
    crop_start: tokens before the prompt, begin-of-text included, `<image>` counted as one.
    cut_marker, cut_length: if given, the `cut_length` tokens that end at the last `cut_marker` are not read (the header
      of the assistant's turn). Where truncation took the marker away, the last `cut_length` tokens are left out.
    """

    text: str
    crop_start: Annotated[int, Within(0, 8192)]
    cut_marker: str | None = None
    cut_length: Annotated[int, Within(0, 8192)] = 0

    def __post_init__(self):
        check_fields(self)
        if self.text.count("{}") != 1 or self.text.count("{") != 1 or self.text.count("}") != 1:
            raise InputError(f"a template holds {{}} once and no other brace: {self.text[:60]!r}")
        if self.cut_marker == "":
            raise InputError("cut_marker is empty")


# HunyuanVideo's templates (its `hyvideo/constants.py`): the public weights were trained behind exactly these words.
_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
_USER = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
HUNYUAN_IMAGE = PromptTemplate(
    text=_SYSTEM + "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|eot_id|>" + _USER,
    crop_start=36,
)
HUNYUAN_VIDEO = PromptTemplate(
    text=_SYSTEM + "Describe the video by detailing the following aspects: " + _ASPECTS + _USER, crop_start=95
)
HUNYUAN_IMAGE_TO_VIDEO = PromptTemplate(
    text=_SYSTEM
    + "<image>\nDescribe the video by detailing the following aspects according to the reference image: "
    + _ASPECTS
    + "\n\n"
    + _USER
    + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    crop_start=103,
    cut_marker="<|end_header_id|>",
    cut_length=4,
)


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Templates with and without a portrait, and the lengths of what they become.

    max_tokens: text tokens after the crop, before the template's cut; longer prompts lose their end.
    image_tokens: tokens that `<image>` stands for: the patches of the vision tower.
    clip_max_tokens: of the CLIP text tower, begin and end of text included.
    eos_token_id: CLIP's end of text, where the pooled vector is read.
    """

    text: PromptTemplate
    image: PromptTemplate
    max_tokens: Tokens
    image_tokens: Annotated[int, Within(1, 2**16)]
    image_token_id: TokenId
    clip_max_tokens: Tokens
    eos_token_id: TokenId

    def __post_init__(self):
        check_fields(self)

    @classmethod
    def hunyuan_video(cls) -> "PromptConfig":
        """HunyuanVideo (text) and -I2V (portrait and text); token ids of xtuner/llava-llama-3-8b-v1_1 and CLIP-L."""
        return cls(
            text=HUNYUAN_VIDEO,
            image=HUNYUAN_IMAGE_TO_VIDEO,
            max_tokens=256,
            image_tokens=576,
            image_token_id=128_257,
            clip_max_tokens=77,
            eos_token_id=49_407,
        )

    @classmethod
    def puppet(cls) -> "PromptConfig":
        """The puppets' own short template: 32 tokens, the end of text among them where the prompt leaves room."""
        return cls(
            text=PromptTemplate(text="direction : {}[EOS]", crop_start=3),
            image=PromptTemplate(text="<image> direction : {}[EOS]", crop_start=4),
            max_tokens=32,
            image_tokens=36,
            image_token_id=PUPPET_TOKENS.index(IMAGE_TOKEN),
            clip_max_tokens=34,
            eos_token_id=PUPPET_TOKENS.index("[EOS]"),
        )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Tokenized prompts. `arrays` is what `MLLM.encode` takes after the images."""

    input_ids: Int[np.ndarray, "b n"]
    attention_mask: Bool[np.ndarray, "b n"]
    text_positions: Int[np.ndarray, "b k"]
    """Where in the sequence the text tokens for the denoiser stand."""
    clip_ids: Int[np.ndarray, "b j"] | None
    dropped: Int[np.ndarray, "b"]
    """Tokens of each prompt that did not fit into `max_tokens` and were cut off."""

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        return self.input_ids, self.attention_mask, self.text_positions, self.clip_ids


class Prompter:
    """The tokenizers of a model with its templates."""

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: Any,
        clip_tokenizer: Any | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.clip_tokenizer = clip_tokenizer
        # Padding and truncation act on the end of the sequence: the crop counts from its start.
        tokenizer.padding_side = tokenizer.truncation_side = "right"

    @classmethod
    def load(cls, folder: str | Path, config: PromptConfig) -> "Prompter":
        """Reads `tokenizer/` and, if present, `tokenizer_2/` (CLIP's), the layout of HunyuanVideo's diffusers folders.

        Raises:
            InputError: a tokenizer is missing or unreadable.
        """
        folder = Path(folder)
        first, second = (folder / name for name in TOKENIZERS)
        return cls(config, read_tokenizer(first), read_tokenizer(second) if second.is_dir() else None)

    def save(self, folder: str | Path) -> None:
        """Writes what `load` reads."""
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        if self.clip_tokenizer is not None:
            self.clip_tokenizer.save_pretrained(Path(folder) / "tokenizer_2")

    def tokenize(self, prompts: Sequence[str], *, image: bool) -> Prompts:
        """Ids, masks and text positions of a batch of prompts, with the portrait's placeholder or without.

        Prompts may be empty. Special tokens written out in a prompt are taken out of it. A prompt longer than
        `config.max_tokens` keeps its start; `dropped` says how many tokens it lost.

        Raises:
            InputError: a prompt is no text (`check_prompt`), or the tokenizer is not this model's.
        """
        for prompt in prompts:
            check_prompt(prompt)
        c = self.config
        template = c.image if image else c.text
        prompts = [_without(prompt, (IMAGE_TOKEN, *self.tokenizer.all_special_tokens)) for prompt in prompts]
        length = c.max_tokens + template.crop_start
        texts = [template.text.format(prompt) for prompt in prompts]
        rows = self.tokenizer(texts, padding=False, truncation=False)["input_ids"]
        # The template's own end may fall away unreported: it says nothing of the prompt.
        after = len(self.tokenizer([template.text.format("")])["input_ids"][0]) - template.crop_start
        dropped = np.asarray([max(0, len(row) - after - length) for row in rows], np.int32)
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for i, row in enumerate(rows):
            row = row[:length]
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        positions = np.broadcast_to(np.arange(template.crop_start, length, dtype=np.int32), (len(rows), c.max_tokens))
        if template.cut_marker:
            positions = self._cut(template, ids, positions)
        if image:
            ids, mask = self._widen(ids, mask)
            positions = positions + (c.image_tokens - 1)
        clip_ids = None
        if self.clip_tokenizer is not None:
            clip_ids = self.clip_tokenizer(
                [_without(prompt, self.clip_tokenizer.all_special_tokens) for prompt in prompts],
                padding="max_length",
                truncation=True,
                max_length=c.clip_max_tokens,
            )["input_ids"]
            clip_ids = np.asarray(clip_ids, np.int32)
        return Prompts(
            input_ids=ids, attention_mask=mask, text_positions=np.ascontiguousarray(positions), clip_ids=clip_ids,
            dropped=dropped,
        )  # fmt: skip

    def _cut(self, template: PromptTemplate, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Positions without the marker that closes the template, and the tokens before it."""
        marker = self.tokenizer.convert_tokens_to_ids(template.cut_marker)
        expected = template.text.count(template.cut_marker)
        kept = []
        for row, where in zip(ids, positions):
            found = np.flatnonzero(row == marker)
            end = found[-1] + 1 if len(found) == expected else len(row)
            kept.append(where[(where < end - template.cut_length) | (where >= end)])
        return np.stack(kept)

    def _widen(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The one image token of every row repeated `image_tokens` times."""
        c = self.config
        first = np.argmax(ids == c.image_token_id, axis=1)
        if not ((ids == c.image_token_id).sum(axis=1) == 1).all():
            raise InputError(f"the tokenizer gives {IMAGE_TOKEN} no id {c.image_token_id}; it is not this model's")
        extra = c.image_tokens - 1
        out_ids = np.full((ids.shape[0], ids.shape[1] + extra), c.image_token_id, np.int32)
        out_mask = np.ones(out_ids.shape, bool)
        for i, at in enumerate(first):
            out_ids[i, :at], out_ids[i, at + 1 + extra :] = ids[i, :at], ids[i, at + 1 :]
            out_mask[i, :at], out_mask[i, at + 1 + extra :] = mask[i, :at], mask[i, at + 1 :]
        return out_ids, out_mask


def check_prompt(prompt: object) -> None:
    """Raises InputError unless a prompt is text: a terminal's bytes that are not UTF-8 arrive as halves of characters,
    which no tokenizer takes."""
    if not isinstance(prompt, str):
        raise InputError(f"prompt: a sentence is needed, this is {type(prompt).__name__}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: not UTF-8 from character {error.start + 1} on") from None


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder of transformers, whose own code, if it has any, is never run.

    Raises:
        InputError: there is none, it asks to run code, or it is unreadable.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise InputError(f"{folder}: no such tokenizer folder")
    check_folder(folder)
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "config.json")):
        raise InputError(f"{folder}: holds no tokenizer_config.json, which says what kind of tokenizer this is")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{folder}: not a readable tokenizer ({reason(error)})") from None


def _without(prompt: str, special_tokens: Iterable[str]) -> str:
    for token in special_tokens:
        prompt = prompt.replace(token, " ")
    return prompt
