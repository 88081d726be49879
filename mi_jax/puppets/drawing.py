"""Draws a puppet: a `Look` (what it is) and a `Pose` (how it moves) become polygons."""

import numpy as np

from mi_jax.puppets.face import add_brow, add_eye, add_glasses, add_mouth
from mi_jax.puppets.geometry import Scene, ribbon
from mi_jax.puppets.hair import add_back_hair, add_front_hair, add_hat
from mi_jax.puppets.head import Head, Pose, head_outline, oval
from mi_jax.puppets.looks import INK, Look, mix


def add_puppet(scene: Scene, look: Look, pose: Pose) -> None:
    """Paint one puppet, from what lies behind to what lies before."""
    head = Head(look, pose)
    add_back_hair(scene, head)
    _add_body(scene, head)
    _add_ears(scene, head)
    _add_skin(scene, head)
    _add_beard(scene, head)
    _add_nose(scene, head)
    add_mouth(scene, head)
    add_front_hair(scene, head)
    for side in (-1, 1):
        add_eye(scene, head, side)
        add_brow(scene, head, side)
    add_glasses(scene, head)
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
                    scene.add(body(*oval(at, 1.68 + 0.3 * row, 0.07, 0.07)), accent)
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
            scene.add(body(*oval(0.09, 1.66 + 0.3 * k, 0.05, 0.05)), accent if look.top == "buttons" else ink)


def _add_ears(scene: Scene, head: Head) -> None:
    look = head.look
    if look.ears == "none":
        return
    line, ink = look.outline * look.half_height, head.ink(look.skin)
    inner = mix(look.skin, (150, 70, 50), 0.3)
    for side in (-1, 1):
        if look.ears == "human":
            outer = oval(side * look.half_width * 1.01, 0.06, 0.13, 0.2)
            shapes = [(outer, look.skin), (oval(side * look.half_width * 1.03, 0.06, 0.065, 0.12), inner)]
        elif look.ears == "pointed":
            w = look.half_width
            outer = side * np.array([0.9 * w, w + 0.34, 0.95 * w]), np.array([-0.16, -0.34, 0.24])
            hollow = side * np.array([0.92 * w, w + 0.22, 0.95 * w]), np.array([-0.08, -0.25, 0.14])
            shapes = [(outer, look.skin), (hollow, inner)]
        elif look.ears == "cat":
            w = look.half_width
            outer = side * w * np.array([0.98, 0.86, 0.2]), np.array([-0.45, -1.42, -0.92])
            shapes = [(outer, look.skin), ((outer[0] * 0.93, outer[1] * 0.88 - 0.04), inner)]
        elif look.ears == "bear":
            x = side * look.half_width * 0.78
            shapes = [(oval(x, -0.83, 0.27, 0.27), look.skin), (oval(x, -0.83, 0.16, 0.16), inner)]
        else:
            x = side * look.half_width * 0.42
            shapes = [(oval(x, -1.28, 0.17, 0.5), look.skin), (oval(x, -1.28, 0.09, 0.38), inner)]
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
            scene.add(head.surface(*oval(*at, 0.14, 0.095)), cheek)
        if look.freckles:
            for k in range(3):
                spot = oval(at[0] - 0.09 + 0.09 * k, at[1] - 0.06 + 0.05 * (k % 2), 0.018, 0.018, 8)
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
        top = head.surface(0.97 * look.half_width * v * np.sqrt(1 - top_y**2), top_y)
        beard = np.concatenate([head.rim(edge_x, edge_y), top], 1)
        scene.add(beard, look.hair, look.outline * look.half_height, head.ink(look.hair))
    if look.beard == "goatee":
        x, y = oval(0, 0.86, 0.22, 0.2)
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
            scene.add(head.surface(*oval(side * 0.055 * size, y, 0.026, 0.022, 10), lift=1.15), shade)
    elif look.nose == "arc":
        scene.add(ribbon(head.surface(0.1 * size * v, y + 0.05 * (1 - v**2), lift=1.15), width), shade)
    elif look.nose == "wedge":
        x = np.array([0.0, 0.09, 0.015]) * size * look.light
        scene.add(head.surface(x, [y - 0.2 * size, y + 0.03, y + 0.05], lift=1.15), shade)
    elif look.nose == "button":
        scene.add(head.surface(*oval(0, y, 0.12 * size, 0.1 * size), lift=1.15), mix(look.skin, (214, 96, 72), 0.45))
        scene.add(
            head.surface(*oval(-0.03 * look.light * -1, y - 0.03, 0.035, 0.025, 8), lift=1.15),
            mix(look.skin, (255, 255, 255), 0.5),
        )
    elif look.nose == "long":
        x = look.light * size * np.array([0.0, 0.02, 0.06, 0.1, 0.08, 0.02, -0.03])
        yy = y + size * np.array([-0.26, -0.14, -0.04, 0.02, 0.06, 0.07, 0.05])
        scene.add(ribbon(head.surface(x, yy, lift=1.15), width), shade)
