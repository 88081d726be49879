"""`mi-jax`: finds the command, and turns what goes wrong into an exit code.

Exit codes: 0 done; 2 bad arguments or input, with one line on standard error that names the file and the fault;
130 interrupted; 1 the rest.
The commands (`mi_jax.commands`) import what they need when they run: `mi-jax --help` answers at once.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mi_jax.caches import keep_programs
from mi_jax.commands.animate import animate
from mi_jax.commands.bench import bench
from mi_jax.commands.check import check
from mi_jax.commands.convert import convert
from mi_jax.commands.env import env
from mi_jax.commands.export import export
from mi_jax.commands.plan import plan
from mi_jax.commands.prepare import prepare
from mi_jax.commands.puppets import puppets
from mi_jax.commands.terminal import parsed
from mi_jax.commands.train import train
from mi_jax.errors import InputError
from mi_jax.interrupts import INTERRUPTED
from mi_jax.memory import claim_gpu_memory

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    command.__name__: (run, command.__doc__.splitlines()[0])
    for command, run in (
        (animate, parsed(animate)),
        (puppets, parsed(puppets)),
        (prepare, parsed(prepare)),
        (convert, parsed(convert)),
        (export, parsed(export)),
        (bench, parsed(bench)),
        (train, train),
        (check, parsed(check)),
        (plan, parsed(plan)),
        (env, parsed(env)),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Faults that are not the input's are raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            _show_log()
            claim_gpu_memory()
            keep_programs()
            COMMANDS[argv[0]][0](argv[1:])
            return 0
        if not argv or argv[0] in ("-h", "--help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] == "--version":
            from importlib.metadata import version

            print(version("mi-jax"))
            return 0
        raise InputError(f"no command {argv[0]!r}; there are {', '.join(COMMANDS)}")
    except InputError as fault:
        print(f"mi-jax: error: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro: 0 after --help, 2 after bad arguments
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except KeyboardInterrupt:
        print("mi-jax: interrupted", file=sys.stderr)
        return INTERRUPTED


def entry() -> None:
    """What `__main__` runs, after it has taken Ctrl-C in hand."""
    _open_streams()
    try:
        code = main()
        sys.stdout.flush()
    except OSError as fault:
        if not _stdout_fails():
            raise
        if isinstance(fault, BrokenPipeError):  # nobody reads any more
            code = 128 + signal.SIGPIPE
        else:
            print(f"mi-jax: error: standard output: {fault.strerror}", file=sys.stderr)
            code = 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _stdout_fails() -> bool:
    """Whether the fault is that of the standard output, and not of a file that a command writes."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _open_streams() -> None:
    """Standard streams that are closed, or whose encoding lacks a letter, are no reason to fail."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _usage() -> str:
    lines = [f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: mi-jax COMMAND ...", "", *lines, "", "mi-jax COMMAND --help tells more."])


def _show_log() -> None:
    """What the library has to say (which mask, what was cut) goes to standard error, one line each, and once."""
    said = set()

    def is_new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        return line not in said and not said.add(line)

    log = logging.getLogger("mi_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler()]
    log.handlers[0].addFilter(is_new)  # a voice is read twice: for the model, and for the video
    log.handlers[0].setFormatter(logging.Formatter("mi-jax: %(message)s"))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which nothing here needs
