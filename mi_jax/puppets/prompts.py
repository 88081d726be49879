"""The sentence that directs a clip, in many wordings and at most `MAX_WORDS` words.

It names the expression, the head motion (with its tempo) and what the background does, each unless it is at rest and
left unsaid; and sometimes the looks of the puppet. All words come from `vocabulary()`, so a word-level tokenizer can
be complete.
"""

import re

import numpy as np

from mi_jax.puppets.backgrounds import KINDS
from mi_jax.puppets.looks import HAIRS, SKINS, STYLES, Look
from mi_jax.puppets.motion import Direction

MAX_WORDS = 30

_WHO = (
    "a puppet",
    "a figure",
    "a character",
    "a portrait",
    "a face",
    "someone",
    "a person",
    "the speaker",
    "a talking head",
)
_SPEAK = (
    "talks",
    "speaks",
    "is talking",
    "is speaking",
    "says something",
    "tells a story",
    "chats",
    "talks to us",
    "is giving a speech",
)

_EXPRESSION = {
    "neutral": (
        "with a neutral face",
        "calmly",
        "with a neutral expression",
        "without emotion",
        "in a matter-of-fact way",
    ),
    "happy": (
        "happily",
        "with a happy smile",
        "cheerfully",
        "with joy",
        "smiling",
        "in a happy mood",
        "looking happy",
        "with a big smile",
    ),
    "sad": (
        "sadly",
        "with a sad face",
        "unhappily",
        "with sorrow",
        "in a sad mood",
        "looking sad",
        "frowning sadly",
        "close to tears",
    ),
    "angry": (
        "angrily",
        "with an angry face",
        "furiously",
        "full of anger",
        "in an angry mood",
        "looking angry",
        "with knitted brows",
    ),
    "surprised": (
        "in surprise",
        "with a surprised face",
        "amazed",
        "looking surprised",
        "with raised eyebrows",
        "full of surprise",
        "astonished",
        "with wide open eyes",
    ),
}
_HEAD = {
    "still": ("keeping the head still", "without moving the head", "holding the head still", "with a steady head"),
    "turning": (
        "turning the head from side to side",
        "looking left and right",
        "shaking the head",
        "turning left and right",
        "turning the head left and right",
    ),
    "nodding": (
        "nodding",
        "nodding the head",
        "moving the head up and down",
        "with a nodding head",
        "nodding up and down",
    ),
    "tilting": (
        "tilting the head from side to side",
        "tilting the head",
        "with a tilting head",
        "leaning the head to one side and the other",
        "tilting left and right",
    ),
}
_TEMPO = {"slow": ("slowly", "gently", "unhurriedly"), "medium": ("",), "quick": ("quickly", "fast", "briskly")}

# kind of background: (nouns for it, verbs for moving sideways)
_NOUNS: dict[str, tuple[str, ...]] = {
    "clouds": ("clouds", "the clouds", "white clouds"),
    "stars": ("stars", "the stars", "bright stars"),
    "snow": ("snow", "snowflakes", "the snow"),
    "leaves": ("leaves", "autumn leaves", "the leaves"),
    "bubbles": ("bubbles", "the bubbles", "air bubbles"),
    "balloons": ("balloons", "the balloons", "coloured balloons"),
    "waves": ("waves", "the waves", "the sea"),
    "hills": ("hills", "green hills", "the landscape"),
    "kites": ("kites", "paper kites", "the kites"),
    "dots": ("dots", "round dots", "the dots"),
    "stripes": ("stripes",),
    "plain": ("a plain wall",),
    "bricks": ("a brick wall",),
    "books": ("bookshelves",),
}
_MOVE = {
    "left": (
        "drifting left",
        "moving to the left",
        "drifting to the left",
        "gliding leftwards",
        "passing from right to left",
    ),
    "right": (
        "drifting right",
        "moving to the right",
        "drifting to the right",
        "gliding rightwards",
        "passing from left to right",
    ),
    "down": ("falling", "falling down", "coming down", "sinking", "moving down"),
    "up": ("rising", "rising up", "floating up", "going up", "moving up"),
}
_PLACE_STILL = (
    "before {n} at rest",
    "in front of {n} standing still",
    "with {n} standing still behind",
    "and the background stays still",
)
_PLACE_MOVING = (
    "with {n} {m} behind",
    "before {n} {m}",
    "in front of {n} {m}",
    "{n} {m} in the background",
    "and behind, {n} {m}",
)


