"""Arrays that callers hand over, of any library."""

from typing import Any

import numpy as np

from mi_jax.errors import InputError


def array_from(value: Any, name: str, wanted: str) -> np.ndarray:
    """A numpy, JAX or PyTorch array, a PIL image, or a list of these or of numbers, as a numpy array.

    Raises InputError: none of these; `name` is what the value is called there, `wanted` what to give instead.
    """
    try:
        if isinstance(value, list | tuple) and any(hasattr(item, "detach") for item in value):
            value = [array_from(item, name, wanted) for item in value]
        if hasattr(value, "detach"):  # PyTorch: numpy takes no gradients, no other device, no bfloat16
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        array = np.asarray(value)
    except Exception as fault:  # whatever a foreign class raises when it is asked for an array
        raise InputError(f"{name}: {_kind(value)} cannot be meant: give {wanted}") from fault
    if array.dtype.kind in "OUSMm":
        raise InputError(f"{name}: {_kind(value)} cannot be meant: give {wanted}")
    return array


def is_floating(array: np.ndarray) -> bool:
    """Also of bfloat16, which is a foreign kind to numpy."""
    return array.dtype.kind == "f" or (array.dtype.kind == "V" and array.dtype.name.startswith(("bfloat", "float")))


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
