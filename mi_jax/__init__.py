"""MagicInfinite in JAX: a portrait, voices and a sentence of direction become a talking video of any length.

avatar = mi_jax.load("puppet")
video = avatar.animate("portrait.png", [mi_jax.Speaker("speech.wav")], prompt="She is happy.", seed=0)
mi_jax.save_video("out.mp4", video, "speech.wav")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mi_jax.conditions import Conditions
    from mi_jax.errors import InputError
    from mi_jax.sample.avatar import Avatar, load
    from mi_jax.sample.inputs import Speaker
    from mi_jax.sample.save import save_video

__all__ = ["Avatar", "Conditions", "InputError", "Speaker", "load", "save_video"]

_HOMES = {
    "Conditions": "mi_jax.conditions",
    "InputError": "mi_jax.errors",
    "Speaker": "mi_jax.sample.inputs",
    "save_video": "mi_jax.sample.save",
}


def __getattr__(name: str):
    """Imports on first use: the models need JAX alone, a whole avatar also PyAV, Pillow and tokenizers."""
    if name not in __all__:
        raise AttributeError(f"module 'mi_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "mi_jax.sample.avatar")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
