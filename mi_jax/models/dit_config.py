"""The denoiser's sizes, and its presets."""

import dataclasses
from typing import Annotated, Literal

from mi_jax.bounds import Channels, Depth, Heads, Positive, Ratio, Width, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.models.attention import Implementation
from mi_jax.models.audio_encoder import AudioEncoderConfig

Remat = Literal["none", "blocks", "offload"]
Kind = Literal["double", "single"]
_Axis = Annotated[int, Within(2, 1024)]
_Patch = Annotated[int, Within(1, 16)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of the denoiser. Defaults are HunyuanVideo's (`HYVideo-T/2`)."""

    latent_channels: Channels = 16
    image_to_video: bool = False
    """Adds portrait latents and a start mask to the input channels: 2 * latent_channels + 1 in all."""
    token_replace: bool = False
    """The other way from image to video (HunyuanVideo-I2V): in a window that starts with the portrait, its latents take
    the place of latent frame 0, whose tokens are modulated as at time 0."""
    patch: tuple[_Patch, _Patch, _Patch] = (1, 2, 2)
    width: Width = 3072
    heads: Heads = 24
    mlp_ratio: Ratio = 4
    double_depth: Depth = 20
    single_depth: Depth = 40
    double_per_body: Depth = 1
    """Double blocks of one scanned body; they divide `double_depth`."""
    single_per_body: Depth = 2
    audio_after: tuple[Kind, ...] = ("double", "single")
    """After the bodies of which kinds audio attention stands, in a model that has audio."""
    refiner_depth: Depth = 2
    text_dim: Width = 4096
    pooled_dim: Width | None = 768
    guidance_embedding: bool = False
    rope_axes: tuple[_Axis, _Axis, _Axis] = (16, 56, 56)
    rope_theta: Positive = 256.0
    audio: AudioEncoderConfig | None = None
    attention: Implementation = "auto"
    ulysses: Heads | None = None
    """How many devices of the mesh's `seq` axis exchange heads; the others pass keys around a ring. By default the most
    that divide both."""
    remat: Remat = "blocks"
    """What the backward pass finds of a body's activations: all of them ("none" is recomputed); the tokens that enter
    it ("blocks"); or these, brought back from the host's memory ("offload")."""
    unroll: Depth = 1
    """Bodies per step of the scans over depth. In small models the scan's own copies count: all of them at once are
    faster, and compile no longer."""

    def __post_init__(self):
        check_fields(self)
        if self.width % self.heads or sum(self.rope_axes) != self.width // self.heads:
            raise InputError(f"rope_axes {self.rope_axes} must sum to the head dim {self.width}/{self.heads}")
        if any(axis % 2 for axis in self.rope_axes):
            raise InputError(f"rope_axes {self.rope_axes} must be even: they are turned in pairs")
        for kind in ("double", "single"):
            depth, count = getattr(self, f"{kind}_depth"), getattr(self, f"{kind}_per_body")
            if depth % count:
                raise InputError(f"{kind}_depth {depth} must be a multiple of {kind}_per_body {count}")
        if self.patch[0] != 1:
            raise InputError("the temporal patch must be 1")
        if self.image_to_video and self.token_replace:
            raise InputError("a portrait is given as channels (image_to_video) or as tokens (token_replace), not both")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def bodies(self, kind: Kind) -> int:
        """How many bodies the scan over blocks of this kind has."""
        return getattr(self, f"{kind}_depth") // getattr(self, f"{kind}_per_body")

    def hears(self, kind: Kind) -> bool:
        """Whether audio attention stands after the bodies of this kind."""
        return self.audio is not None and kind in self.audio_after

    @property
    def in_channels(self) -> int:
        return 2 * self.latent_channels + 1 if self.image_to_video else self.latent_channels

    @classmethod
    def hunyuan_video(cls) -> "DiTConfig":
        """Tencent's 13B text-to-video model with embedded guidance: 12,821,012,544 parameters."""
        return cls(guidance_embedding=True)

    @classmethod
    def magic_infinite_13b(cls, audio: bool = True) -> "DiTConfig":
        """The paper's model: 33 input channels, no embedded guidance; 12,810,991,680 parameters without audio
        (stage 1)."""
        return cls(image_to_video=True, audio=AudioEncoderConfig.base() if audio else None)

    @classmethod
    def puppet(cls, audio: bool = True) -> "DiTConfig":
        """The toy of the same kind that this project trains: 96x96 puppets, 36 tokens a latent frame."""
        return cls(
            image_to_video=True,
            width=256,
            heads=4,
            double_depth=2,
            single_depth=6,
            refiner_depth=1,
            text_dim=128,
            pooled_dim=96,
            rope_axes=(16, 24, 24),
            audio=AudioEncoderConfig.puppet() if audio else None,
            remat="none",
            unroll=3,
        )
