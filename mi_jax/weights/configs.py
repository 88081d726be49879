"""config.json: reading it, and config dataclasses as JSON and back."""

import dataclasses
import json
import pathlib
import types
import typing
from typing import Any

from mi_jax.errors import InputError


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, such as a config.json.

    Raises:
      InputError: the file is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value


def config_to_json(config: Any) -> Any:
    """A (nested) dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(kind: Any, value: Any, where: str) -> Any:
    """Rebuilds a config dataclass of type `kind` from JSON: nested dataclasses, optionals, tuples and scalars.

    Raises:
      InputError: a field is unknown, missing or of another type, named with `where` it was read.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {value!r} is no {kind.__name__}")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - set(hints))
        if unknown:
            raise InputError(f"{where}: {kind.__name__} has no field {', '.join(unknown)}")
        try:
            return kind(**{name: config_from_json(hints[name], v, f"{where}.{name}") for name, v in value.items()})
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from None
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else config_from_json(options[0], value, where)
    if typing.get_origin(kind) is tuple or isinstance(value, list):
        if not isinstance(value, list):
            raise InputError(f"{where}: {value!r} is no list")
        items = typing.get_args(kind)
        item = items[0] if items and (len(items) == 1 or items[-1] is Ellipsis or len(set(items)) == 1) else Any
        return tuple(config_from_json(item, v, where) for v in value)
    # JSON writes 3.0 as 3, and knows true apart from 1.
    fits = {int: int, float: (int, float), str: str, bool: bool}.get(kind)
    if fits is not None and (not isinstance(value, fits) or isinstance(value, bool) != (kind is bool)):
        raise InputError(f"{where}: {value!r} is no {kind.__name__}")
    if typing.get_origin(kind) is typing.Literal and value not in typing.get_args(kind):
        raise InputError(f"{where}: {value!r} is none of {', '.join(map(str, typing.get_args(kind)))}")
    return value
