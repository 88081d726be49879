"""Draws a puppet: a `Look` (what it is) and a `Pose` (how it moves) become polygons.

The head is an ellipsoid seen from the front. Features lie on its surface, so a turn or a nod moves them over the face
by their depth while the outline of the head stays; lengths are in half face heights, x to the right, y down, chin at y
= 1."""

import dataclasses

import numpy as np
from jaxtyping import Float

from mi_jax.data.puppet_geometry import Scene, ribbon
from mi_jax.data.puppet_hair import add_back_hair, add_front_hair, add_hat
from mi_jax.data.puppet_looks import INK, MOUTH, RGB, Look, luma, mix

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


def add_puppet(scene: Scene, look: Look, pose: Pose) -> None:
    """Paint one puppet, from what lies behind to what lies before."""
    head = Head(look, pose)
    add_back_hair(scene, head)
    _add_body(scene, head)
    _add_ears(scene, head)
    _add_skin(scene, head)
    _add_beard(scene, head)
    _add_nose(scene, head)
    _add_mouth(scene, head)
    add_front_hair(scene, head)
    for side in (-1, 1):
        _add_eye(scene, head, side)
        _add_brow(scene, head, side)
    _add_glasses(scene, head)
    add_hat(scene, head)


def _add_body(scene: Scene, head: Head) -> None:
    look = head.look
    sway = 0.25 * head.pose.shift_x[:, None] + 0.12 * head.pose.roll[:, None]

    def body(x, y):
        x, y = np.atleast_2d(np.asarray(x, float)), np.atleast_2d(np.asarray(y, float))
        px, py = np.broadcast_arrays(
            look.center_x + (x + sway) * look.half_height, look.center_y + y * look.half_height
        )
        return np.stack([px, py], -1)

    wide, neck = look.shoulders, 0.3 + 0.06 * look.half_width
    u = np.linspace(0, 1, 14)
    slope_x = neck + 0.06 + (wide - neck - 0.06) * u**0.8
    slope_y = 1.2 + 0.42 * u**2.2
    x = np.concatenate([-slope_x[::-1], slope_x, [wide + 0.08, -wide - 0.08]])
    y = np.concatenate([slope_y[::-1], slope_y, [4.0, 4.0]])
    colour, accent = look.top_colour, look.top_accent
    if look.style == "line drawing":
        accent = mix(accent, (250, 247, 240), 0.5)
    ink, line = head.ink(colour), look.outline
    line_width = line * look.half_height
    if look.top == "hood":
        scene.add(
            body(0.72 * np.cos(u * np.pi * 2), 1.18 + 0.3 * np.sin(u * np.pi * 2)),
            mix(colour, INK, 0.25),
            line_width,
            ink,
        )
    neck_fill = mix(look.skin, (70, 40, 50), 0.2)
    neck_x, neck_y = [-neck, neck, neck * 1.08, 0, -neck * 1.08], [0.6, 0.6, 1.28, 1.46, 1.28]
    scene.add(body(neck_x, neck_y), neck_fill, line_width, head.ink(look.skin))
    scene.add(body(x, y), colour, line_width, ink)
    if look.style == "shaded painting":
        for k, amount in enumerate((0.06, 0.12)):
            scene.add(
                body(x * (0.86 - 0.16 * k) - 0.1 * look.light * -1, y + 0.05 + 0.07 * k),
                mix(colour, (255, 255, 255), amount),
            )
    if look.top == "striped":
        for k in range(5):
            top = 1.5 + 0.34 * k
            half = min(wide, neck + 0.06 + (wide - neck) * ((top - 1.2) / 0.5) ** 0.6)
            scene.add(body([-half, half, half + 0.04, -half - 0.04], [top, top, top + 0.16, top + 0.16]), accent)
    if look.top == "dotted":
        for row in range(4):
            for column in range(-3, 4):
                at = (column + 0.5 * (row % 2)) * 0.36
                if abs(at) < wide - 0.15:
                    scene.add(body(*_oval(at, 1.68 + 0.3 * row, 0.07, 0.07)), accent)
    if look.top == "scarf":
        v = np.linspace(-1, 1, 16)
        scene.add(
            ribbon(body(0.56 * v, 1.2 + 0.16 * (1 - v**2)), 0.3 * look.half_height),
            accent,
            line_width,
            head.ink(accent),
        )
        scene.add(body([0.12, 0.42, 0.5, 0.2], [1.36, 1.3, 2.2, 2.25]), accent, line_width, head.ink(accent))
        return
    # The neckline: skin showing in a curve or a V.
    v = np.linspace(-1, 1, 14)
    depth = 0.42 if look.top == "v-neck" else 0.2
    curve = 1.2 + depth * ((1 - np.abs(v)) if look.top == "v-neck" else (1 - v**2))
    scene.add(body(np.concatenate([(neck + 0.06) * v]), curve), neck_fill)
    trim = mix(colour, INK, 0.22) if look.top not in ("collar", "bow tie") else accent
    scene.add(ribbon(body((neck + 0.07) * v, curve + 0.01), 0.06 * look.half_height), trim)
    if look.top in ("collar", "bow tie"):
        for side in (-1, 1):
            flap_x, flap_y = [side * (neck + 0.1), side * 0.02, side * 0.26], [1.17, 1.42, 1.58]
            scene.add(body(flap_x, flap_y), accent if look.top == "collar" else (244, 244, 246), line_width, ink)
    if look.top == "bow tie":
        scene.add(
            body([-0.3, 0, 0.3, 0.3, 0, -0.3], [1.33, 1.42, 1.33, 1.59, 1.5, 1.59]),
            accent,
            line_width,
            head.ink(accent),
        )
    if look.top in ("buttons", "collar"):
        scene.add(body([-0.012, 0.012, 0.012, -0.012], [1.45, 1.45, 4, 4]), ink)
        for k in range(3):
            scene.add(body(*_oval(0.09, 1.66 + 0.3 * k, 0.05, 0.05)), accent if look.top == "buttons" else ink)


