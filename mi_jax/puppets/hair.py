"""Hair and hats of a puppet, behind and before its face."""

import numpy as np

from mi_jax.puppets.geometry import ribbon
from mi_jax.puppets.head import oval
from mi_jax.puppets.looks import INK, Look, mix


def _arc(look: Look, start, end, scale=1.0, points: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Along the skull from one angle to another in degrees; 0 is the top, positive to the right."""
    angle = np.radians(np.linspace(start, end, points))
    return scale * look.half_width * np.sin(angle), -scale * np.cos(angle)


def _behind(head, x, y, depth=-0.35):
    """Points behind the head: they swing the other way when it turns."""
    x, y = np.atleast_2d(x), np.atleast_2d(y)
    return head.place(
        x + 0.5 * depth * np.sin(head.pose.yaw)[:, None], y + 0.3 * depth * np.sin(head.pose.pitch)[:, None]
    )


def add_back_hair(scene, head) -> None:
    """What hangs or stands behind head and shoulders."""
    look = head.look
    line, ink = look.outline * look.half_height, head.ink(look.hair)
    fill = mix(look.hair, INK, 0.25) if look.style != "line drawing" else look.hair
    w = look.half_width
    v = np.linspace(0, 1, 14)
    if look.hairstyle in ("bob", "long"):
        bottom = 0.82 if look.hairstyle == "bob" else 1.75
        top_x, top_y = _arc(look, -95, 95, 1.13)
        side_y = 0.08 + (bottom - 0.08) * v
        side_x = 1.13 * w + (0.12 if look.hairstyle == "bob" else 0.06) * np.sin(np.pi * v * 0.9)
        x = np.concatenate([top_x, side_x, -side_x[::-1]])
        y = np.concatenate([top_y, side_y, side_y[::-1]])
        scene.add(_behind(head, x, y), fill, line, ink)
    elif look.hairstyle == "afro":
        angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        r = 1.3 + 0.045 * np.abs(np.sin(9 * angle))
        scene.add(_behind(head, r * (w + 0.08) * np.sin(angle), -0.22 - r * 0.95 * np.cos(angle)), look.hair, line, ink)
    elif look.hairstyle == "curly":
        for angle in np.radians(np.linspace(-125, 125, 13)):
            curl = oval(1.08 * w * np.sin(angle), -0.02 - 1.02 * np.cos(angle), 0.24, 0.24, 14)
            scene.add(_behind(head, *curl), fill, line, ink)
    elif look.hairstyle == "pigtails":
        for side in (-1, 1):
            x, y = oval(side * (w + 0.22), 0.42, 0.24, 0.55)
            scene.add(_behind(head, x + side * 0.1 * (y - 0.1), y), fill, line, ink)
            scene.add(_behind(head, *oval(side * (w + 0.06), -0.06, 0.12, 0.1, 12)), look.top_accent, line, ink)
    elif look.hairstyle == "ponytail":
        side = look.light
        x = side * (w * 0.6 + 0.62 * np.sin(v * 2.6))
        y = -0.75 + 1.75 * v
        tail = _behind(head, x, y)
        scene.add(ribbon(tail, (0.3 + 0.22 * np.sin(np.pi * v) - 0.2 * v) * look.half_height), fill, line, ink)
    elif look.hairstyle == "bun":
        scene.add(_behind(head, *oval(0, -1.2, 0.34, 0.3)), fill, line, ink)
        scene.add(_behind(head, *oval(0, -1.0, 0.2, 0.07, 14)), look.top_accent)


def _hairline(look: Look) -> tuple[np.ndarray, np.ndarray]:
    """The lower edge of the hair on the forehead, from the right temple to the left."""
    u = np.linspace(1, -1, 29)
    line = "straight" if look.hairstyle == "fringed" and look.hairline not in ("zigzag",) else look.hairline
    line = {"parted": "side", "buzzed": "high", "afro": "round", "bun": "round", "curly": "round"}.get(
        look.hairstyle, line
    )
    if line == "straight":
        y = -0.42 + 0.02 * np.cos(6 * u)
    elif line == "zigzag":
        y = -0.46 + 0.11 * np.abs((np.arange(29) % 4) - 2) / 2
    elif line == "side":
        p = look.parting
        y = -0.74 + 0.42 * np.clip(np.where(u > p, (u - p) / (1 - p), (p - u) / (1 + p)), 0, 1) ** 0.8
    elif line == "centre":
        y = -0.76 + 0.4 * np.abs(u) ** 0.9
    elif line == "round":
        y = -0.62 + 0.22 * u**2
    else:
        y = -0.72 + 0.14 * u**2
    temples = {"bob": 0.32, "long": 0.38, "short": 0.12, "parted": 0.14, "fringed": 0.25}.get(look.hairstyle, 0.02)
    end = np.clip((np.abs(u) - 0.82) / 0.18, 0, 1) ** 2
    y = y * (1 - end) + temples * end
    reach = 0.86 + 0.14 * end
    return reach * look.half_width * u * np.sqrt(np.clip(1 - (np.minimum(y, 0) * 0.9) ** 2, 0, 1)), y


def add_front_hair(scene, head) -> None:
    """The cap of hair over the skull, down to the hairline."""
    look = head.look
    style = look.hairstyle
    line, ink = look.outline * look.half_height, head.ink(look.hair)
    if style == "bald":
        if look.style == "shaded painting":
            scene.add(
                head.surface(*oval(-look.light * -0.3 * look.half_width, -0.68, 0.2, 0.09)),
                mix(look.skin, (255, 255, 255), 0.55),
            )
        return
    if style == "mohawk":
        crest = np.linspace(-1, 1, 15)
        x = np.concatenate([0.2 * crest, [0.13, -0.13]])
        y = np.concatenate([-1.38 - 0.1 * np.abs(crest % 0.4 - 0.2) * 4 + 0.16 * crest**2, [-0.52, -0.52]])
        scene.add(head.solid(x, y, np.concatenate([np.full(15, 0.1), [0.6, 0.6]])), look.hair, line, ink)
        return
    volume = {
        "buzzed": 1.02, "short": 1.08, "parted": 1.1, "fringed": 1.09, "bob": 1.12, "long": 1.11, "curly": 1.05,
        "afro": 1.1, "spiky": 1.06, "bun": 1.06, "pigtails": 1.07, "ponytail": 1.07,
    }[style]  # fmt: skip
    reach = {"buzzed": 84, "bob": 106, "long": 108, "fringed": 100}.get(style, 94)
    if style == "spiky":
        angle = np.linspace(-88, 88, 27)
        spikes = np.where(np.arange(27) % 2 == 0, 1.02, 1.3)
        rad = np.radians(angle + np.where(np.arange(27) % 2 == 0, 0, 5 * look.light))
        x, y = spikes * look.half_width * np.sin(rad), -spikes * np.cos(rad)
    elif style == "curly":
        rad = np.radians(np.linspace(-reach, reach, 48))
        r = volume + 0.08 * np.abs(np.sin(np.linspace(0, 9 * np.pi, 48)))
        x, y = r * look.half_width * np.sin(rad), -r * np.cos(rad)
    else:
        x, y = _arc(look, -reach, reach, volume)
    hx, hy = _hairline(look)
    cap = np.concatenate([head.rim(x, y), head.surface(hx, hy)], 1)
    scene.add(cap, look.hair, line, ink)
    if style == "buzzed":
        return
    bright = mix(look.hair, (255, 255, 255), 0.22 if look.style != "shaded painting" else 0.3)
    if look.style == "line drawing":
        bright = mix(look.hair, (250, 247, 240), 0.5)
    # A gleam across the crown and, in the drawn styles, a few strands.
    gx, gy = _arc(look, -52, 34, 0.86, 14)
    gleam = np.sin(np.linspace(0, np.pi, 14)) * 0.075
    mirror = -look.light
    scene.add(ribbon(head.solid(mirror * gx, gy + 0.02, np.full(14, 0.3)), gleam * look.half_height), bright)
    if style in ("parted", "short", "long", "bob", "ponytail", "pigtails", "bun"):
        root = look.parting * 0.5 * look.half_width
        shade = mix(look.hair, INK, 0.28)
        v = np.linspace(0, 1, 7)
        for end in (-0.75, -0.35, 0.4, 0.78):
            sx = root + (end * look.half_width - root) * v**0.8
            sy = -0.98 + 0.34 * v**1.5 - 0.06 * np.sin(np.pi * v)
            scene.add(ribbon(head.solid(sx, sy, 0.35 * v), np.linspace(0.028, 0.008, 7) * look.half_height), shade)


def add_hat(scene, head) -> None:
    """A hat, band or bow on top of everything."""
    look = head.look
    if look.hat == "none":
        return
    fill, line = look.hat_colour, look.outline * look.half_height
    ink, dark, light = head.ink(fill), mix(look.hat_colour, INK, 0.3), mix(look.hat_colour, (255, 255, 255), 0.35)
    w = look.half_width
    v = np.linspace(-1, 1, 15)
    band_y = -0.52 - 0.08 * (1 - v**2)

    def band(width, y, colour, scale=1.1):
        x = scale * w * v * np.sqrt(np.clip(1 - (y * 0.82) ** 2, 0, 1))
        scene.add(ribbon(head.surface(x, y, lift=1.1), width * look.half_height), colour, line, ink)

    if look.hat == "beanie":
        x, y = _arc(look, -64, 64, 1.2)
        scene.add(
            np.concatenate([head.rim(x, y - 0.02), head.surface(1.02 * w * v[::-1] * 0.94, band_y[::-1])], 1),
            fill,
            line,
            ink,
        )
        band(0.24, band_y, dark, 1.2)
        scene.add(head.rim(*oval(0, -1.28, 0.16, 0.14)), light, line, ink)
    elif look.hat == "cap":
        x, y = _arc(look, -62, 62, 1.16)
        scene.add(np.concatenate([head.rim(x, y), head.surface(w * v[::-1] * 0.94, band_y[::-1])], 1), fill, line, ink)
        peak_x = np.concatenate([0.78 * w * v, 0.95 * w * v[::-1]])
        peak_y = np.concatenate([-0.56 - 0.06 * (1 - v**2), (-0.5 + 0.12 * (1 - v**2))[::-1]])
        scene.add(head.surface(peak_x, peak_y, lift=1.35), dark, line, ink)
    elif look.hat == "top hat":
        scene.add(head.rim([-0.58 * w, 0.58 * w, 0.64 * w, -0.64 * w], [-0.82, -0.82, -1.62, -1.62]), fill, line, ink)
        scene.add(head.rim([-0.59 * w, 0.59 * w, 0.6 * w, -0.6 * w], [-0.86, -0.86, -1.02, -1.02]), light)
        scene.add(head.rim(*oval(0, -0.8, 0.95 * w, 0.13)), fill, line, ink)
    elif look.hat == "crown":
        x = w * np.array([-0.62, -0.66, -0.33, 0.0, 0.33, 0.66, 0.62])
        y = np.array([-0.76, -1.38, -1.04, -1.46, -1.04, -1.38, -0.76])
        scene.add(head.rim(x, y), (246, 196, 62), line, ink)
        for k in (-1, 0, 1):
            scene.add(head.rim(*oval(0.36 * w * k, -0.88, 0.06, 0.06, 10)), (fill if k else (60, 130, 210)))
    elif look.hat == "headband":
        band(0.13, -0.66 - 0.08 * (1 - v**2), fill)
    else:
        x, y = look.light * 0.5 * w, -0.88
        for side in (-1, 1):
            scene.add(head.rim([x, x + side * 0.34, x + side * 0.34], [y, y - 0.2, y + 0.18]), fill, line, ink)
        scene.add(head.rim(*oval(x, y, 0.09, 0.09, 12)), light, line, ink)
