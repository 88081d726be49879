"""Reads from the pixels of a puppet video what the truth files say: mouth, expression, head and background motion.

Everything here takes a video uint8 [f H W 3] and the `attributes` of the clip whose portrait it was made from. Of
these only the puppet's looks are used (where its face is, its colours, how it is drawn), never the true video nor what
it was told to do, so that a generated video is read exactly as a true one. A head is read by drawing: the puppet is
redrawn at many angles and in every expression, and each frame is compared with all of them.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from mi_jax.puppets.drawing import add_puppet
from mi_jax.puppets.face import mouth_truth
from mi_jax.puppets.geometry import SUPERSAMPLE, Scene
from mi_jax.puppets.head import Pose, face_polygon
from mi_jax.puppets.looks import MOUTH, Look, mix
from mi_jax.puppets.motion import EXPRESSIONS, compose

Video = UInt8[np.ndarray, "f h w 3"]


def puppet_look(attributes: dict) -> Look:
    """The look of a clip from its attributes (also when read back from json)."""
    look = attributes["look"]
    return Look(**{k: tuple(v) if isinstance(v, list) else v for k, v in look.items()})


# --- mouth ---


def mouth_opening(video: Video, attributes: dict) -> Float[np.ndarray, "f"]:
    """Height of the mouth's interior in each frame, as a fraction of the picture's height.

    Each pixel is unmixed into mouth colour against the puppet's own skin and lip colours; the opening is the column
    sum at the middle of the mouth. Soft edges (resampling, blur) keep their share.
    """
    look = puppet_look(attributes)
    frames, height, width, _ = video.shape
    left, right = (round(width * np.clip(look.center_x + s * 0.8 * look.half_height, 0, 1)) for s in (-1, 1))
    top, bottom = (round(height * np.clip(look.center_y + s * look.half_height, 0, 1)) for s in (0.12, 1.1))
    box = video[:, top:bottom, left:right].astype(np.float32)
    share = _mouth_share(box, look)
    # Where the mouth is: the centre of the mouth colour, from open frames to closed ones by weighted averaging in
    # time.
    columns, rows = np.arange(share.shape[2]), np.arange(share.shape[1])
    rest_x, rest_y = look.center_x * width - left, (look.center_y + look.mouth_y * look.half_height) * height - top
    prior_x = np.exp(-0.5 * ((columns - rest_x) / (0.3 * look.half_height * width)) ** 2)
    prior_y = np.exp(-0.5 * ((rows - rest_y) / (0.25 * look.half_height * height)) ** 2)
    likely = share * (prior_y[:, None] * prior_x).astype(np.float32)
    mass = likely.sum((1, 2))
    near = np.exp(-0.5 * ((np.arange(frames)[:, None] - np.arange(frames)) / 1.5) ** 2) * mass**2
    doubt = (0.012 * width) ** 4  # a shut mouth is looked for where it rests
    total = near.sum(1) + doubt
    center_x = (near @ (likely.sum(1) @ columns / (mass + 1e-6)) + doubt * rest_x) / total
    center_y = (near @ (likely.sum(2) @ rows / (mass + 1e-6)) + doubt * rest_y) / total
    half = 0.33 * look.mouth_width * look.half_height * width
    reach = 0.24 * look.half_height * height + 2
    across = np.clip(half + 0.5 - np.abs(columns - center_x[:, None]), 0, 1)
    along = np.abs(rows - center_y[:, None]) <= reach
    sums = np.einsum("frc,fr->fc", share, along.astype(np.float32))
    return (sums * across).sum(1) / across.sum(1) / height


def _mouth_share(pixels: Float[np.ndarray, "f h w 3"], look: Look) -> Float[np.ndarray, "f h w"]:
    """The share 0..1 of mouth colour in each pixel."""
    around = [look.skin, look.lip, mix(look.lip, (70, 24, 30), 0.62), mix(look.skin, (88, 40, 60), 0.25),
              mix(look.skin, (255, 250, 235), 0.3)]  # fmt: skip
    weights = np.array([1.0, 1.0, 0.5, 0.4, 0.4, 1.5])
    colours = np.array([*around, MOUTH], np.float64) / 255
    design = np.concatenate([colours, np.ones((len(colours), 1))], 1) * weights[:, None]
    # Ridge: the affine function of RGB that is 1 on mouth colour and 0 on what surrounds it, without huge gains.
    gain = np.linalg.solve(
        design.T @ design + np.diag([0.003, 0.003, 0.003, 1e-6]),
        design.T @ (weights * np.array([0.0] * len(around) + [1.0])),
    ).astype(np.float32)
    share = np.clip(pixels / 255 @ gain[:3] + gain[3], 0, 1)
    # Dark hair and clothes can look alike along that direction; the hue tells: more red than blue, more blue than
    # green.
    hue = _wine(pixels)
    least = max(10.0, _wine(np.array(look.lip, np.float32)) + 8, _wine(np.array(look.skin, np.float32)) + 8)
    return share * _widened(hue > least)


def _wine(rgb):
    """How much of the mouth's own hue a colour has: 74 on the mouth itself, below about 20 everywhere else."""
    rgb = np.asarray(rgb, np.float32)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.minimum(red, blue) - green - np.maximum(0, blue - red)


