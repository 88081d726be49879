"""What is kept between runs: downloaded files and compiled programs. Imports nothing large: it comes before JAX."""

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile
from importlib.metadata import version

MIN_COMPILE_SECONDS = 0.1
"""Programs that compile faster are not kept. Of the 50 that `mi-jax animate` compiles on a CPU, the dozen above it take
nearly all the time."""

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"


def cache_dir() -> pathlib.Path:
    """Where files are kept: `MI_JAX_CACHE`, else `~/.cache/mi_jax`; without a home, where temporary files are."""
    if os.environ.get("MI_JAX_CACHE"):
        return pathlib.Path(os.environ["MI_JAX_CACHE"])
    home = os.path.expanduser("~")
    if home == "~":
        return pathlib.Path(tempfile.gettempdir()) / f"mi_jax-{os.getuid()}"
    return pathlib.Path(home) / ".cache" / "mi_jax"


def has_home() -> bool:
    """Not so in containers that set no HOME, or one that is not there, for a user that the system does not know."""
    home = os.path.expanduser("~")
    return home != "~" and os.access(home, os.W_OK)


def own_programs_dir() -> pathlib.Path:
    """Where compiled programs are kept if nobody says otherwise: a folder for each kind of processor and version of
    jaxlib.

    JAX tells neither apart, and a program for another CPU ends the process: home folders are shared by unlike machines.
    """
    kind = "\n".join([platform.machine(), _cpu_features(), version("jaxlib")])
    return cache_dir() / "programs" / f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def programs_dir() -> str | None:
    """The folder of JAX's persistent compilation cache, as `keep_programs` leaves it; None where it is off."""
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() in ("false", "0", "off", "no", "f", "n"):
        return None
    return os.environ.get(PROGRAMS) or None


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on, for this process and those that it starts. Before JAX is imported.

    In the folder that JAX_COMPILATION_CACHE_DIR names, else in `own_programs_dir`. Where that cannot be written, the
    cache is off: nothing fails for want of it. JAX's own variables (JAX_ENABLE_COMPILATION_CACHE=false,
    JAX_PERSISTENT_CACHE_...) come first.
    """
    folder = os.environ.get(PROGRAMS) or str(own_programs_dir())
    if "://" not in folder and not _writable(pathlib.Path(folder)):  # a bucket is JAX's affair
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    os.environ[PROGRAMS] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(MIN_COMPILE_SECONDS))


def share_programs() -> None:
    """For a run of several processes, which find a program all or none: XLA shares out what it times among those that
    compile, and waits for them. So the cache stays on only in a folder that the user named, for all."""
    import jax

    if jax.process_count() > 1 and os.environ.get(PROGRAMS) in (None, "", str(own_programs_dir())):
        jax.config.update("jax_enable_compilation_cache", False)


def _cpu_features() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):  # x86, ARM
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def _writable(folder: pathlib.Path) -> bool:
    """A file can be made there; the folder is, if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable"):
            return True
    except OSError:
        return False
