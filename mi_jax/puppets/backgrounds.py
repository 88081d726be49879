"""What stands, drifts, falls or rises behind a puppet."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from mi_jax.puppets.geometry import SUPERSAMPLE, Scene, circle
from mi_jax.puppets.looks import INK, PAPER, RGB, mix

MOTIONS = ("still", "left", "right", "down", "up")
VELOCITY = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "down": (0, 1), "up": (0, -1)}

# what can be seen: the motions it can make
KINDS: dict[str, tuple[str, ...]] = {
    "clouds": ("still", "left", "right"),
    "stars": ("still", "left", "right"),
    "snow": ("still", "down"),
    "leaves": ("still", "left", "right", "down"),
    "bubbles": ("still", "up"),
    "balloons": ("still", "left", "right", "up"),
    "waves": ("still", "left", "right"),
    "hills": ("still", "left", "right"),
    "kites": ("still", "left", "right", "up", "down"),
    "dots": ("still", "left", "right", "up", "down"),
    "stripes": ("still",),
    "plain": ("still",),
    "bricks": ("still",),
    "books": ("still",),
}

_MARGIN = 0.25  # movers leave and enter this far outside the picture
_PERIOD = 1 + 2 * _MARGIN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """A background for a whole clip; `layout` seeds the places of its clouds, leaves, books..."""

    kind: str
    motion: str
    speed: float  # pictures per second
    top: RGB
    bottom: RGB
    accent: RGB
    layout: int


_SKIES = {
    "clouds": [
        ((108, 178, 240), (206, 234, 252)),
        ((250, 186, 130), (252, 226, 190)),
        ((132, 206, 226), (226, 246, 240)),
    ],
    "stars": [((18, 22, 62), (52, 58, 120)), ((10, 34, 58), (28, 84, 110)), ((44, 26, 80), (90, 70, 150))],
    "snow": [((92, 122, 170), (150, 178, 214)), ((58, 80, 124), (118, 148, 190)), ((96, 130, 140), (150, 184, 186))],
    "leaves": [
        ((196, 222, 190), (238, 236, 196)),
        ((232, 208, 156), (246, 232, 196)),
        ((170, 206, 226), (232, 240, 226)),
    ],
    "bubbles": [((28, 116, 168), (92, 196, 216)), ((20, 90, 120), (60, 160, 150))],
    "balloons": [((140, 200, 244), (222, 240, 250)), ((250, 222, 160), (252, 244, 214))],
    "waves": [((150, 206, 240), (226, 240, 244)), ((252, 200, 140), (254, 232, 190))],
    "hills": [((140, 200, 244), (226, 242, 250)), ((250, 206, 150), (252, 234, 200))],
    "kites": [((96, 170, 226), (200, 230, 246)), ((70, 140, 150), (170, 210, 196)), ((60, 90, 150), (150, 180, 216))],
    "dots": [((90, 160, 170), (90, 160, 170)), ((236, 196, 110), (236, 196, 110)), ((120, 130, 190), (120, 130, 190))],
    "stripes": [
        ((206, 214, 190), (206, 214, 190)),
        ((170, 190, 214), (170, 190, 214)),
        ((240, 220, 180), (240, 220, 180)),
    ],
    "plain": [
        ((190, 206, 214), (230, 236, 236)),
        ((222, 204, 170), (244, 236, 214)),
        ((120, 150, 150), (180, 206, 196)),
        ((96, 100, 130), (150, 156, 180)),
    ],
    "bricks": [((188, 120, 84), (188, 120, 84)), ((170, 170, 166), (170, 170, 166))],
    "books": [((110, 78, 50), (110, 78, 50))],
}
_BRIGHT: tuple[RGB, ...] = (
    (222, 70, 40), (244, 180, 40), (60, 120, 200), (70, 160, 90), (240, 240, 236), (64, 84, 172), (40, 160, 170),
)  # fmt: skip


def sample_background(rng: np.random.Generator, plain_paper: bool) -> Background:
    """A random background; `plain_paper` tints it like a drawing on paper."""
    motion = MOTIONS[int(rng.choice(5, p=(0.3, 0.23, 0.23, 0.12, 0.12)))]
    kinds = [k for k, moves in KINDS.items() if motion in moves]
    kind = kinds[int(rng.integers(len(kinds)))]
    top, bottom = _SKIES[kind][int(rng.integers(len(_SKIES[kind])))]
    if plain_paper:
        top, bottom = mix(top, PAPER, 0.66), mix(bottom, PAPER, 0.66)
    accent = _BRIGHT[int(rng.integers(len(_BRIGHT)))]
    return Background(
        kind=kind, motion=motion, speed=0.0 if motion == "still" else float(rng.uniform(0.15, 0.2)), top=top,
        bottom=bottom,
        accent=accent, layout=int(rng.integers(2**31)),
    )  # fmt: skip


def base_picture(background: Background, size: int, paper: bool) -> Image.Image:
    """The part of the background that never moves, SUPERSAMPLE * size pixels a side."""
    side = SUPERSAMPLE * size
    blend = np.linspace(0, 1, side)[:, None]
    column = np.asarray(background.top) * (1 - blend) + np.asarray(background.bottom) * blend
    pixels = np.broadcast_to(np.rint(column).astype(np.uint8)[:, None], (side, side, 3))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    paint = ImageDraw.Draw(picture)
    rng = np.random.default_rng(background.layout)
    if background.kind == "stripes":
        count = int(rng.integers(5, 10))
        for k in range(count):
            paint.rectangle(
                (side * k // count, 0, side * (2 * k + 1) // (2 * count), side),
                mix(background.top, (255, 255, 255), 0.4),
            )
    elif background.kind == "bricks":
        rows = int(rng.integers(7, 11))
        for row in range(rows):
            for column in range(-1, 6):
                tint = mix(background.top, (60, 50, 50), rng.uniform(0, 0.18))
                left, top = (column + row % 2 / 2) * side / 5, row * side / rows
                paint.rectangle((left + side / 110, top + side / 110, left + side / 5, top + side / rows), tint)
    elif background.kind == "books":
        shelves = int(rng.integers(3, 5))
        for shelf in range(shelves):
            x, floor = side * 0.01, (shelf + 1) * side / shelves - side * 0.025
            while x < side:
                width, height = rng.uniform(0.03, 0.07) * side, rng.uniform(0.62, 0.88) * side / shelves
                colour = mix(_BRIGHT[int(rng.integers(5))], (84, 78, 60), rng.uniform(0.2, 0.55))
                colour = mix(colour, PAPER, 0.6) if paper else colour
                paint.rectangle((x, floor - height, x + width - side * 0.006, floor), colour)
                x += width
    return picture


def _wrapped(start: np.ndarray, speed: float, time: np.ndarray) -> np.ndarray:
    """Places [f n] along one axis that leave the picture on one side and come back on the other."""
    return (start[None] + speed * time[:, None] + _MARGIN) % _PERIOD - _MARGIN


def _blob(rng: np.random.Generator, bumps: int) -> np.ndarray:
    """A cloud: [n 2], about 2 wide and 1 high, flat below."""
    angle = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    radius = 0.82 + 0.26 * np.abs(np.sin(bumps / 2 * angle + rng.uniform(0, np.pi)))
    x, y = np.cos(angle) * radius, np.sin(angle) * radius * 0.62
    return np.stack([x, np.minimum(y, 0.22)], -1)


def _star(points: int, inner: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False) - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None]


_LEAF = np.array(
    [(-1, 0), (-0.45, -0.42), (0.1, -0.5), (0.6, -0.3), (1, 0), (1.35, 0.05), (0.6, 0.3), (0.1, 0.5), (-0.45, 0.42)]
)
_KITE = np.array([(0, -1.1), (0.75, -0.15), (0.06, 1), (0.3, 1.5), (0.1, 1.5), (-0.06, 1), (-0.75, -0.15)])


def _scatter(rng: np.random.Generator, across: int, down: int) -> tuple[np.ndarray, np.ndarray]:
    """Jittered grid over the wrapped plane: no heaps and no holes."""
    gx, gy = np.meshgrid(np.arange(across), np.arange(down))
    x = (gx + 0.5 * (gy % 2) + rng.uniform(0.1, 0.6, gx.shape)) / across * _PERIOD - _MARGIN
    y = (gy + rng.uniform(0.1, 0.9, gy.shape)) / down * _PERIOD - _MARGIN
    return x.ravel(), y.ravel()


def add_movers(scene: Scene, background: Background, time: np.ndarray, paper: bool) -> None:
    """Paint the moving (or resting) part of the background at the times given in seconds [f]."""
    if background.kind in ("stripes", "plain", "bricks", "books"):
        return
    rng = np.random.default_rng(background.layout)
    vx, vy = (v * background.speed for v in VELOCITY[background.motion])
    outline, ink = (0.009, mix(INK, PAPER, 0.25)) if paper else (0.0, INK)

    def tint(colour: RGB) -> RGB:
        return mix(colour, PAPER, 0.4) if paper else colour

    if background.kind in ("waves", "hills"):
        _add_bands(scene, background, time, vx, rng, tint, outline, ink)
        return
    kind = background.kind
    across, down = {
        "clouds": (3, 5), "stars": (7, 7), "snow": (6, 6), "leaves": (5, 5), "bubbles": (5, 5), "balloons": (5, 5),
        "kites": (5, 6), "dots": (6, 6),
    }[kind]  # fmt: skip
    x0, y0 = _scatter(rng, across, down)
    x, y = _wrapped(x0, vx, time), _wrapped(y0, vy, time)
    for k in range(len(x0)):
        phase, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.25)
        px, py = x[:, k], y[:, k]
        if kind == "clouds":
            shape, colour = (
                _blob(rng, int(rng.integers(5, 8))) * 0.12 * scale,
                mix((255, 255, 255), background.bottom, 0.1),
            )
        elif kind == "stars":
            shape, colour = (
                _star(4 if k % 2 else 5, 0.42) * 0.031 * scale,
                mix((255, 244, 190), background.top, rng.uniform(0, 0.3)),
            )
        elif kind == "snow":
            shape, colour = _star(6, 0.72) * 0.03 * scale, (250, 252, 255)
        elif kind == "leaves":
            shape = _LEAF * 0.05 * scale
            colour = [(206, 90, 30), (226, 150, 40), (120, 150, 50), (176, 64, 30)][int(rng.integers(4))]
        elif kind == "bubbles":
            shape, colour = circle(0, 0, 0.036 * scale)[0], mix(background.bottom, (255, 255, 255), 0.55)
        elif kind == "balloons":
            shape, colour = circle(0, 0, 0.052 * scale, 0.064 * scale)[0], _BRIGHT[int(rng.integers(len(_BRIGHT)))]
        elif kind == "kites":
            shape, colour = _KITE * 0.058 * scale, _BRIGHT[int(rng.integers(5))]
        else:
            shape, colour = circle(0, 0, 0.04)[0], background.accent
        points = shape[None] + np.stack([px, py], -1)[:, None]
        if kind == "leaves":
            turn = phase + (0.9 * np.sin(2.2 * time + phase) if background.motion != "still" else np.zeros_like(time))
            c, s = np.cos(turn)[:, None], np.sin(turn)[:, None]
            points = np.stack([shape[:, 0] * c - shape[:, 1] * s, shape[:, 0] * s + shape[:, 1] * c], -1)
            points = points + np.stack([px, py], -1)[:, None]
        if kind == "balloons":
            string = np.array([(-0.004, 0.05), (0.004, 0.05), (0.004, 0.12), (-0.004, 0.12)]) * scale
            scene.add(string[None] + np.stack([px, py], -1)[:, None], mix(INK, background.top, 0.4))
        scene.add(points, tint(colour), outline, ink)
        if kind in ("bubbles", "balloons"):
            scene.add(circle(px - 0.014 * scale, py - 0.018 * scale, 0.011 * scale, points=8), (255, 255, 255))
        if kind == "kites":
            half = np.array([(0, -1.1), (0.75, -0.15), (0, 0.98)]) * 0.058 * scale
            scene.add(half[None] + np.stack([px, py], -1)[:, None], tint(mix(colour, (255, 255, 255), 0.45)))


def _add_bands(scene, background, time, vx, rng, tint, outline, ink) -> None:
    """Waves of a sea, or hills with trees, in bands one before the other."""
    sea = background.kind == "waves"
    colours = (
        [(60, 150, 200), (40, 120, 180), (26, 92, 150)] if sea else [(150, 196, 110), (110, 170, 90), (76, 138, 74)]
    )
    lines = (0.3, 0.5, 0.7) if sea else (0.34, 0.55, 0.78)
    x = np.linspace(-0.05, 1.05, 56)
    for line, colour in zip(lines, colours):
        # Whole numbers of waves in one period, so that the band repeats seamlessly.
        counts = np.array([5, 8]) if sea else np.array([2, 5])
        sizes = np.array([0.034, 0.014]) if sea else np.array([0.06, 0.02])
        phase = rng.uniform(0, 2 * np.pi, 2)

        def height(at, line=line, counts=counts, sizes=sizes, phase=phase):
            angle = 2 * np.pi * counts * at[..., None] / _PERIOD + phase
            crest = -np.abs(np.sin(angle / 2)) * 2 + 1 if sea else np.sin(angle)
            return line + np.sum(sizes * crest, -1)

        top = height(x[None] - vx * time[:, None])
        ground = np.concatenate([np.broadcast_to(x, top.shape), np.full((len(time), 2), (1.05, -0.05))], 1)
        points = np.stack([ground, np.concatenate([top, np.full((len(time), 2), 1.05)], 1)], -1)
        scene.add(points, tint(colour), outline, ink)
        if sea:
            crest = np.stack([np.broadcast_to(x, top.shape), top], -1)
            foam = np.concatenate([crest, crest[:, ::-1] + (0, 0.014)], 1)
            scene.add(foam, tint(mix(colour, (255, 255, 255), 0.6)))
        # Whitecaps and bushes: marks all over, so that a little of the band is enough to see it move.
        marks_x, marks_y = rng.uniform(-_MARGIN, 1 + _MARGIN, 9), rng.uniform(0.03, 0.19, 9)
        for px, depth in zip(_wrapped(marks_x, vx, time).T, marks_y):
            size = (0.032, 0.007) if sea else (0.02, 0.014)
            fill = mix(colour, (255, 255, 255), 0.7) if sea else mix(colour, (30, 90, 40), 0.35)
            scene.add(circle(px, height(px - vx * time) + depth, *size, points=10), tint(fill))
        if sea:
            continue
        for _ in range(5):
            start, scale = rng.uniform(-_MARGIN, 1 + _MARGIN, 1), rng.uniform(0.8, 1.3)
            px = _wrapped(start, vx, time)[:, 0]
            foot = height(px - vx * time) + 0.02
            trunk = np.array([(-0.008, 0), (0.008, 0), (0.008, -0.06), (-0.008, -0.06)]) * scale
            crown = np.array([(-0.045, -0.04), (0.045, -0.04), (0, -0.17)]) * scale
            at = np.stack([px, foot], -1)[:, None]
            scene.add(trunk[None] + at, tint((110, 76, 50)))
            scene.add(crown[None] + at, tint(mix(colour, (20, 70, 40), 0.55)), outline, ink)
