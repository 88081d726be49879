"""The head of a puppet as a solid: where a point of the face is seen when the head turns, nods, tilts and moves.

The head is an ellipsoid seen from the front. Features lie on its surface, so a turn or a nod moves them over the face
by their depth while the outline of the head stays; lengths are in half face heights, x to the right, y down, chin at
y = 1.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from mi_jax.puppets.looks import INK, RGB, Look, mix

_DEPTH = 0.8  # of the ellipsoid
_PIVOT = 1.15  # the neck, about which the head tilts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pose:
    """Movement, one number per frame [f]. Angles in radians; positive yaw turns to the right of the picture."""

    yaw: np.ndarray
    pitch: np.ndarray  # positive: looks down
    roll: np.ndarray  # positive: clockwise
    shift_x: np.ndarray  # half face heights
    shift_y: np.ndarray
    mouth_open: np.ndarray  # 0..1
    mouth_wide: np.ndarray  # factor of the resting width
    mouth_round: np.ndarray  # 0 spread .. 1 round
    corners: np.ndarray  # positive: the corners of the mouth rise; half face heights
    lid_upper: np.ndarray  # 1: at rest
    lid_lower: np.ndarray
    brow_raise: np.ndarray
    brow_slant: np.ndarray  # positive: inner ends rise
    gaze_x: np.ndarray  # -1..1
    gaze_y: np.ndarray

    def __getitem__(self, frames: slice) -> "Pose":
        return Pose(**{f.name: getattr(self, f.name)[frames] for f in dataclasses.fields(self)})


class Head:
    """Projects points given in head coordinates into the picture, for all frames of a pose."""

    def __init__(self, look: Look, pose: Pose):
        self.look, self.pose = look, pose
        self.frames = len(pose.yaw)
        self._sin_yaw, self._cos_yaw = np.sin(pose.yaw)[:, None], np.cos(pose.yaw)[:, None]
        self._sin_pitch, self._cos_pitch = np.sin(pose.pitch)[:, None], np.cos(pose.pitch)[:, None]

    def place(self, x: np.ndarray, y: np.ndarray, roll: float = 1.0) -> Float[np.ndarray, "f n 2"]:
        """Head plane to picture: tilt about the neck, move, scale. `roll` below 1 follows the tilt in part only."""
        look, pose = self.look, self.pose
        angle = roll * pose.roll[:, None]
        c, s = np.cos(angle), np.sin(angle)
        y = y - _PIVOT
        px = x * c - y * s + pose.shift_x[:, None]
        py = x * s + y * c + _PIVOT + pose.shift_y[:, None]
        return np.stack([look.center_x + px * look.half_height, look.center_y + py * look.half_height], -1)

    def surface(self, x, y, lift: float = 1.0) -> Float[np.ndarray, "f n 2"]:
        """Points [n] or [f n] on the face; `lift` above 1 floats over the skin (glasses)."""
        x, y = np.atleast_2d(np.asarray(x, float)), np.atleast_2d(np.asarray(y, float))
        z = lift * _DEPTH * np.sqrt(np.maximum(0.0, 1 - (x / (1.03 * self.look.half_width)) ** 2 - (y / 1.08) ** 2))
        return self.solid(x, y, z)

    def solid(self, x, y, z) -> Float[np.ndarray, "f n 2"]:
        """Points at a depth of their own: positive is in front of the middle of the head."""
        x, y, z = (np.atleast_2d(np.asarray(v, float)) for v in (x, y, z))
        px = x * self._cos_yaw + z * self._sin_yaw
        pz = z * self._cos_yaw - x * self._sin_yaw
        return self.place(px, y * self._cos_pitch + pz * self._sin_pitch)

    def rim(self, x, y) -> Float[np.ndarray, "f n 2"]:
        """Points of the outline: it hardly changes under a turn, only the jaw leads."""
        x, y = np.atleast_2d(np.asarray(x, float)), np.atleast_2d(np.asarray(y, float))
        jaw = np.clip(y - 0.1, 0, None)
        drop = 0.07 * self.pose.mouth_open[:, None] * np.clip(y - 0.3, 0, None)
        return self.place(x + 0.26 * self._sin_yaw * jaw, y + drop + 0.16 * self._sin_pitch * (0.3 + y))

    def outline(self, scale: float = 1.0, to_x: float = 0.0, to_y: float = 0.0) -> Float[np.ndarray, "f n 2"]:
        """The outline of the head, shrunk towards a point."""
        x, y = head_outline(self.look)
        return self.rim(to_x + (x - to_x) * scale, to_y + (y - to_y) * scale)

    def ink(self, fill: RGB) -> RGB:
        return INK if self.look.style == "line drawing" else mix(fill, (30, 22, 34), 0.68)


def head_outline(look: Look, points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """The outline of a resting head in head coordinates."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    power = np.where(s > 0, look.jaw_power, look.top_power)
    x, y = np.sign(c) * np.abs(c) ** (2 / power), np.sign(s) * np.abs(s) ** (2 / power)
    x = x * (1 - look.taper * np.clip(y, 0, None) ** 1.5) * (1 + look.cheeks * np.exp(-(((y - 0.38) / 0.3) ** 2)))
    return look.half_width * x, y


def face_polygon(look: Look, pose: Pose) -> Float[np.ndarray, "f n 2"]:
    """The outline of the face in every frame, a little enlarged: the region that the face mask unites."""
    return Head(look, pose).outline(1.06)


def oval(x, y, rx, ry, points: int = 20) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return x + rx * np.cos(angle), y + ry * np.sin(angle)
