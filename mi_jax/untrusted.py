"""Folders and files that others made, judged before they are opened: they are data, and nobody's code runs here.

A folder that brings Python code, or names some for transformers to run, is refused; so are pipes and devices, which
would have a reader wait for ever, and JSON that is no config. Files may be links: the Hugging Face cache is made of
them.
"""

import json
import pathlib
import stat
from typing import Any

from mi_jax.errors import InputError
from mi_jax.files import PathLike, reason

MOST_BYTES = 100 * 10**6
"""Of a JSON file, and of the header of a safetensors file (as safetensors itself has it)."""


def read_json(path: PathLike) -> dict[str, Any]:
    """A JSON object, such as a config.json.

    Raises:
      InputError: the file is missing, no regular file, too long or no JSON object.
    """
    path = regular_file(path)
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: longer than {MOST_BYTES // 10**6} MB, which no config is")
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({reason(error)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object")
    return value


def regular_file(path: PathLike) -> pathlib.Path:
    """`path` as a Path; raises InputError unless a file with content lies there, itself or at the end of links.

    Pipes and devices are refused before they are opened: they would have a reader wait, or read without end.
    """
    path = pathlib.Path(path)
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as fault:  # a name with a NUL is a ValueError
        raise InputError(f"{path}: {reason(fault)}") from None
    if not stat.S_ISREG(kind):
        raise InputError(f"{path}: {'a folder' if stat.S_ISDIR(kind) else 'a pipe or a device'}, a file is needed")
    return path


def check_folder(folder: pathlib.Path) -> None:
    """Whether a folder of a model or a tokenizer holds data alone, in files that can be read.

    Raises:
      InputError: it holds or names code of its own, or something that is neither file nor folder.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: {reason(error)}") from None
    for path in paths:
        if path.suffix in (".py", ".pyc", ".so"):
            raise InputError(f"{path}: code that a model brings is not run; a folder with it is not read")
        if path.is_dir() or not path.exists():
            continue
        regular_file(path)
        if path.suffix == ".json" and ("config" in path.name or path.name == "tokenizer.json"):
            _refuse_named_code(path)


def _refuse_named_code(path: pathlib.Path) -> None:
    """`auto_map` is how a config names the class in a Python file that transformers is to run."""
    if path.name == "tokenizer.json":  # large, and its vocabulary may have any word
        named = b"auto_map" in path.read_bytes() and "auto_map" in read_json(path)
    else:
        named = _holds(read_json(path), "auto_map")
    if named:
        raise InputError(f"{path}: its auto_map asks to run code of the model's own, which is not done")


def _holds(value: Any, key: str) -> bool:
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if key in value:
                return True
            rest += value.values()
        elif isinstance(value, list):
            rest += value
    return False
