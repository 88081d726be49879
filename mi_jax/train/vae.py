"""The VAE's objective: reconstruct short clips, faces and mouths above all, through latents of about unit scale."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mi_jax.data.batches import batches
from mi_jax.mesh import gather_parameters
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.train.checkpoints import warm_start


@dataclass(frozen=True, kw_only=True)
class VAEObjective:
    """Weighted L1 of pixels and of their differences, plus KL, on windows of puppet clips drawn on the fly.

    vae: what is trained. batch_size, frames, size: clips per batch, frames (4k + 1) and pixels of each.
    seconds: length of the clips, of each of which a window of `frames` frames at a random place is drawn.
    detail_weight: of the L1 between differences of neighbouring pixels and of successive frames, which L1 alone blurs.
    kl_weight: of the KL divergence from a unit Gaussian, mean over latent entries: small, so that it sets the scale of
      the latents and not their content.
    face_weight, mouth_weight: what a face pixel and the centre of a mouth count beyond the 1 of every pixel;
      mouth_radius: standard deviation of that soft disc, in mouth widths.
    init_from: a finished run, or a model folder, whose VAE this one starts from.
    decoder_only: keep the encoder as it is: the latents stay those that a denoiser was trained on.
    latent_noise: most noise, in standard deviations of the latents, that an example is decoded with; how much is drawn
      uniformly. Such a decoder forgives what a denoiser leaves.
    """

    vae: VAEConfig = field(default_factory=VAEConfig.puppet)
    batch_size: int = 3
    frames: int = 9
    size: int = 96
    seconds: float = 5.16
    detail_weight: float = 1.0
    kl_weight: float = 1e-4
    face_weight: float = 1.0
    mouth_weight: float = 4.0
    mouth_radius: float = 0.6
    init_from: str | None = None
    decoder_only: bool = False
    latent_noise: float = 0.0

    def init(self, key: jax.Array) -> VAE:
        # Not jitted: one program with a random draw per parameter takes XLA longer to compile than the training step.
        vae = VAE(self.vae, rngs=nnx.Rngs(key))
        return vae if self.init_from is None else warm_start(vae, self.init_from, "vae")

    def trainable(self, path: tuple[str | int, ...]) -> bool:
        return not self.decoder_only or path[0] in ("post_quant_conv", "decoder")

    def dataset(self, seed: int, share: int = 0, shares: int = 1) -> Iterable[dict[str, Any]]:
        """Batches without end: video uint8 [b f H W 3], mouth f32 [b f 4] (opening, width, x, y), mask bool [b H W]."""
        import grain

        windows = _Windows(seed=seed, frames=self.frames, seconds=self.seconds, size=self.size)
        return batches(grain.MapDataset.source(windows).repeat(), self.batch_size, share, shares)

    def loss(
        self, model: VAE, batch: dict[str, Array | np.ndarray], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = gather_parameters(model)
        video = to_unit(batch["video"])
        mean, logvar = model.encode(video)
        noise_key, level_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, mean.shape, mean.dtype)
        scale = jnp.exp(0.5 * logvar)
        if self.latent_noise:
            level = jax.random.uniform(level_key, (mean.shape[0], 1, 1, 1, 1), maxval=self.latent_noise)
            scale = scale + level * jnp.std(mean)  # with its gradient: larger latents must not pay
        output = model.decode(mean + scale * noise)

        weight = 1.0 + self.face_weight * batch["mask"].astype(jnp.float32)[:, None, :, :, None]
        weight = weight + self.mouth_weight * mouth_disc(batch["mouth"], video.shape[2:4], self.mouth_radius)[..., None]
        pixels, detail = weighted_l1(video, output, weight)
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3, 4))
        loss = pixels + self.detail_weight * detail + self.kl_weight * kl
        squared = jnp.mean(jnp.square(output - video), axis=(1, 2, 3, 4))
        scalars = {
            "pixels": pixels.mean(),
            "detail": detail.mean(),
            "kl": kl.mean(),
            "psnr": jnp.mean(psnr(squared)),
            "latent_std": jnp.std(mean),
            "latent_noise": jnp.mean(jnp.exp(0.5 * logvar)),
        }
        return loss, scalars

    def sample(self, model: VAE, batch: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
        """The batch's clips one below the other, uint8 [f b*H 2*W 3]: truth left, reconstruction right."""
        video = np.asarray(batch["video"])
        output = np.asarray(_reconstruct(model, video))
        both = np.concatenate([video, output], axis=3)
        return {"reconstruction": np.concatenate(list(both), axis=1)}