def _oval(x: float, y: float, rx: float, ry: float, points: int = 16) -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return x + rx * np.cos(angle), y + ry * np.sin(angle)


def _add_ears(scene: Scene, head: Head) -> None:
    look = head.look
    if look.ears == "none":
        return
    line, ink = look.outline * look.half_height, head.ink(look.skin)
    inner = mix(look.skin, (150, 70, 50), 0.3)
    for side in (-1, 1):
        if look.ears == "human":
            shapes = [(_oval(side * look.half_width * 1.01, 0.06, 0.13, 0.2), look.skin),
                      (_oval(side * look.half_width * 1.03, 0.06, 0.065, 0.12), inner)]  # fmt: skip
        elif look.ears == "pointed":
            w = look.half_width
            shapes = [((side * np.array([0.9 * w, w + 0.34, 0.95 * w]), np.array([-0.16, -0.34, 0.24])), look.skin),
                      ((side * np.array([0.92 * w, w + 0.22, 0.95 * w]), np.array([-0.08, -0.25, 0.14])),
                          inner)]  # fmt: skip
        elif look.ears == "cat":
            w = look.half_width
            outer = side * w * np.array([0.98, 0.86, 0.2]), np.array([-0.45, -1.42, -0.92])
            shapes = [(outer, look.skin), ((outer[0] * 0.93, outer[1] * 0.88 - 0.04), inner)]
        elif look.ears == "bear":
            x = side * look.half_width * 0.78
            shapes = [(_oval(x, -0.83, 0.27, 0.27), look.skin), (_oval(x, -0.83, 0.16, 0.16), inner)]
        else:
            x = side * look.half_width * 0.42
            shapes = [(_oval(x, -1.28, 0.17, 0.5), look.skin), (_oval(x, -1.28, 0.09, 0.38), inner)]
        for k, ((x, y), fill) in enumerate(shapes):
            scene.add(head.solid(x, y, np.full(len(x), -0.12)), fill, line if k == 0 else 0.0, ink)


def _add_skin(scene: Scene, head: Head) -> None:
    look = head.look
    line = look.outline * look.half_height
    dark, bright = mix(look.skin, (88, 40, 60), 0.3), mix(look.skin, (255, 250, 235), 0.32)
    if look.style == "shaded painting":
        steps = 9
        for k in range(steps):
            u = k / (steps - 1)
            fill = mix(dark, look.skin, 2 * u) if u < 0.5 else mix(look.skin, bright, 2 * u - 1)
            scene.add(head.outline(1 - 0.62 * u, -look.light * -0.3 * look.half_width, -0.3), fill)
    elif look.style == "outlined cartoon":
        scene.add(head.outline(), mix(look.skin, (110, 50, 70), 0.18), line, head.ink(look.skin))
        scene.add(head.outline(0.93, look.light * 0.7 * look.half_width, -0.75), look.skin)
    else:
        scene.add(head.outline(), look.skin, line, head.ink(look.skin))
    cheek = mix(look.skin, (236, 104, 84), 0.34)
    for side in (-1, 1):
        at = side * (look.eye_x + 0.1), look.eye_y + 0.36
        if look.blush:
            scene.add(head.surface(*_oval(*at, 0.14, 0.095)), cheek)
        if look.freckles:
            for k in range(3):
                spot = _oval(at[0] - 0.09 + 0.09 * k, at[1] - 0.06 + 0.05 * (k % 2), 0.018, 0.018, 8)
                scene.add(head.surface(*spot), mix(look.skin, (130, 70, 40), 0.5))


