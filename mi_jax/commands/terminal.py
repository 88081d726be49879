"""Arguments in, and one line or a progress bar out: what the commands share."""

import contextlib
import functools
import inspect
import io
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tyro

from mi_jax.bounds import Pixels, fault_of, hints_of
from mi_jax.errors import InputError
from mi_jax.interrupts import work_begins


def parsed(command: Callable[..., None]) -> Callable[[Sequence[str]], None]:
    """The command with its arguments parsed by their annotations, and held against the bounds in them (`bounds`). Those
    that are not its own are its `overrides`, if it takes any."""

    @functools.wraps(command)
    def bound(*args, **kwargs):
        return functools.partial(command, *args, **kwargs)

    def run(argv: Sequence[str]) -> None:
        prog = f"mi-jax {command.__name__}"
        with parsing(prog):
            if takes_overrides:
                call, rest = tyro.cli(bound, args=list(argv), prog=prog, return_unknown_args=True)
                call.keywords["overrides"] = tuple(rest)
            else:
                call = tyro.cli(bound, args=list(argv), prog=prog)
        check_arguments(command, call.keywords)
        call()

    takes_overrides = "overrides" in inspect.signature(command).parameters
    return run


def check_arguments(command: Callable[..., None], arguments: Mapping[str, Any]) -> None:
    """Raises InputError for the first argument of a command that is out of its bounds."""
    hints = hints_of(command)
    for name, value in arguments.items():
        fault = fault_of(hints[name], value, f"--{name.replace('_', '-')}")
        if fault:
            raise InputError(fault)


@contextlib.contextmanager
def parsing(prog: str) -> Iterator[None]:
    """Turns tyro's box about bad arguments into the one line that every bad input gets."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        box = captured.getvalue().split("For full helptext")[0]
        # The frame is drawn in Unicode or, where that cannot be shown, in ASCII.
        lines = [re.sub(r"^- |-{3,}", "", line.strip("│╭╮╰╯─|+ ")).strip() for line in box.splitlines()]
        raise InputError(f"{' '.join(line for line in lines if line)} ({prog} --help tells more)") from None
    sys.stderr.write(captured.getvalue())


def take_option(arguments: list[str], name: str) -> str | None:
    """The value of an option, which is taken out of `arguments`; None where it is not there."""
    for i, word in enumerate(arguments):
        if word == name or word.startswith(f"{name}="):
            value = arguments[i + 1 : i + 2] if word == name else [word.removeprefix(f"{name}=")]
            if not value or not value[0]:
                raise InputError(f"{name} needs a value")
            del arguments[i : i + (2 if word == name else 1)]
            return value[0]
    return None


def parse_size(option: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"{option} is {text!r}, must be HEIGHTxWIDTH in pixels")
    height, width = int(match[1]), int(match[2])
    fault = fault_of(Pixels, height, option) or fault_of(Pixels, width, option)
    if fault:
        raise InputError(fault)
    return height, width


def adaptations_of(words: Sequence[str]) -> list[tuple[pathlib.Path, float]]:
    """(file, weight) of arguments FILE or FILE:WEIGHT. A file whose own name ends so is taken as it is."""
    found = []
    for word in words:
        name, colon, number = word.rpartition(":")
        if not colon or pathlib.Path(word).exists():
            found.append((pathlib.Path(word), 1.0))
            continue
        try:
            found.append((pathlib.Path(name), float(number)))
        except ValueError:
            raise InputError(f"--lora {word}: after the colon comes a weight, not {number!r}") from None
    return found


class ProgressBar:
    """A bar that appears with the first call `bar(done, total)`, after all that is said before."""

    def __init__(self, what: str, unit: str, **options: Any):
        self.options = {"desc": what, "unit": unit, "leave": False, **options}
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            from tqdm import tqdm

            work_begins()
            self.bar = tqdm(total=total, **self.options)
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