def to_unit(video: jax.Array) -> jax.Array:
    """uint8 0 .. 255 to f32 -1 .. 1."""
    return video.astype(jnp.float32) / 127.5 - 1.0


@jax.jit
def _reconstruct(model: VAE, video: jax.Array) -> jax.Array:
    output = model.decode(model.encode(to_unit(video))[0])
    return jnp.clip(jnp.round((output + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def psnr(squared_error: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio [dB] of a mean squared error of values in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(squared_error, 1e-12))


def weighted_l1(
    target: Float[Array, "b f H W 3"], output: Float[Array, "b f H W 3"], weight: Float[Array, "b f H W 1"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Weighted mean absolute error of each example, and the same of its differences along height, width and time."""
    error = output - target
    scale = 1.0 / jnp.mean(weight, axis=(1, 2, 3, 4), keepdims=True)
    pixels = jnp.mean(jnp.abs(error) * (weight * scale), axis=(1, 2, 3, 4))

    def along(axis):
        # The difference of the errors is the error of the differences.
        n = error.shape[axis]
        if n == 1:
            return jnp.zeros_like(pixels)
        w = jax.lax.slice_in_dim(weight, 1, n, axis=axis) * scale
        return jnp.mean(jnp.abs(jnp.diff(error, axis=axis)) * w, axis=(1, 2, 3, 4))

    return pixels, (along(1) + along(2) + along(3)) / 3.0


def mouth_disc(mouth: Float[Array, "b f 4"], size: tuple[int, int], radius: float) -> Float[Array, "b f H W"]:
    """A soft disc (Gaussian, 1 at the centre) on each frame's mouth: radius in mouth widths, at least three pixels.

    mouth: opening, width, x, y as fractions of the picture.
    """
    height, width = size
    _, mouth_width, x, y = (mouth[..., i][..., None, None] for i in range(4))
    rows = ((jnp.arange(height, dtype=jnp.float32) + 0.5).reshape(1, 1, -1, 1) / height - y) * (height / width)
    columns = (jnp.arange(width, dtype=jnp.float32) + 0.5).reshape(1, 1, 1, -1) / width - x
    sigma = jnp.maximum(radius * mouth_width, 3.0 / width)
    return jnp.exp(-0.5 * (jnp.square(rows) + jnp.square(columns)) / jnp.square(sigma))


def measure_scaling_factor(vae: VAE, clips: Iterable[np.ndarray]) -> float:
    """1 / standard deviation of the latent means of uint8 clips [f H W 3]: the `VAEConfig.scaling_factor` to store."""
    encode = jax.jit(lambda vae, video: vae.encode(to_unit(video))[0])
    count, total, squares = 0, 0.0, 0.0
    for clip in clips:
        mean = np.asarray(encode(vae, clip[None]), np.float64)
        count, total, squares = count + mean.size, total + mean.sum(), squares + np.square(mean).sum()
    if count == 0:
        raise ValueError("no clips to measure the scaling factor on")
    return float(1.0 / np.sqrt(squares / count - (total / count) ** 2))


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """A Grain data source: `frames` frames at a random place of training clip `index`; only those are drawn."""

    seed: int
    frames: int
    seconds: float
    size: int

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        from mi_jax.data.puppets import draw, num_frames

        last = num_frames(self.seconds) - self.frames
        start = int(np.random.default_rng([self.seed, index]).integers(0, last + 1))
        window = (start, start + self.frames)
        clip = draw(index, seed=self.seed, split="train", seconds=self.seconds, size=self.size, window=window)
        return {"video": clip.video, "mouth": clip.mouth.astype(np.float32), "mask": clip.mask}
