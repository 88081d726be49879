"""config.json: reading it, and config dataclasses as JSON and back."""

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from mi_jax.bounds import fault_of, hints_of, shown
from mi_jax.errors import InputError
from mi_jax.untrusted import read_json

__all__ = ["config_from_json", "config_to_json", "read_json", "understood"]


@contextlib.contextmanager
def understood(where: str | os.PathLike, fault: str = "a value is missing or of another kind") -> Iterator[None]:
    """What goes wrong inside with the values of a file becomes an InputError that names the file."""
    try:
        yield
    except InputError as error:
        raise (error if str(error).startswith(str(where)) else InputError(f"{where}: {error}")) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: {fault} ({error!r})") from None


def config_to_json(config: Any) -> Any:
    """A (nested) dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(kind: Any, value: Any, where: str | os.PathLike, field: str = "") -> Any:
    """Rebuilds a config dataclass of type `kind` from JSON: nested dataclasses, optionals, tuples and scalars.

    Raises:
      InputError: a field is unknown, missing, of another type or out of its bounds (`mi_jax.bounds`). The line names
        the file `where` and the field, which lies in that file under `field`.
    """
    place = f"{where}: {field}" if field else str(where)
    if not isinstance(value, dict):
        raise InputError(f"{place} is {shown(value)}, no {kind.__name__}")
    hints = hints_of(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    for fault, names in (("has no field", value.keys() - hints.keys()), ("lacks", required - value.keys())):
        if names:
            raise InputError(f"{place}: {kind.__name__} {fault} {', '.join(sorted(names))}")
    inside = f"{field}." if field else ""
    values = {name: _from_json(hints[name], given, where, inside + name) for name, given in value.items()}
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _from_json(hint: Any, value: Any, where: str | os.PathLike, field: str) -> Any:
    """A field's value, held against its type and bounds."""
    nested = next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)
    if nested is not None and not (value is None and type(None) in _options(hint)):
        return config_from_json(nested, value, where, field)
    value = _tuples(value)
    fault = fault_of(hint, value, field)
    if fault:
        raise InputError(f"{where}: {fault}")
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Annotated:
        return _options(typing.get_args(hint)[0])
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
