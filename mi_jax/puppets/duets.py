"""Two puppets in one picture, each with a voice of its own: they take turns, and sometimes talk at the same time."""

import dataclasses

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

TOGETHER = 0.25  # share of duets in which both talk all the time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duet:
    """Two talking puppets, the left one first on every axis of two; the parts are those of `Clip`.

    One prompt directs both. `attributes` has one entry per puppet, which reads its part of the picture
    (`mi_jax.puppets.reading`).
    """

    video: UInt8[np.ndarray, "f h w 3"]
    audio: Float[np.ndarray, "2 n"]
    prompt: str
    attributes: tuple[dict, dict]
    mouth: Float[np.ndarray, "2 f 4"]
    mask: Bool[np.ndarray, "2 h w"] | Bool[np.ndarray, "2 f h w"]


def draw_duet(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    seconds: float = 5.16,
    size: int = 96,
    moving_masks: bool = False,
) -> Duet:
    """Duet number `index`: any index >= 0, the same bits in every process and order. Its puppets are in no `draw`.

    With `moving_masks` each puppet's mask is one for each frame.
    """
    frames = num_frames(seconds)
    look_rng, speech_rng, motion_rng, background_rng, prompt_rng = generators(index, seed, split, "duet")
    looks = _side_by_side(look_rng)
    voices = [sample_voice(speech_rng, split) for _ in looks]
    speeches = _take_turns(speech_rng, voices, frames / FPS, split)
    direction = sample_direction(motion_rng)
    poses = [move(motion_rng, direction, mouth_track(speech, frames)) for speech in speeches]
    background = sample_background(background_rng, looks[0].style == "line drawing")
    prompt = write_prompt(prompt_rng, looks[0], direction, background.kind, background.motion)
    pairs = list(zip(looks, poses))
    return Duet(
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


def _side_by_side(rng: np.random.Generator) -> list[Look]:
    """Two looks in one style, each in its half of the picture, smaller than one alone."""
    left, right = sample_look(rng), sample_look(rng)
    while right.style != left.style:
        right = sample_look(rng)
    return [
        dataclasses.replace(
            look,
            half_height=float(rng.uniform(0.18, 0.21)),
            center_x=float(at + rng.uniform(-0.01, 0.01)),
            center_y=float(rng.uniform(0.48, 0.58)),
        )
        for look, at in ((left, 0.25), (right, 0.75))
    ]


def _take_turns(rng: np.random.Generator, voices: list[Voice], seconds: float, split: str) -> list[Speech]:
    """One speech of `seconds` per voice: one says something, then the other; or both talk throughout."""
    if rng.random() < TOGETHER:
        return [speak(rng, voice, seconds, split) for voice in voices]
    # Turns change at a whole frame.
    turn = round(seconds * FPS * rng.uniform(0.35, 0.65)) / FPS
    first = int(rng.integers(2))
    speeches = [speak(rng, voice, seconds - turn if k == first else turn, split) for k, voice in enumerate(voices)]
    return [_placed(speech, 0.0 if k == first else seconds - turn, seconds) for k, speech in enumerate(speeches)]


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
