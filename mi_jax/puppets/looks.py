"""What a puppet looks like: every choice that holds for a whole clip, drawn from one random generator.

Colours are RGB in 0..255. One hue belongs to the mouth alone: `MOUTH` (a dark wine red) fills the open mouth and
appears in no skin, hair, cloth or background, so that how far a mouth is open can be read from pixels.
"""

import dataclasses

import numpy as np

RGB = tuple[int, int, int]

MOUTH: RGB = (142, 0, 74)  # the open mouth, in every style
INK: RGB = (44, 38, 52)
PAPER: RGB = (250, 247, 240)

STYLES = ("flat cartoon", "outlined cartoon", "shaded painting", "line drawing")

SKINS: dict[str, RGB] = {
    "pale": (252, 226, 205), "fair": (246, 207, 178), "olive": (226, 184, 140), "tan": (211, 160, 116),
    "brown": (164, 112, 78), "dark": (122, 79, 56), "deep": (92, 58, 44),
    "blue": (132, 178, 232), "green": (146, 204, 130), "lavender": (192, 172, 234), "mint": (160, 222, 200),
    "yellow": (250, 216, 96), "grey": (186, 192, 200), "coral": (250, 170, 138),
}  # fmt: skip
HUMAN_SKINS = ("pale", "fair", "olive", "tan", "brown", "dark", "deep")

HAIRS: dict[str, RGB] = {
    "black": (40, 34, 40), "brown": (98, 62, 38), "chestnut": (142, 80, 44), "blond": (236, 200, 104),
    "ginger": (220, 112, 36), "grey": (150, 152, 160), "white": (236, 236, 240), "blue": (48, 92, 200),
    "green": (52, 150, 88), "purple": (116, 76, 186), "teal": (28, 150, 160), "orange": (244, 140, 30),
}  # fmt: skip

CLOTHES: dict[str, RGB] = {
    "red": (212, 60, 44), "blue": (58, 104, 196), "green": (62, 146, 90), "yellow": (242, 196, 64),
    "white": (240, 240, 244), "black": (52, 50, 60), "orange": (238, 134, 50), "teal": (40, 150, 156),
    "grey": (136, 142, 152), "purple": (116, 88, 176), "brown": (132, 92, 62),
}  # fmt: skip

# name: (half width / half height, roundness of the top, of the jaw, taper of the jaw, cheeks)
HEADS: dict[str, tuple[float, float, float, float, float]] = {
    "round": (0.92, 2.0, 2.1, 0.00, 0.02), "oval": (0.79, 2.0, 2.0, 0.08, 0.00), "square": (0.84, 2.3, 3.1, 0.00, 0.00),
    "heart-shaped": (0.87, 2.1, 1.9, 0.26, 0.00), "pear-shaped": (0.80, 2.0, 2.5, -0.05, 0.09),
    "long": (0.70, 2.2, 2.3, 0.05, 0.00), "egg-shaped": (0.82, 2.0, 2.0, 0.17, 0.03),
    "wide": (0.98, 2.1, 2.3, 0.03, 0.00),
}  # fmt: skip

HAIRSTYLES = (
    "bald", "buzzed", "short", "parted", "fringed", "bob", "long", "curly", "afro", "mohawk", "spiky", "bun",
    "pigtails", "ponytail",
)  # fmt: skip
HAIRLINES = ("straight", "zigzag", "side", "centre", "round", "high")
EYES = ("dot", "round", "almond", "big", "half-closed")
NOSES = ("dot", "arc", "wedge", "button", "long", "none")
EARS = ("human", "human", "human", "pointed", "cat", "bear", "rabbit", "none")
HATS = ("none", "beanie", "cap", "top hat", "crown", "headband", "bow")
BEARDS = ("none", "full beard", "goatee", "moustache")
GLASSES = ("none", "round glasses", "square glasses", "thick glasses")
TOPS = ("plain", "striped", "collar", "v-neck", "buttons", "scarf", "bow tie", "hood", "dotted")
IRIDES: dict[str, RGB] = {
    "brown": (104, 64, 34), "blue": (48, 112, 196), "green": (56, 140, 78), "grey": (104, 118, 134),
    "amber": (196, 128, 28), "violet": (104, 76, 176),
}  # fmt: skip


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """Colour `a` moved towards `b` by `amount` in 0..1."""
    return tuple(round(x + (y - x) * float(amount)) for x, y in zip(a, b))


