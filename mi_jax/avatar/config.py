"""What the config.json of a model folder says of a whole avatar."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.bounds import Guidance, Level, Pixels, SamplingSteps, Share, Shift, Within, check_fields, check_levels
from mi_jax.diffusion import shift_sigma, sigma_schedule
from mi_jax.errors import InputError
from mi_jax.models.dit import DiTConfig
from mi_jax.models.mllm import MLLMConfig
from mi_jax.models.vae import VAEConfig
from mi_jax.models.wav2vec2 import Wav2Vec2Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class AvatarConfig:
    """config.json of a model folder: the sizes of the networks and how they are sampled.

    height, width: of the video in pixels; the networks run at the next multiple that they take (540: 544, cropped).
    steps, shift: Euler steps, and the shift of their noise levels towards 1.
    levels: noise levels of so many steps, before the shift, where they are not evenly spaced (a distilled model's).
    wav2vec2: None for a model that hears nothing.
    guidance_audio, guidance_text: default weights of `Guidance`; 0 for a distilled model.
    embedded_guidance: the scale that a denoiser with a guidance embedding is told (HunyuanVideo's 6).
    portrait_in_noise: share of the portrait's latents in the noise that sampling starts from (HunyuanVideo-I2V: 0.001).
    lead_in: video frames before the first one shown (HunyuanVideo-I2V with the portrait as channels: 4).
    dtype: of the denoiser and the MLLM; the VAE and wav2vec2 are f32.
    """

    dit: DiTConfig
    vae: VAEConfig
    wav2vec2: Wav2Vec2Config | None
    mllm: MLLMConfig
    height: Pixels
    width: Pixels
    steps: SamplingSteps
    shift: Shift
    guidance_audio: Guidance = 0.0
    guidance_text: Guidance = 0.0
    embedded_guidance: Guidance = 6.0
    portrait_in_noise: Share = 0.0
    lead_in: Annotated[int, Within(0, 1000)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    levels: tuple[Level, ...] | None = None

    def __post_init__(self):
        check_fields(self)
        if self.levels is not None:
            check_levels(self.levels)

    def sigmas(self, steps: int) -> Float[Array, "{steps}+1"]:
        """Noise levels of so many Euler steps, as the network is fed them."""
        if self.levels is not None and steps == len(self.levels):
            return shift_sigma(jnp.asarray([*self.levels, 0.0], jnp.float32), self.shift)
        return sigma_schedule(steps, self.shift)

    @classmethod
    def puppet(cls) -> "AvatarConfig":
        """What this project trains and ships: 96x96 puppets."""
        return cls(
            dit=DiTConfig.puppet(),
            vae=VAEConfig.puppet(),
            wav2vec2=Wav2Vec2Config.puppet(),
            mllm=MLLMConfig.puppet(),
            height=96,
            width=96,
            steps=25,
            shift=3.0,
            guidance_audio=1.0,
        )

    @classmethod
    def magic_infinite_13b(cls) -> "AvatarConfig":
        """The paper's model at 540x540, before distillation (HunyuanVideo's 50 steps and shift 7)."""
        return cls(
            dit=DiTConfig.magic_infinite_13b(),
            vae=VAEConfig.hunyuan_video(),
            wav2vec2=Wav2Vec2Config.base(),
            mllm=MLLMConfig.llava_llama3_8b(),
            height=540,
            width=540,
            steps=50,
            shift=7.0,
            guidance_audio=4.0,
            guidance_text=4.0,
            dtype="bfloat16",
        )

    def replace(self, **options) -> "AvatarConfig":
        """A copy with those of `options` that are not None.

        Raises:
          InputError: a video cannot be made so: a number out of its bounds, sides under one patch.
        """
        new = dataclasses.replace(self, **{name: value for name, value in options.items() if value is not None})
        least = new.vae.spatial_stride * max(new.dit.patch[1:])
        if min(new.height, new.width) < least:
            raise InputError(f"a video of {new.width}x{new.height} pixels cannot be made: at least {least} a side")
        return new

    def latent_frames(self, frames: int) -> int:
        """Of a video of so many frames shown."""
        return -(-(self.lead_in + frames - 1) // self.vae.temporal_stride) + 1

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width that VAE and patches divide."""
        multiple = [self.vae.spatial_stride * patch for patch in self.dit.patch[1:]]
        return tuple(-(-side // m) * m for side, m in zip((self.height, self.width), multiple, strict=True))
