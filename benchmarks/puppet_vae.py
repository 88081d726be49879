"""What a puppet VAE keeps of held-out clips, and what is left when its latents are noisy.

    python benchmarks/puppet_vae.py [--model puppet] [--clips 12] [--noise 0.25]

Prints the PSNR (dB, of all pixels of a clip; mean over clips) of the reconstruction, and the correlation of the mouth
opening read from it with the true one, without noise and with noise of `--noise` standard deviations of the latents.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mi_jax.avatar.folders import find_model, load_part
from mi_jax.data.features import to_pixels, to_signed
from mi_jax.models.tiling import decode_latents, encode_latents
from mi_jax.puppets.clips import draw
from mi_jax.puppets.reading import correlation, mouth_opening


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "puppet"
    clips: int = 12
    noise: float = 0.25
    seconds: float = 1.64
    seed: int = 0
    """Of the held-out puppets."""


def main(args: Args) -> None:
    vae = load_part(find_model(args.model), "vae")
    found: dict[str, list[tuple[float, float]]] = {"clean": [], "noisy": []}
    for i in range(args.clips):
        clip = draw(i, seed=args.seed, split="test", seconds=args.seconds)
        latents = encode_latents(vae, jnp.asarray(to_signed(clip.video))[None])
        noise = jax.random.normal(jax.random.key(i), latents.shape)
        for name, level in (("clean", 0.0), ("noisy", args.noise)):
            video = to_pixels(decode_latents(vae, latents + level * np.std(latents) * np.asarray(noise))[0])
            error = np.mean(np.square(video.astype(np.float64) - clip.video))
            mouth = correlation(mouth_opening(video, clip.attributes), clip.mouth[:, 0])
            found[name].append((10 * np.log10(255**2 / error), mouth))
    for name, values in found.items():
        psnr, mouth = np.mean(values, axis=0)
        print(json.dumps({"latents": name, "psnr": round(psnr, 2), "mouth_correlation": round(mouth, 3)}))


if __name__ == "__main__":
    main(tyro.cli(Args))