def luma(colour: RGB) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """One puppet. Lengths are in half face heights unless said otherwise; json-able by `dataclasses.asdict`."""

    style: str
    skin_name: str
    skin: RGB
    hair_name: str
    hair: RGB
    hairstyle: str
    hairline: str
    parting: float
    head: str
    half_width: float
    top_power: float
    jaw_power: float
    taper: float
    cheeks: float
    center_x: float  # of the head, fraction of the picture
    center_y: float
    half_height: float  # of the head, fraction of the picture
    eyes: str
    eye_x: float
    eye_y: float
    eye_width: float
    eye_height: float
    iris_name: str
    iris: RGB
    lashes: bool
    brow_y: float
    brow_width: float
    brow_thickness: float
    nose: str
    nose_size: float
    mouth_y: float
    mouth_width: float  # half width at rest
    mouth_open: float  # height of the interior at opening 1
    lip_thickness: float
    lip: RGB
    ears: str
    hat: str
    hat_colour: RGB
    beard: str
    glasses: str
    top: str
    top_name: str
    top_colour: RGB
    top_accent: RGB
    shoulders: float
    blush: bool
    freckles: bool
    light: int  # -1: light from the left, 1: from the right

    @property
    def outline(self) -> float:
        """Width of the drawn outline, 0 where the style has none."""
        return {"outlined cartoon": 0.032, "line drawing": 0.046}.get(self.style, 0.0)


def _pick(rng: np.random.Generator, names, weights=None):
    names = list(names)
    if weights is not None:
        weights = np.asarray(weights, float) / np.sum(weights)
    return names[int(rng.choice(len(names), p=weights))]


def _far(rng: np.random.Generator, palette: dict[str, RGB], others: list[RGB], distance: int = 90) -> str:
    """A colour of the palette that stands out from all others."""
    fit = [n for n, c in palette.items() if all(np.abs(np.subtract(c, o)).sum() > distance for o in others)]
    return _pick(rng, fit or list(palette))


