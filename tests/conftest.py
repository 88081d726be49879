"""Strictness for every test: shapes and dtypes of public functions are checked, silent promotion is an error."""

import atexit
import gc
import importlib.util
import os
import pathlib
import re
import resource
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# What tests keep between runs of the commands is theirs, and gone when they are done.
os.environ["MI_JAX_CACHE"] = tempfile.mkdtemp(prefix="mi_jax_tests_")
atexit.register(shutil.rmtree, os.environ["MI_JAX_CACHE"], ignore_errors=True)

from jaxtyping import install_import_hook  # noqa: E402

# Before any import of mi_jax: its annotations become checks, in tests only.
install_import_hook("mi_jax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compile much and run little. LLVM's own optimisations cost more than they bring (XLA's stay on), and of the two
# emitters of fused loops for CPUs the older one is several times as fast. Its flag is no promise, and a flag that XLA
# does not know ends the process: it is set where it was tried.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__[:2] == (0, 10):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")


# Parity tests need PyTorch. Where it has no build (`make test-newest`) one must say that they are to be left out.
collect_ignore: list[str] = []
if importlib.util.find_spec("torch") is None:
    if not os.environ.get("MI_JAX_TESTS_WITHOUT_TORCH"):
        raise pytest.UsageError("torch is not installed: pip install '.[test]', or set MI_JAX_TESTS_WITHOUT_TORCH=1")
    here = pathlib.Path(__file__).parent
    needs_torch = re.compile(r"^(import|from) (torch|diffusers|tiny_hub)\b", re.MULTILINE)
    collect_ignore += [str(f.relative_to(here)) for f in here.rglob("*.py") if needs_torch.search(f.read_text())]


def pytest_terminal_summary(terminalreporter):
    left_out = [name for name in collect_ignore if pathlib.Path(name).name.startswith("test_")]
    if left_out:
        terminalreporter.write_line(f"left out for want of torch: {', '.join(sorted(left_out))}")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs are memory maps, of which a process has 65,530: the whole suite in one process needs more."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def small_disk():
    """No file may grow beyond 30,000 bytes: writing fails as it does on a full disk, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
