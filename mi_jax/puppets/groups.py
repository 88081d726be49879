"""Two or three puppets in one picture, each with a voice of its own: they take turns, or all talk at the same time."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from mi_jax.puppets.backgrounds import sample_background
from mi_jax.puppets.clips import describe, face_mask, face_masks, generators, num_frames, render
from mi_jax.puppets.face import mouth_truth
from mi_jax.puppets.looks import Look, sample_look
from mi_jax.puppets.motion import move, sample_direction
from mi_jax.puppets.prompts import write_prompt
from mi_jax.puppets.speech import SILENCE, Speech, Voice, mouth_track, sample_voice, speak
from mi_jax.rates import FPS, SAMPLE_RATE

TOGETHER = 0.25  # share of groups in which all talk all the time
SIZES = {2: (0.18, 0.21), 3: (0.115, 0.13)}
"""Half the height of a head, in a picture of so many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Puppets that talk, the leftmost first on every axis of n; the parts are those of `Clip`.

    One prompt directs all. `attributes` has one entry per puppet, which reads its part of the picture
    (`mi_jax.puppets.reading`).
    """

    video: UInt8[np.ndarray, "f h w 3"]
    audio: Float[np.ndarray, "n samples"]
    prompt: str
    attributes: tuple[dict, ...]
    mouth: Float[np.ndarray, "n f 4"]
    mask: Bool[np.ndarray, "n h w"] | Bool[np.ndarray, "n f h w"]


def draw_duet(index: int, **options) -> Group:
    """Duet number `index`: any index >= 0, the same bits in every process and order. Its puppets are in no `draw`.

    The options, and their defaults, are those of `draw` (but `window`); with `moving_masks` each puppet's mask is one
    for each frame.
    """
    return _draw_group(index, "duet", 2, **options)


def draw_trio(index: int, **options) -> Group:
    """Three puppets: see `draw_duet`. What ships was not trained on any."""
    return _draw_group(index, "trio", 3, **options)


def _draw_group(
    index: int,
    kind: Literal["duet", "trio"],
    puppets: int,
    *,
    seed: int = 0,
    split: str = "train",
    seconds: float = 5.16,
    size: int = 96,
    moving_masks: bool = False,
) -> Group:
    frames = num_frames(seconds)
    look_rng, speech_rng, motion_rng, background_rng, prompt_rng = generators(index, seed, split, kind)
    looks = _side_by_side(look_rng, puppets)
    voices = [sample_voice(speech_rng, split) for _ in looks]
    speeches = _take_turns(speech_rng, voices, frames / FPS, split)
    direction = sample_direction(motion_rng)
    poses = [move(motion_rng, direction, mouth_track(speech, frames)) for speech in speeches]
    background = sample_background(background_rng, looks[0].style == "line drawing")
    prompt = write_prompt(prompt_rng, looks[0], direction, background.kind, background.motion)
    pairs = list(zip(looks, poses))
    return Group(
        video=render(pairs, background, np.arange(frames) / FPS, size),
        audio=np.stack([speech.audio for speech in speeches]),
        prompt=prompt,
        attributes=tuple(
            {
                **describe(index, seed, split, size, look, direction, background, pose),
                "frames": frames,
                "voice": dataclasses.asdict(speech.voice),
                "text": speech.text,
            }
            for (look, pose), speech in zip(pairs, speeches)
        ),
        mouth=np.stack([mouth_truth(look, pose) for look, pose in pairs]),
        mask=np.stack([(face_masks if moving_masks else face_mask)(look, pose, size) for look, pose in pairs]),
    )


def _side_by_side(rng: np.random.Generator, count: int) -> list[Look]:
    """Looks in one style, each in its share of the picture, smaller than one alone."""
    looks = [sample_look(rng)]
    while len(looks) < count:
        look = sample_look(rng)
        if look.style == looks[0].style:
            looks.append(look)
    return [
        dataclasses.replace(
            look,
            half_height=float(rng.uniform(*SIZES[count])),
            center_x=float((k + 0.5) / count + rng.uniform(-0.01, 0.01)),
            center_y=float(rng.uniform(0.48, 0.58)),
        )
        for k, look in enumerate(looks)
    ]


def _take_turns(rng: np.random.Generator, voices: list[Voice], seconds: float, split: str) -> list[Speech]:
    """One speech of `seconds` per voice: one says something, then the next; or all talk throughout."""
    if rng.random() < TOGETHER:
        return [speak(rng, voice, seconds, split) for voice in voices]
    count = len(voices)
    # Turns change at a whole frame. Those after the first have a drawn length.
    drawn = [round(seconds * FPS * rng.uniform(0.7 / count, 1.3 / count)) / FPS for _ in voices[1:]]
    first, lengths = int(rng.integers(count)), [seconds - sum(drawn), *drawn]
    starts = [0.0, *(seconds - sum(drawn[k:]) for k in range(len(drawn)))]
    turns = [(k - first) % count for k in range(count)]
    speeches = [speak(rng, voice, lengths[turn], split) for voice, turn in zip(voices, turns, strict=True)]
    return [_placed(speech, starts[turn], seconds) for speech, turn in zip(speeches, turns, strict=True)]


def _placed(speech: Speech, start: float, seconds: float) -> Speech:
    """A speech with silence before it, from `start` on, and after it."""
    count, before = round(seconds * SAMPLE_RATE), round(start * SAMPLE_RATE)
    audio = np.zeros(count, np.float32)
    audio[before : before + len(speech.audio)] = speech.audio[: count - before]
    phonemes = [(a + start, b + start, kind) for a, b, kind in speech.phonemes]
    end = phonemes[-1][1]
    if start:
        phonemes = [(0.0, start, SILENCE), *phonemes]
    if end < seconds:
        phonemes = [*phonemes, (end, seconds, SILENCE)]
    return dataclasses.replace(speech, audio=audio, phonemes=phonemes)
