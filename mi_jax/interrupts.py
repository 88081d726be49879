"""Ctrl-C, from the first moment on. Imports nothing large: it comes before everything else."""

import os
import signal
import threading

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def quit_on_interrupt() -> None:
    """Until `work_begins`, Ctrl-C ends the process at once: there is nothing to tidy up yet, and an exception may be
    lost in the many imports and callbacks of a start."""

    def quit_now(*_) -> None:
        os.write(2, b"mi-jax: interrupted\n")
        os._exit(INTERRUPTED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, quit_now)


def work_begins() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt: what is half-written is removed, a checkpoint under way finished."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
