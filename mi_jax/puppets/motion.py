"""How a puppet moves: expression, head motion, blinking and gaze as tracks over the frames of a clip.

Frame 0 is always at rest with a neutral face, so a portrait does not give away what follows: expression and head
motion ease in over `EASE` seconds, and head motion is a sine that starts at phase 0.
"""

import dataclasses

import numpy as np

from mi_jax.puppets.head import Pose

EXPRESSIONS = ("neutral", "happy", "sad", "angry", "surprised")
HEAD_MOTIONS = ("still", "turning", "nodding", "tilting")
TEMPOS = ("slow", "medium", "quick")
EASE = 0.4

_PERIODS = {"slow": (2.15, 2.45), "medium": (1.65, 1.85), "quick": (1.2, 1.35)}

# corners, width factor, upper lid, lower lid, brow raise, brow slant
_FACES: dict[str, tuple[float, float, float, float, float, float]] = {
    "neutral": (0.0, 1.0, 1.0, 1.0, 0.0, 0.0),
    "happy": (0.12, 1.16, 0.95, 0.45, 0.05, 0.02),
    "sad": (-0.11, 0.92, 0.68, 0.95, 0.02, 0.15),
    "angry": (-0.06, 0.98, 0.62, 0.7, -0.06, -0.17),
    "surprised": (0.0, 0.84, 1.32, 1.12, 0.17, 0.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """What a clip is told to do."""

    expression: str
    head_motion: str
    tempo: str
    period: float  # of the head motion, seconds
    amplitude: float  # radians


def sample_direction(rng: np.random.Generator) -> Direction:
    """A random direction."""
    expression = EXPRESSIONS[int(rng.integers(len(EXPRESSIONS)))]
    motion = HEAD_MOTIONS[int(rng.choice(4, p=(0.28, 0.24, 0.24, 0.24)))]
    tempo = TEMPOS[int(rng.integers(len(TEMPOS)))]
    low, high = {"still": (0.0, 0.0), "turning": (0.34, 0.4), "nodding": (0.24, 0.29), "tilting": (0.17, 0.21)}[motion]
    return Direction(
        expression=expression, head_motion=motion, tempo=tempo, period=float(rng.uniform(*_PERIODS[tempo])),
        amplitude=float(rng.uniform(low, high)),
    )  # fmt: skip


def _wander(rng: np.random.Generator, time: np.ndarray, size: float) -> np.ndarray:
    """Smooth noise [f] that is 0 at time 0: three slow sines."""
    total = np.zeros_like(time)
    for _ in range(3):
        period, phase = rng.uniform(2.2, 6.0), rng.uniform(0, 2 * np.pi)
        total += np.sin(2 * np.pi * time / period + phase) - np.sin(phase)
    return size * total / 3


def _blinks(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """How far the lids are closed by blinking [f], 0..1."""
    closed = np.zeros_like(time)
    at = rng.uniform(0.7, 3.0)
    while at < time[-1]:
        closed = np.maximum(closed, np.clip(1.25 - np.abs(time - at) / 0.09, 0, 1))
        at += rng.uniform(1.6, 4.2)
    return closed


def compose(
    expression: str,
    strength,
    yaw,
    pitch,
    roll,
    mouth: tuple[np.ndarray, np.ndarray, np.ndarray],
    closed=0.0,
    drift=(0.0, 0.0),
    gaze=(0.0, 0.0),
) -> Pose:
    """A pose from its parts, each [f] or a number.

    An expression at a strength of 0..1, the angles of the head, the mouth (opening, width factor, roundness), blinking
    (0 open .. 1 closed), small shifts of the head and of the gaze.
    """
    opening, wide, round_ = mouth
    one = np.ones(len(opening))
    corners, width, upper, lower, brow_raise, brow_slant = _FACES[expression]
    lid_upper, lid_lower = 1 + (upper - 1) * strength * one, 1 + (lower - 1) * strength * one
    return Pose(
        yaw=yaw * one,
        pitch=pitch * one,
        roll=roll * one,
        shift_x=(0.12 * yaw + drift[0]) * one,
        shift_y=(0.22 * pitch + drift[1]) * one,
        mouth_open=opening,
        mouth_wide=wide * (1 + (width - 1) * strength),
        mouth_round=np.clip(round_, 0, 1),
        corners=corners * strength * one,
        lid_upper=lid_upper - (lid_upper + lid_lower) * closed,
        lid_lower=lid_lower,
        brow_raise=brow_raise * strength * one - 0.02 * closed,
        brow_slant=brow_slant * strength * one,
        # Eyes stay on the viewer: they turn against the head.
        gaze_x=np.clip(-1.1 * np.sin(yaw) + gaze[0], -1, 1) * one,
        gaze_y=np.clip(-1.2 * np.sin(pitch) + gaze[1], -1, 1) * one,
    )


def move(rng: np.random.Generator, direction: Direction, mouth: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Pose:
    """The pose of every frame; `mouth` is what `puppet_speech.mouth_track` returns."""
    time = np.arange(len(mouth[0])) / 25
    ease = np.clip(time / EASE, 0, 1)
    ease = ease * ease * (3 - 2 * ease)
    swing = ease * direction.amplitude * np.sin(2 * np.pi * time / direction.period)
    yaw, pitch, roll = (
        swing * (direction.head_motion == motion) + _wander(rng, time, size)
        for motion, size in (("turning", 0.03), ("nodding", 0.02), ("tilting", 0.012))
    )
    drift = _wander(rng, time, 0.018), _wander(rng, time, 0.012)
    gaze = _wander(rng, time, 0.25), _wander(rng, time, 0.2)
    return compose(direction.expression, ease, yaw, pitch, roll, mouth, _blinks(rng, time), drift, gaze)
