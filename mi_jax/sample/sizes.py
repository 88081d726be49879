"""What a video takes in memory, known before anything is loaded or computed."""

import jax

from mi_jax.avatar.config import AvatarConfig
from mi_jax.errors import InputError
from mi_jax.memory import as_size, check_host_memory
from mi_jax.rates import FPS
from mi_jax.sample.order import Order, held_windows


def array_bytes_of(config: AvatarConfig, frames: int) -> int:
    """The least that the host must hold at once for a video of `frames` that is an array: its pieces, which are put
    together at the end."""
    return 2 * frames * config.height * config.width * 3


def device_bytes_of(
    config: AvatarConfig, frames: int | None, window: int, overlap: int, order: Order = "wavefront", group: int = 1
) -> int:
    """The least that the devices together must hold at once: the latents under way with the sum of their velocities,
    and of one window the tokens with what a block makes of them (queries, keys, values and the MLP's inside)."""
    height, width = (side // config.vae.spatial_stride for side in config.padded_size)
    step = window - overlap
    windows = held_windows(order, config.steps, (window - 1) // step, group)
    latent_frames = float("inf") if frames is None else config.latent_frames(frames)
    own = min(window, latent_frames)
    tokens = own * height * width // (config.dit.patch[1] * config.dit.patch[2])
    block = tokens * config.dit.width * (4 + config.dit.mlp_ratio) * (4 if config.dtype == "float32" else 2)
    held = latent_frames if latent_frames <= window or windows is None else (windows - 1) * step + window
    return 2 * 4 * held * height * width * config.vae.latent_channels + block


def check_device_memory(
    config: AvatarConfig, frames: int | None, window: int, overlap: int, order: Order = "wavefront", group: int = 1
) -> None:
    """Whether the devices can hold what is under way at once of a video; frames: None where they are not known yet.

    Raises:
      InputError: they have less memory than the least that it takes.
    """
    needed = device_bytes_of(config, frames, window, overlap, order, group)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if None in limits:  # CPUs: the host's memory is the devices'
        check_host_memory(needed, _described(config, frames))
    elif needed > sum(limits):
        raise InputError(
            f"{_described(config, frames)} takes at least {as_size(needed)} of the accelerators' memory, there are "
            f"{as_size(sum(limits))}"
        )


def check_array_memory(config: AvatarConfig, frames: int) -> None:
    """Whether a video fits into the host's memory as an array.

    Raises:
      InputError: it does not; `mi-jax animate` and `Avatar.stream` need no such array.
    """
    check_host_memory(array_bytes_of(config, frames), _described(config, frames))


def _described(config: AvatarConfig, frames: int | None) -> str:
    length = "any length" if frames is None else f"{frames / FPS:g} s"
    return f"a video of {length} and {config.width}x{config.height} pixels"