def _widened(mask: Bool[np.ndarray, "f h w"]) -> Bool[np.ndarray, "f h w"]:
    """A mask and the pixels above, below and beside it."""
    wide = mask.copy()
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    wide[:, :, 1:] |= mask[:, :, :-1]
    wide[:, :, :-1] |= mask[:, :, 1:]
    return wide


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one of the two does not vary."""
    a, b = np.asarray(a, np.float64) - np.mean(a), np.asarray(b, np.float64) - np.mean(b)
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 1e-12 else 0.0


def sync_offset(measured: np.ndarray, true: np.ndarray, reach: int = 10) -> int:
    """Frames by which the measured track comes late (positive) or early: the lag of the largest correlation."""

    def at(lag: int) -> float:
        if lag >= 0:
            return correlation(measured[lag:], true[: len(true) - lag])
        return correlation(measured[:lag], true[-lag:])

    return max(range(-reach, reach + 1), key=lambda lag: (at(lag), -abs(lag)))


# --- head: read by redrawing ---

_FAMILIES = {
    "turning": np.linspace(-0.5, 0.5, 17),
    "nodding": np.linspace(-0.36, 0.36, 13),
    "tilting": np.linspace(-0.27, 0.27, 13),
}
# Swings (standard deviation, radians) below these count as still; what wanders by itself stays below a third of them.
_STILL = {"turning": 0.1, "nodding": 0.075, "tilting": 0.05}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadReading:
    """What a head does: its motion, its expression, the angle read in each frame [f] (of the motion that fits best),
    and how far the frames are from the puppet as redrawn (mean absolute difference, 0..1).
    """

    motion: str
    expression: str
    angle: np.ndarray
    distance: float


def _redraw(look: Look, pose: Pose, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A puppet alone: pictures f32 [n H W 3] in 0..1 and its face f32 [n H W] (1 inside)."""
    count = len(pose.yaw)
    scene = Scene(count)
    add_puppet(scene, look, pose)
    base = Image.new("RGB", (SUPERSAMPLE * size,) * 2, mix(look.skin, (128, 128, 128), 0.5))
    mask = Scene(count)
    mask.add(face_polygon(look, pose), (255, 255, 255))
    black = Image.new("RGB", (SUPERSAMPLE * size,) * 2)
    return scene.render(base, size).astype(np.float32) / 255, mask.render(black, size)[..., 0].astype(np.float32) / 255