def _add_beard(scene: Scene, head: Head) -> None:
    look = head.look
    v = np.linspace(-1, 1, 18)
    if look.beard == "full beard":
        x, y = head_outline(look)
        jaw = y > 0.1
        order = np.argsort(np.arctan2(y[jaw], x[jaw]))
        edge_x, edge_y = x[jaw][order] * 1.02, y[jaw][order] * 1.04
        top_y = 0.16 + 0.2 * (1 - v**2)
        scene.add(
            np.concatenate([head.rim(edge_x, edge_y), head.surface(0.97 * look.half_width * v * np.sqrt(1 - top_y**2),
                top_y)], 1),
            look.hair, look.outline * look.half_height, head.ink(look.hair),
        )  # fmt: skip
    if look.beard == "goatee":
        x, y = _oval(0, 0.86, 0.22, 0.2)
        scene.add(head.rim(x, np.minimum(y, 1.08)), look.hair, look.outline * look.half_height, head.ink(look.hair))
    if look.beard in ("moustache", "full beard"):
        base = look.mouth_y - 0.1
        curve = base - 0.05 * np.cos(v * np.pi * 2) * (1 - v**2) + 0.07 * v**2
        width = 0.02 + 0.11 * (1 - v**2)
        fill = look.hair if look.beard == "moustache" else mix(look.hair, (255, 255, 255), 0.12)
        scene.add(ribbon(head.surface(0.34 * v, curve - 0.03), width * look.half_height), fill)


def _add_nose(scene: Scene, head: Head) -> None:
    look, size = head.look, head.look.nose_size
    y = look.eye_y + 0.3
    shade = head.ink(look.skin) if look.outline else mix(look.skin, (120, 50, 50), 0.42)
    width = 0.035 * look.half_height
    v = np.linspace(-1, 1, 10)
    if look.nose == "dot":
        for side in (-1, 1):
            scene.add(head.surface(*_oval(side * 0.055 * size, y, 0.026, 0.022, 10), lift=1.15), shade)
    elif look.nose == "arc":
        scene.add(ribbon(head.surface(0.1 * size * v, y + 0.05 * (1 - v**2), lift=1.15), width), shade)
    elif look.nose == "wedge":
        x = np.array([0.0, 0.09, 0.015]) * size * look.light
        scene.add(head.surface(x, [y - 0.2 * size, y + 0.03, y + 0.05], lift=1.15), shade)
    elif look.nose == "button":
        scene.add(head.surface(*_oval(0, y, 0.12 * size, 0.1 * size), lift=1.15), mix(look.skin, (214, 96, 72), 0.45))
        scene.add(
            head.surface(*_oval(-0.03 * look.light * -1, y - 0.03, 0.035, 0.025, 8), lift=1.15),
            mix(look.skin, (255, 255, 255), 0.5),
        )
    elif look.nose == "long":
        x = look.light * size * np.array([0.0, 0.02, 0.06, 0.1, 0.08, 0.02, -0.03])
        yy = y + size * np.array([-0.26, -0.14, -0.04, 0.02, 0.06, 0.07, 0.05])
        scene.add(ribbon(head.surface(x, yy, lift=1.15), width), shade)