def _jitter(rng: np.random.Generator, colour: RGB, amount: int = 10) -> RGB:
    shift = rng.integers(-amount, amount + 1) + rng.integers(-amount // 2, amount // 2 + 1, 3)
    return tuple(int(c) for c in np.clip(np.asarray(colour) + shift, 0, 255))


def sample_look(rng: np.random.Generator) -> Look:
    """A random puppet."""
    style = _pick(rng, STYLES, (0.3, 0.27, 0.28, 0.15))
    skin_name = _pick(rng, HUMAN_SKINS if rng.random() < 0.7 else [n for n in SKINS if n not in HUMAN_SKINS])
    skin = _jitter(rng, SKINS[skin_name])
    hair_name = _far(rng, HAIRS, [skin], 130)
    hair = _jitter(rng, HAIRS[hair_name])
    top_name = _far(rng, CLOTHES, [skin], 110)
    top_colour = _jitter(rng, CLOTHES[top_name])
    if style == "line drawing":  # drawn on paper: only a tint of each colour
        skin, top_colour = mix(skin, PAPER, 0.62), mix(top_colour, PAPER, 0.5)
        hair = mix(hair, PAPER, 0.35) if luma(hair) > 90 else hair
    human = rng.random() < 0.75
    head = _pick(rng, HEADS)
    width, top, jaw, taper, cheeks = HEADS[head]
    half_height = float(np.clip(rng.normal(0.33, 0.045), 0.235, 0.395))
    hat = _pick(rng, HATS, (0.74, 0.06, 0.05, 0.03, 0.03, 0.04, 0.05))
    tall = {"top hat": 0.45, "crown": 0.25, "beanie": 0.15}.get(hat, 0.0)
    ears = "human" if human else _pick(rng, EARS[3:])
    tall = max(tall, 0.3 if ears in ("cat", "bear", "rabbit") else 0.0)
    low = half_height * (1.1 + tall * 0.6)  # the top of the head stays in the picture, most of the time
    high = 1.0 - half_height * 1.12
    center_y = float(np.clip(rng.normal(0.52, 0.035), min(low, high), high))
    room = max(0.0, 0.5 - half_height * 1.25)
    center_x = 0.5 + float(np.clip(rng.normal(0, 0.06), -room, room))
    eyes = _pick(rng, EYES, (0.17, 0.27, 0.24, 0.24, 0.08))
    eye_width, eye_height = {
        "dot": (0.085, 0.12), "round": (0.155, 0.155), "almond": (0.185, 0.12), "big": (0.19, 0.21),
        "half-closed": (0.18, 0.14),
    }[eyes]  # fmt: skip
    scale = rng.uniform(0.92, 1.15)
    half_width = width * rng.uniform(0.95, 1.05)
    eye_x = float(np.clip(rng.uniform(0.36, 0.46) * half_width, eye_width * scale + 0.06, None))
    eye_y = rng.uniform(-0.1, 0.04)
    hairstyle = _pick(rng, HAIRSTYLES, (2, 2, 4, 4, 3, 3, 4, 3, 2, 1, 2, 2, 2, 2))
    if hairstyle in ("bun", "afro", "mohawk", "spiky") and hat not in ("headband", "bow"):
        hat = "none"
    beard = _pick(rng, BEARDS, (0.82, 0.06, 0.05, 0.07))
    # Where blue or purple beards meet skin and lips, the mixed pixels have the hue of the open mouth.
    if hair_name in ("blue", "purple", "teal") or (
        hairstyle in ("bob", "bun", "pigtails", "long", "fringed") and rng.random() < 0.8
    ):
        beard = "none"
    lip_base = mix(skin, (196, 84, 72), 0.62) if luma(skin) > 105 else mix(skin, (214, 116, 100), 0.55)
    lip = mix(skin, lip_base, rng.uniform(0.6, 1.0))
    return Look(
        style=style, skin_name=skin_name, skin=skin, hair_name=hair_name, hair=hair, hairstyle=hairstyle,
        hairline=_pick(rng, HAIRLINES), parting=float(rng.uniform(-0.7, 0.7)), head=head,
        half_width=half_width, top_power=top * rng.uniform(0.96, 1.05), jaw_power=jaw * rng.uniform(0.95, 1.06),
        taper=taper + rng.uniform(-0.02, 0.03), cheeks=cheeks, center_x=center_x, center_y=center_y,
        half_height=half_height,
        eyes=eyes, eye_x=eye_x, eye_y=eye_y, eye_width=eye_width * scale,
        eye_height=eye_height * scale * rng.uniform(0.92, 1.1),
        iris_name=(iris := _pick(rng, IRIDES)), iris=IRIDES[iris], lashes=bool(rng.random() < 0.35),
        brow_y=rng.uniform(0.1, 0.15), brow_width=rng.uniform(0.17, 0.23), brow_thickness=rng.uniform(0.05, 0.085),
        nose=_pick(rng, NOSES, (0.18, 0.24, 0.18, 0.2, 0.14, 0.06)), nose_size=rng.uniform(0.85, 1.25),
        mouth_y=rng.uniform(0.5, 0.56), mouth_width=rng.uniform(0.25, 0.32) * (0.6 + 0.45 * half_width),
        mouth_open=rng.uniform(0.25, 0.285), lip_thickness=rng.uniform(0.035, 0.065), lip=lip,
        ears=ears, hat=hat, hat_colour=_jitter(rng, CLOTHES[_far(rng, CLOTHES, [skin, hair], 110)]), beard=beard,
        glasses=_pick(rng, GLASSES, (0.85, 0.07, 0.06, 0.02)),
        top=_pick(rng, TOPS), top_name=top_name, top_colour=top_colour,
        top_accent=_jitter(rng, CLOTHES[_far(rng, CLOTHES, [top_colour, skin], 130)]), shoulders=rng.uniform(1.15, 1.6),
        blush=bool(rng.random() < 0.35), freckles=bool(rng.random() < 0.1), light=int(rng.choice((-1, 1))),
    )  # fmt: skip
