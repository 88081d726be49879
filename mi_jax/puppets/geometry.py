"""Polygons that move: the few vector shapes puppets and backgrounds are drawn with, computed for all frames at once.

A polygon is an array [f n 2] (or [1 n 2] when it stands still) of x, y in pictures: (0, 0) is the top left, (1, 1) the
bottom right corner. A `Scene` collects polygons in painter's order and rasterises them at `SUPERSAMPLE` times the
size, area-averaged.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from mi_jax.puppets.looks import RGB

SUPERSAMPLE = 4


def circle(x, y, rx, ry=None, points: int = 20) -> Float[np.ndarray, "f n 2"]:
    """An ellipse around (x, y); x and y may be numbers or arrays over frames."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    unit = np.stack([np.cos(angle) * rx, np.sin(angle) * (rx if ry is None else ry)], -1)
    x, y = np.broadcast_arrays(np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float)))
    return unit[None] + np.stack([x, y], -1)[:, None]


def normals(points: Float[np.ndarray, "f n 2"], closed: bool) -> Float[np.ndarray, "f n 2"]:
    """Unit normals of a curve: to its right when y points down."""
    if closed:
        along = np.roll(points, -1, 1) - np.roll(points, 1, 1)
    else:
        along = np.gradient(points, axis=1)
    along = along / np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-9)
    return np.stack([along[..., 1], -along[..., 0]], -1)


def grow(points: Float[np.ndarray, "f n 2"], by: float) -> Float[np.ndarray, "f n 2"]:
    """A closed polygon moved outward along its normals, whichever way round it runs."""
    following = np.roll(points, -1, 1)
    area = np.sum(points[..., 0] * following[..., 1] - following[..., 0] * points[..., 1], axis=1)
    return points + np.sign(area)[:, None, None] * by * normals(points, closed=True)


def ribbon(points: Float[np.ndarray, "f n 2"], width, closed: bool = False) -> Float[np.ndarray, "f m 2"]:
    """A line of the given width (a number or one per point) as a polygon."""
    half = np.broadcast_to(np.asarray(width, float) / 2, points.shape[1:2])[None, :, None]
    side = normals(points, closed) * half
    left, right = points + side, points - side
    if closed:
        left, right = np.concatenate([left, left[:, :1]], 1), np.concatenate([right, right[:, :1]], 1)
    return np.concatenate([left, right[:, ::-1]], 1)


class Scene:
    """Polygons in the order they are painted, over one still picture."""

    def __init__(self, frames: int):
        self.frames = frames
        self.shapes: list[tuple[np.ndarray, RGB]] = []

    def add(self, points: Float[np.ndarray, "f n 2"], fill: RGB, outline: float = 0.0, ink: RGB = (0, 0, 0)) -> None:
        """Paint a polygon, with an outline of the given width around it."""
        if outline > 0:
            self.shapes.append((grow(points, outline), ink))
        self.shapes.append((points, fill))

    def render(self, base: Image.Image, size: int) -> UInt8[np.ndarray, "f size size 3"]:
        """All frames over `base`, a picture of SUPERSAMPLE * size pixels a side."""
        side = SUPERSAMPLE * size
        lists = []
        for points, fill in self.shapes:
            # Pillow cuts coordinates off to whole pixels; half a pixel keeps them centred.
            flat = np.rint(points * side).astype(np.int32).reshape(len(points), -1).tolist()
            lists.append((flat if len(flat) > 1 else flat * self.frames, fill))
        video = np.empty((self.frames, size, size, 3), np.uint8)
        for index in range(self.frames):
            picture = base.copy()
            paint = ImageDraw.Draw(picture).polygon
            for flat, fill in lists:
                paint(flat[index], fill)
            video[index] = np.asarray(picture.reduce(SUPERSAMPLE))
        return video
