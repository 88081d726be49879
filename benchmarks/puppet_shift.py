"""Whether a puppet VAE's latents move with the picture: how much of the latents of a face shifted by some pixels a
linear map of the unshifted ones, the nine around each place, predicts on other faces.

    python benchmarks/puppet_shift.py [--model puppet] [--pictures 160]

One JSON line for each shift: R^2 of that map, and of taking the latents as they were, inside the faces of the last
quarter of the pictures (the map is fitted on the others). The VAE's stride is 8 pixels.
"""

import dataclasses
import json

import numpy as np
import tyro

from mi_jax.avatar.folders import load_encoders
from mi_jax.data.features import to_signed
from mi_jax.models.tiling import encode_latents
from mi_jax.models.vae import VAE
from mi_jax.puppets.clips import draw

SHIFTS = (1, 2, 3, 4, 8)
BATCH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "puppet"
    pictures: int = 160
    first: int = 50_000
    """Number of the first training puppet."""


def encoded(vae: VAE, pictures: np.ndarray) -> np.ndarray:
    """Latents [n h w c] of single pictures [n H W 3]."""
    parts = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
    return np.concatenate([np.asarray(encode_latents(vae, to_signed(part)[:, None]))[:, 0] for part in parts])


def surroundings(latents: np.ndarray) -> np.ndarray:
    """The nine latents around each place, and a one: [n h w 9 c + 1]."""
    n, h, w, _ = latents.shape
    wide = np.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    around = [wide[:, y : y + h, x : x + w] for y in range(3) for x in range(3)]
    return np.concatenate([*around, np.ones((n, h, w, 1), latents.dtype)], axis=-1)


def explained(guess: np.ndarray, truth: np.ndarray) -> float:
    return float(1 - np.square(guess - truth).sum() / np.square(truth - truth.mean(0)).sum())


def main(args: Args) -> None:
    config, encoders = load_encoders(args.model)
    vae, stride = encoders.vae, encoders.vae.config.spatial_stride
    clips = [draw(args.first + i, seed=0, split="train", seconds=0.5, size=config.height) for i in range(args.pictures)]
    pictures = np.stack([clip.video[-1] for clip in clips])
    side = config.height // stride
    face = np.stack([clip.mask for clip in clips]).reshape(-1, side, stride, side, stride).mean((2, 4)) > 0.5
    face &= np.pad(np.ones((side - 2, side - 2), bool), 1)  # what is rolled over the edge stays out
    fitted = np.arange(args.pictures) < 3 * args.pictures // 4
    here = encoded(vae, pictures)
    known = surroundings(here)
    for shift in SHIFTS:
        moved = encoded(vae, np.roll(pictures, shift, axis=2))
        x, y = known[face & fitted[:, None, None]], moved[face & fitted[:, None, None]]
        weights = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
        held_out = face & ~fitted[:, None, None]
        scores = {
            "linear": round(explained(known[held_out] @ weights, moved[held_out]), 3),
            "unmoved": round(explained(here[held_out], moved[held_out]), 3),
        }
        print(json.dumps({"pixels": shift, **scores}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