def mouth_curves(look: Look, pose: Pose) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner edge of the lips in head coordinates: x, upper y and lower y, each [f n], n from corner to corner."""
    u = np.linspace(-1, 1, 17)[None]
    half = (look.mouth_width * pose.mouth_wide)[:, None]
    height = (look.mouth_open * pose.mouth_open)[:, None]
    # An ellipse when round; when spread, the lips run straighter into the corners.
    bow = np.maximum(0, 1 - u**2) ** (0.78 - 0.28 * pose.mouth_round[:, None])
    middle = look.mouth_y - pose.corners[:, None] * (np.abs(u) ** 1.7 - 0.4)
    return half * u, middle - 0.36 * height * bow, middle + 0.64 * height * bow


def _add_mouth(scene: Scene, head: Head) -> None:
    look = head.look
    x, upper, lower = mouth_curves(look, head.pose)
    u = np.linspace(-1, 1, x.shape[1])[None]
    full = np.maximum(0, 1 - u**2) ** 0.55
    notch = 1 - 0.35 * np.exp(-((u / 0.16) ** 2))  # the bow of the upper lip
    thick = look.lip_thickness * (1 + 0.35 * head.pose.mouth_round[:, None])
    wide = x * 1.06
    lips_x = np.concatenate([wide, wide[:, ::-1]], 1)
    lips_y = np.concatenate([upper - thick * 0.85 * full * notch, (lower + thick * 1.25 * full)[:, ::-1]], 1)
    lip_line = look.outline * 0.7 * look.half_height
    scene.add(head.surface(lips_x, lips_y), look.lip, lip_line, head.ink(look.lip))
    seam = mix(look.lip, (70, 24, 30), 0.62)
    scene.add(ribbon(head.surface(x * 1.04, (upper + lower) / 2), 0.03 * look.half_height), seam)
    interior_x = np.concatenate([x, x[:, ::-1]], 1)
    scene.add(head.surface(interior_x, np.concatenate([upper, lower[:, ::-1]], 1)), MOUTH)


def mouth_truth(look: Look, pose: Pose) -> Float[np.ndarray, "f 4"]:
    """Opening (height of the interior), width, x and y of the mouth as drawn, as fractions of the picture."""
    head = Head(look, pose)
    x, upper, lower = mouth_curves(look, pose)
    middle = x.shape[1] // 2
    top, bottom = (head.surface(x[:, middle, None], y[:, middle, None])[:, 0] for y in (upper, lower))
    ends = head.surface(x[:, [0, -1]], ((upper + lower) / 2)[:, [0, -1]])
    center = (top + bottom) / 2
    opening, width = np.linalg.norm(bottom - top, axis=-1), np.linalg.norm(ends[:, 1] - ends[:, 0], axis=-1)
    return np.stack([opening, width, center[:, 0], center[:, 1]], -1).astype(np.float32)


def _add_eye(scene: Scene, head: Head, side: int) -> None:
    look, pose = head.look, head.pose
    center_x, center_y = side * look.eye_x, look.eye_y
    wide, high = look.eye_width, look.eye_height
    u = np.linspace(-1, 1, 13)[None]
    arc = np.maximum(0, 1 - u**2) ** (0.7 if look.eyes == "almond" else 0.5)
    rest = 0.62 if look.eyes == "half-closed" else 1.0
    upper_lid, lower_lid = pose.lid_upper[:, None] * rest, pose.lid_lower[:, None]
    if look.eyes == "half-closed":
        upper = center_y - high * np.minimum(arc, np.maximum(upper_lid, -lower_lid))
    else:
        upper = center_y - high * upper_lid * arc
    lower = center_y + high * lower_lid * arc
    upper = np.minimum(upper, lower)
    x = np.broadcast_to(center_x + wide * u, upper.shape)
    outline_x, outline_y = np.concatenate([x, x[:, ::-1]], 1), np.concatenate([upper, lower[:, ::-1]], 1)
    lash = INK if look.outline or luma(look.skin) < 100 else mix(look.skin, (40, 20, 34), 0.8)

    def clipped(cx, cy, rx, ry, fill, points=18, whole=False):
        """A disc on the eyeball, cut by the lids."""
        angle = np.linspace(0, 2 * np.pi, points, endpoint=False)[None]
        px = np.clip(cx + rx * np.cos(angle), center_x - wide, center_x + wide)
        py = cy + ry * np.sin(angle)
        if not whole:
            here = np.clip((px - center_x) / wide * 6 + 6, 0, 12)
            low, frac = np.minimum(here.astype(int), 11), here - np.minimum(here.astype(int), 11)
            rows = np.arange(len(px))[:, None]
            edges = [(curve[rows, low] * (1 - frac) + curve[rows, low + 1] * frac) for curve in (upper, lower)]
            py = np.clip(py, edges[0], edges[1])
        scene.add(head.surface(px, py), fill)

    gaze_x = (center_x + (0.35 * wide * pose.gaze_x))[:, None]
    gaze_y = (center_y + (0.25 * high * pose.gaze_y))[:, None]
    white = (255, 255, 255) if luma(look.skin) < 225 else (253, 253, 255)
    if look.eyes == "dot":
        scene.add(head.surface(outline_x, outline_y), (34, 28, 38))
        clipped(gaze_x + 0.25 * wide, gaze_y - 0.35 * high, 0.36 * wide, 0.3 * high, (255, 255, 255), 10)
        closing = 0.03 * look.half_height
        scene.add(ribbon(head.surface(x, (upper + lower) / 2), closing), (34, 28, 38))
        return
    rim = (0.02 if look.outline else 0.012) * look.half_height
    scene.add(
        head.surface(outline_x, outline_y), white, rim, lash if look.outline else mix(look.skin, (60, 30, 40), 0.45)
    )
    iris = {"round": 0.58, "almond": 0.56, "big": 0.66, "half-closed": 0.56}[look.eyes] * min(wide, 1.15 * high)
    iris_y = iris * (1.18 if look.eyes == "big" else 1.0)
    clipped(gaze_x, gaze_y, iris, iris_y, mix(look.iris, (10, 10, 20), 0.25))
    clipped(gaze_x, gaze_y + 0.12 * iris, iris * 0.78, iris_y * 0.78, look.iris)
    clipped(gaze_x, gaze_y, iris * 0.55, iris_y * 0.55, (18, 14, 22), 14)
    clipped(gaze_x + 0.32 * iris, gaze_y - 0.38 * iris, iris * 0.3, iris * 0.3, (255, 255, 255), 10)
    width = np.linspace(0.5, 1.0, 13)[:: 1 if side > 0 else -1] * (0.075 if look.lashes else 0.05)
    scene.add(ribbon(head.surface(x, upper), width * look.half_height), lash)
    if look.lashes:
        for k in range(2):
            tip = side * wide * (0.78 + 0.28 * k)
            at = upper[:, [11 if side > 0 else 1]] if k else upper[:, [10 if side > 0 else 2]]
            lx = center_x + np.array([tip - 0.03, tip + 0.03, tip + side * 0.09])[None]
            ly = at + np.array([0.0, 0.0, -0.1 + 0.03 * k])[None]
            scene.add(head.surface(np.broadcast_to(lx, ly.shape), ly), lash)


def _add_brow(scene: Scene, head: Head, side: int) -> None:
    look, pose = head.look, head.pose
    u = np.linspace(0, 1, 9)[None]  # from the inner to the outer end
    x = side * (look.eye_x - 0.85 * look.brow_width + 1.8 * look.brow_width * u)
    base = look.eye_y - look.eye_height - look.brow_y
    inner, outer = pose.brow_slant[:, None] * 1.0, -0.55 * pose.brow_slant[:, None]
    y = base - pose.brow_raise[:, None] - inner * (1 - u) - outer * u - 0.05 * np.sin(np.pi * u)
    width = look.brow_thickness * np.interp(u[0], [0, 0.3, 1], [0.85, 1.0, 0.45]) * look.half_height
    fill = (
        mix(look.hair, INK, 0.35)
        if look.hair_name not in ("white", "grey", "blond")
        else mix(look.hair, (90, 64, 40), 0.5)
    )
    if abs(luma(fill) - luma(look.skin)) < 45:
        fill = mix(fill, INK, 0.6) if luma(look.skin) > 90 else mix(fill, (250, 240, 220), 0.45)
    scene.add(
        ribbon(head.surface(np.broadcast_to(x, y.shape), y), width), INK if look.style == "line drawing" else fill
    )


def _add_glasses(scene: Scene, head: Head) -> None:
    look = head.look
    if look.glasses == "none":
        return
    fill = (40, 36, 46) if look.glasses != "thick glasses" else mix(look.hat_colour, INK, 0.2)
    width = (0.045 if look.glasses != "thick glasses" else 0.07) * look.half_height
    rx = min(max(look.eye_width + 0.07, 0.2), look.eye_x - 0.03)
    ry = look.eye_height + 0.09
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    if look.glasses == "square glasses":
        c, s = np.sign(c) * np.abs(c) ** 0.5, np.sign(s) * np.abs(s) ** 0.5
    for side in (-1, 1):
        lens = head.surface(side * look.eye_x + rx * c, look.eye_y + 0.02 + ry * s, lift=1.12)
        scene.add(ribbon(lens, width, closed=True), fill)
        temple = np.array([look.eye_x + rx, look.half_width * 0.99]) * side
        scene.add(ribbon(head.surface(temple, [look.eye_y - 0.02, look.eye_y - 0.06], lift=1.05), width), fill)
    bridge = np.linspace(-1, 1, 6)
    scene.add(
        ribbon(head.surface((look.eye_x - rx) * bridge, look.eye_y - 0.02 - 0.04 * (1 - bridge**2), lift=1.15), width),
        fill,
    )


def face_polygon(look: Look, pose: Pose) -> Float[np.ndarray, "f n 2"]:
    """The outline of the face in every frame, a little enlarged: the region that the face mask unites."""
    return Head(look, pose).outline(1.06)
