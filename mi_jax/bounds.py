"""Which values the fields of a config take: said in their types, and checked by one function wherever they come from.

    width: Annotated[int, Within(1, 65_536)]          a dataclass whose __post_init__ calls `check_fields`
    windows: tuple[tuple[Length, Count], ...]         types may be nested, and may have names (`Share` below)
    steps: Annotated[int, Within(1, 1000)] | None     also an argument of a command (`commands.terminal.parsed`)

Every float is finite, without saying so. Bounds are generous: they tell what cannot be meant from what is unusual.
"""

import dataclasses
import functools
import math
import numbers
import reprlib
import types
import typing
from typing import Annotated, Any

from mi_jax.errors import InputError

_NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}
_OTHERS = {str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Within:
    """The numbers from `least` to `most`; an end given as `above` or `below` does not belong to them."""

    least: float | int | None = None
    most: float | int | None = None
    above: float | int | None = None
    below: float | int | None = None

    def __post_init__(self):
        if (self.least is None) == (self.above is None) or (self.most is None) == (self.below is None):
            raise ValueError("one lower and one upper end is needed")

    def holds(self, value: float | int) -> bool:
        from_below = value > self.above if self.least is None else value >= self.least
        from_above = value < self.below if self.most is None else value <= self.most
        return from_below and from_above

    def __str__(self) -> str:
        """What must be: "must lie in [0, 1)"."""
        low = f"({self.above:.10g}" if self.least is None else f"[{self.least:.10g}"
        high = f"{self.below:.10g})" if self.most is None else f"{self.most:.10g}]"
        return f"must lie in {low}, {high}"


Share = Annotated[float, Within(0, 1)]
"""A part of a whole, or a probability."""
Weight = Annotated[float, Within(0, 1e6)]
"""Of a term of a loss."""
Positive = Annotated[float, Within(above=0, most=1e6)]
Epsilon = Annotated[float, Within(above=0, most=1)]
"""What keeps a norm from dividing by 0."""

Width = Annotated[int, Within(1, 2**17)]
"""Features of a layer."""
Heads = Annotated[int, Within(1, 1024)]
Depth = Annotated[int, Within(1, 1024)]
"""Layers, one after the other."""
Ratio = Annotated[int, Within(1, 64)]
"""Of a layer's inner width to its own."""
Channels = Annotated[int, Within(1, 16_384)]
"""Of latents or of a convolution."""
Taps = Annotated[int, Within(1, 1024)]
"""Extent of a convolution along one axis, or its stride."""
TokenId = Annotated[int, Within(0, 2**24)]
Vocabulary = Annotated[int, Within(1, 2**24)]
Tokens = Annotated[int, Within(1, 8192)]
"""Of one text or one picture."""
Pixels = Annotated[int, Within(1, 8192)]
"""A side of a picture."""
LatentFrames = Annotated[int, Within(1, 10_000)]
"""Of a window, or of a clip to train on: 10,000 are 26 minutes."""
Devices = Annotated[int, Within(1, 10**6)]
Workers = Annotated[int, Within(0, 1024)]
"""Processes beside this one."""
Count = Annotated[int, Within(0, 10**9)]
"""Of clips, or the number of one."""
Batch = Annotated[int, Within(1, 10**6)]
Steps = Annotated[int, Within(1, 10**9)]
"""Of an optimiser."""
SamplingSteps = Annotated[int, Within(1, 10_000)]
Level = Annotated[float, Within(above=0, most=1)]
"""A noise level."""
Guidance = Annotated[float, Within(-100, 100)]
Shift = Annotated[float, Within(above=0, most=1000)]
"""Of noise levels (`diffusion.shift_sigma`)."""
Seconds = Annotated[float, Within(above=0, most=10**7)]
"""Of a video; what memory has room for is another matter (`sample.sizes`)."""
ClipSeconds = Annotated[float, Within(0.2, 3600)]
"""Of a drawn clip."""
PuppetSize = Annotated[int, Within(16, 1024)]
"""Side of a drawn picture, in pixels."""
Seed = Annotated[int, Within(0, 2**32 - 1)]


def check_fields(config: Any) -> None:
    """Holds every field of a dataclass against its type.

    Raises:
      InputError: a value is of another kind, no finite number or out of its bounds. The line names class and field.
    """
    for name, hint in hints_of(type(config)).items():
        fault = fault_of(hint, getattr(config, name), f"{type(config).__name__}.{name}")
        if fault:
            raise InputError(fault)


def check_levels(levels: tuple[float, ...]) -> None:
    """Raises InputError unless noise levels fall from 1."""
    if not levels or levels[0] != 1 or list(levels) != sorted(set(levels), reverse=True):
        raise InputError(f"levels {levels}: must fall from 1, each below the one before")


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass, or the arguments of a function, with their types and bounds."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}
    return hints


def fault_of(hint: Any, value: Any, name: str) -> str | None:
    """What is wrong with a value for a type with bounds, in one line that begins with `name`; None: nothing.

    Types of other kinds than configs have (callables, protocols, type variables) take anything.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fault = fault_of(parts[0], value, name)
        bounds = [note for note in parts[1:] if isinstance(note, Within)]
        return fault or next((f"{name} is {shown(value)}, {bound}" for bound in bounds if not bound.holds(value)), None)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        faults = [fault_of(part, value, name) for part in parts if part is not type(None)]
        return None if None in faults else faults[0]
    if origin is typing.Literal:
        known = any(value == choice and type(value) is type(choice) for choice in parts)
        return None if known else f"{name} is {shown(value)}, none of {', '.join(map(str, parts))}"
    if origin is tuple:
        return _tuple_fault(parts, value, name)
    if hint in _NUMBERS:
        kind, words = _NUMBERS[hint]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {shown(value)}, must be {words}"
        return None if hint is int or _is_finite(value) else f"{name} is {shown(value)}, must be a finite number"
    if hint in _OTHERS:
        return None if isinstance(value, hint) else f"{name} is {shown(value)}, must be {_OTHERS[hint]}"
    if dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        return f"{name} is {shown(value)}, must be a {hint.__name__}"
    return None


def _tuple_fault(items: tuple[Any, ...], value: Any, name: str) -> str | None:
    if not isinstance(value, tuple):
        return f"{name} is {shown(value)}, must be a list"
    if len(items) == 2 and items[1] is Ellipsis:
        items = items[:1] * len(value)
    if len(items) != len(value):
        return f"{name} has {len(value)} entries, must have {len(items)}"
    faults = (fault_of(item, entry, f"{name}[{i}]") for i, (item, entry) in enumerate(zip(items, value)))
    return next((fault for fault in faults if fault), None)


def shown(value: Any) -> str:
    """A value in a message, of bounded length."""
    if isinstance(value, int) and value.bit_length() > 100:
        return f"a number of {value.bit_length()} bits"
    return str(value) if isinstance(value, float) else reprlib.repr(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
