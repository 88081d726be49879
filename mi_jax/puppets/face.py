"""The face of a puppet: mouth, eyes, brows and glasses."""

import numpy as np
from jaxtyping import Float

from mi_jax.puppets.geometry import Scene, ribbon
from mi_jax.puppets.head import Head, Pose
from mi_jax.puppets.looks import INK, MOUTH, Look, luma, mix


def mouth_curves(look: Look, pose: Pose) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inner edge of the lips in head coordinates: x, upper y and lower y, each [f n], n from corner to corner."""
    u = np.linspace(-1, 1, 17)[None]
    half = (look.mouth_width * pose.mouth_wide)[:, None]
    height = (look.mouth_open * pose.mouth_open)[:, None]
    # An ellipse when round; when spread, the lips run straighter into the corners.
    bow = np.maximum(0, 1 - u**2) ** (0.78 - 0.28 * pose.mouth_round[:, None])
    middle = look.mouth_y - pose.corners[:, None] * (np.abs(u) ** 1.7 - 0.4)
    return half * u, middle - 0.36 * height * bow, middle + 0.64 * height * bow


def add_mouth(scene: Scene, head: Head) -> None:
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


def add_eye(scene: Scene, head: Head, side: int) -> None:
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


def add_brow(scene: Scene, head: Head, side: int) -> None:
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


def add_glasses(scene: Scene, head: Head) -> None:
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
