"""What a video takes in memory, known before anything is loaded or computed."""

import jax

from mi_jax.avatar.config import AvatarConfig
from mi_jax.errors import InputError
from mi_jax.memory import as_size, check_host_memory
from mi_jax.rates import FPS


def host_bytes_of(config: AvatarConfig, frames: int, voices: int) -> int:
    """The least that the host must hold at once for a video of `frames`: latents and decoded pixels, whose pieces are
    put together at the end, or before that the states of its voices, put together too."""
    pixels = 2 * frames * config.height * config.width * 3
    heard = 0
    if voices and config.wav2vec2 is not None:
        heard = 2 * voices * (2 * frames) * config.wav2vec2.num_hidden_states * config.wav2vec2.width * 4
    return max(_latent_bytes(config, frames) + pixels, heard)


def device_bytes_of(config: AvatarConfig, frames: int, window: int) -> int:
    """The least that the devices together must hold at once: the video's latents and their velocity, and of one window
    the tokens with what a block makes of them (queries, keys, values and the MLP's inside)."""
    height, width = (side // config.vae.spatial_stride for side in config.padded_size)
    tokens = min(window, _latent_frames(config, frames)) * height * width // (config.dit.patch[1] * config.dit.patch[2])
    block = tokens * config.dit.width * (4 + config.dit.mlp_ratio) * (4 if config.dtype == "float32" else 2)
    return 2 * _latent_bytes(config, frames) + block


def check_memory(config: AvatarConfig, frames: int, voices: int, window: int) -> None:
    """Whether a video of `frames` can be made here at all.

    Raises:
      InputError: the machine, or its accelerators, have less memory than the least that it takes.
    """
    what = f"a video of {frames / FPS:g} s and {config.width}x{config.height} pixels"
    needed, on_devices = host_bytes_of(config, frames, voices), device_bytes_of(config, frames, window)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if None in limits:  # CPUs: the host's memory is the devices'
        needed = max(needed, on_devices)
    elif on_devices > sum(limits):
        raise InputError(
            f"{what} takes at least {as_size(on_devices)} of the accelerators' memory, there are {as_size(sum(limits))}"
        )
    check_host_memory(needed, what)


def _latent_frames(config: AvatarConfig, frames: int) -> int:
    return -(-(config.lead_in + frames - 1) // config.vae.temporal_stride) + 1


def _latent_bytes(config: AvatarConfig, frames: int) -> int:
    height, width = (side // config.vae.spatial_stride for side in config.padded_size)
    return 4 * _latent_frames(config, frames) * height * width * config.vae.latent_channels