@functools.lru_cache(maxsize=4)
def _templates(look: Look, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The upper face redrawn in every expression at every angle, n = expressions x angles of all motions in order:
    pictures [n p 3] and weights [n p] over the pixels of the upper face, and which pixels those are, bool [H W].
    """
    poses = []
    for expression in EXPRESSIONS:
        for motion, angles in _FAMILIES.items():
            for angle in angles:
                turn = {m: (angle if m == motion else 0.0) for m in _FAMILIES}
                rest = np.full(1, 0.15), np.ones(1), np.full(1, 0.2)
                poses.append(compose(expression, 1.0, turn["turning"], turn["nodding"], turn["tilting"], rest))
    pose = Pose(**{f.name: np.concatenate([getattr(p, f.name) for p in poses]) for f in dataclasses.fields(Pose)})
    pictures, faces = _redraw(look, pose, size)
    center = mouth_truth(look, pose)[:, 2:] * size  # the mouth does as the voice says: leave it out
    y, x = np.mgrid[:size, :size] + 0.5
    away = np.hypot(x - center[:, 0, None, None], (y - center[:, 1, None, None]) * 1.2) > 0.42 * look.half_height * size
    low = y[None] < (look.center_y + 0.62 * look.half_height) * size
    weights = faces * away * low
    used = weights.max(0) > 0
    return pictures[:, used], weights[:, used], used


def read_head(video: Video, attributes: dict, *, first: int = 10, every: int = 2) -> HeadReading:
    """Read expression and head motion, from frame `first` on (the portrait is at rest, the direction eases in)."""
    look = puppet_look(attributes)
    pictures, weights, used = _templates(look, video.shape[1])
    frames = video[min(first, len(video) - 1) :: every][:, used].astype(np.float32) / 255
    # mean over the template's own pixels of (frame - template)^2, expanded into matrix products
    square = np.einsum("fpc,fpc->fp", frames, frames) @ weights.T
    cross = frames.reshape(len(frames), -1) @ (pictures * weights[..., None]).reshape(len(pictures), -1).T
    own = np.einsum("np,npc->n", weights, pictures**2)
    error = ((square - 2 * cross + own) / (3 * weights.sum(1))).reshape(len(frames), len(EXPRESSIONS), -1)
    error = np.sqrt(np.maximum(error, 0))
    best = int(error.min(2).mean(0).argmin())
    error, start, readings = error[:, best], 0, []
    for motion, angles in _FAMILIES.items():
        part = error[:, start : start + len(angles)]
        start += len(angles)
        readings.append((part.min(1).mean(), motion, angles[part.argmin(1)]))
    distance, motion, angle = min(readings, key=lambda reading: reading[0])
    still = angle.std() < _STILL[motion]
    return HeadReading(
        motion="still" if still else motion,
        expression=EXPRESSIONS[best],
        angle=angle.astype(np.float32),
        distance=float(distance),
    )


# --- background ---


def background_motion(video: Video, attributes: dict, *, gap: int = 8) -> str:
    """Where the picture around the puppet moves: "still", "left", "right", "up" or "down".

    Frames `gap` apart are compared under shifts along both axes; the shift that explains them best wins, if it is
    clearly better than none.
    """
    look = puppet_look(attributes)
    size = video.shape[1]
    free = _around(look, size)
    gap = min(gap, len(video) - 1)
    # A sky stands still while clouds drift before it: its gradient is what each row has in common.
    rows = [np.median(video[::4, y][:, free[y]], (0, 1)) if free[y].any() else np.zeros(3) for y in range(size)]
    movers = video.astype(np.float32) - np.stack(rows)[:, None].astype(np.float32)
    earlier, later = movers[:-gap:4], movers[gap::4]
    earlier = earlier[: len(later)]
    most = round(0.28 * size * gap / 25)
    least = max(1, round(0.09 * size * gap / 25))

    def error(dx: int, dy: int) -> float:
        """Mean difference where both the place and the place it came from are free."""
        at = np.s_[max(0, dy) : size + min(0, dy), max(0, dx) : size + min(0, dx)]
        was = np.s_[max(0, -dy) : size + min(0, -dy), max(0, -dx) : size + min(0, -dx)]
        both = free[at] & free[was]
        if both.sum() < 0.02 * size * size:
            return np.inf
        difference = np.abs(later[:, *at][:, both] - earlier[:, *was][:, both]).mean()
        resting = np.abs(later[:, *at][:, both] - earlier[:, *at][:, both]).mean()
        return float((difference + 0.25) / (resting + 0.25))

    ratio = {
        name: min(error(dx * d, dy * d) for d in range(least, most + 1))
        for name, (dx, dy) in {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.items()
    }
    best = min(ratio, key=ratio.get)
    return best if ratio[best] < 0.85 else "still"


@functools.lru_cache(maxsize=4)
def _around(look: Look, size: int) -> Bool[np.ndarray, "h w"]:
    """The pixels that the puppet covers at no angle."""
    turns = {m: np.linspace(a[0], a[-1], 5) * 0.7 for m, a in _FAMILIES.items()}
    count = sum(len(a) for a in turns.values())
    angle = {m: np.zeros(count) for m in turns}
    for k, (motion, values) in enumerate(turns.items()):
        angle[motion][5 * k : 5 * k + 5] = values
    rest = np.zeros(count), np.ones(count), np.zeros(count)
    pose = compose("neutral", 0.0, angle["turning"], angle["nodding"], angle["tilting"], rest)
    scene = Scene(count)
    add_puppet(scene, look, pose)
    side = SUPERSAMPLE * size
    ground = (1, 254, 3)  # a green that nothing is painted in
    pictures = scene.render(Image.new("RGB", (side, side), ground), size)
    return (pictures == np.array(ground, np.uint8)).all((0, 3))


# --- pictures as a whole ---


def sharpness(video: Video, truth: Video) -> float:
    """Mean gradient energy relative to the true video: 1 is as sharp as the truth."""

    def energy(v):
        v = v.astype(np.float32) / 255
        return float((np.diff(v, axis=1) ** 2).mean() + (np.diff(v, axis=2) ** 2).mean())

    return energy(video) / max(1e-9, energy(truth))


def identity(video: Video, portrait: UInt8[np.ndarray, "h w 3"], attributes: dict) -> float:
    """Mean absolute distance (0..1) to the portrait over the puppet at rest, its mouth left out. A moving head raises
    it in the truth as well: compare with the truth's own value.
    """
    look = puppet_look(attributes)
    size = video.shape[1]
    one = np.ones(1)
    pose = compose("neutral", 0.0, 0 * one, 0.0, 0.0, (0 * one, one, 0 * one))
    _, face = _redraw(look, pose, size)
    x, y = mouth_truth(look, pose)[0, 2:] * size
    row, column = np.mgrid[:size, :size] + 0.5
    region = (face[0] > 0.5) & (np.hypot(column - x, row - y) > 0.42 * look.half_height * size)
    difference = np.abs(video[:, region].astype(np.float32) - portrait[region].astype(np.float32))
    return float(difference.mean() / 255)


def obedience(video: Video, attributes: dict) -> dict[str, tuple[str, str]]:
    """For each attribute that a prompt directs: (what was told, what is seen)."""
    head = read_head(video, attributes)
    return {
        "expression": (attributes["expression"], head.expression),
        "head_motion": (attributes["head_motion"], head.motion),
        "background_motion": (attributes["background_motion"], background_motion(video, attributes)),
    }