def _pick(rng: np.random.Generator, options) -> str:
    return options[int(rng.integers(len(options)))]


def write_prompt(
    rng: np.random.Generator, look: Look, direction: Direction, background: str, background_motion: str
) -> str:
    """A prompt for a clip."""
    while len(words(text := _draft(rng, look, direction, background, background_motion))) > MAX_WORDS:
        pass
    return text


def _draft(rng: np.random.Generator, look: Look, direction: Direction, background: str, background_motion: str) -> str:
    who = _pick(rng, _WHO)
    if rng.random() < 0.45:
        parts = []
        if rng.random() < 0.6:
            parts.append(f"{look.hair_name} hair" if look.hairstyle != "bald" else "a bald head")
        if rng.random() < 0.4 or not parts:
            parts.append(f"{look.skin_name} skin")
        who += " with " + " and ".join(parts)
    if rng.random() < 0.25:
        article = "an" if look.style[0] in "aeiou" else "a"
        who = f"{article} {look.style} of {who}"
    says = _pick(rng, _SPEAK)
    mood = _pick(rng, _EXPRESSION[direction.expression])
    if direction.expression == "neutral" and rng.random() < 0.3:
        mood = ""
    head = _pick(rng, _HEAD[direction.head_motion])
    if direction.head_motion == "still":
        head = "" if rng.random() < 0.3 else head
    else:
        tempo = _pick(rng, _TEMPO[direction.tempo])
        head = f"{head} {tempo}".strip() if rng.random() < 0.7 or head.startswith("with") else f"{tempo} {head}".strip()
    noun = _pick(rng, _NOUNS[background])
    if background_motion == "still":
        scene = "" if rng.random() < 0.25 else _pick(rng, _PLACE_STILL).format(n=noun)
    else:
        scene = _pick(rng, _PLACE_MOVING).format(n=noun, m=_pick(rng, _MOVE[background_motion]))
    adverbs = [part for part in (mood, head) if part]
    if rng.random() < 0.35:
        adverbs.reverse()
    order = rng.random()
    if order < 0.6 or not scene:
        text = f"{who} {says} " + (", ".join(adverbs) if rng.random() < 0.6 else " and ".join(adverbs))
        text = text.strip() + (f", {scene}" if scene else "")
    elif order < 0.8:
        text = f"{scene.removeprefix('and ')}, {who} {says} {', '.join(adverbs)}"
    else:
        text = f"{who}, {', '.join([*adverbs, scene])}, {says}" if adverbs else f"{who}, {scene}, {says}"
    text = re.sub(r"\s+", " ", text).strip(" ,")
    return text[0].upper() + text[1:] + (_pick(rng, (".", ".", "")))


def words(text: str) -> list[str]:
    """A prompt as lower-case words and punctuation: the units of `vocabulary`."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*|[.,]", text.lower())


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, sorted."""
    texts = [
        *_WHO,
        *_SPEAK,
        *_PLACE_STILL,
        *_PLACE_MOVING,
        *STYLES,
        *HAIRS,
        *SKINS,
        *KINDS,
        "a an of with and hair skin bald head . ,",
    ]
    for table in (_EXPRESSION, _HEAD, _TEMPO, _NOUNS, _MOVE):
        for options in table.values():
            texts.extend(options)
    return sorted({word for text in texts for word in words(re.sub(r"\{.\}", "", text))})
