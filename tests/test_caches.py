"""Compiled programs are kept between runs, where they can be, and only what is worth it."""

import json
import os
import subprocess
import sys

import jax
import pytest

from mi_jax import caches

PROGRAM = """
import json, sys
from mi_jax.caches import keep_programs, programs_dir, share_programs
keep_programs()
import jax
import jax.numpy as jnp

counts = {"hits": 0, "asked": 0}
def count(event, **_):
    counts["hits"] += event == "/jax/compilation_cache/cache_hits"
    counts["asked"] += event == "/jax/compilation_cache/compile_requests_use_cache"
jax.monitoring.register_event_listener(count)
jax.jit(lambda x: x + 1)(1)  # milliseconds
jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.linalg.qr(jnp.sin(y @ y.T))[0], x))(jnp.ones((9, 9)))
print(json.dumps(counts | {
    "folder": programs_dir(), "least": jax.config.jax_persistent_cache_min_compile_time_secs,
}))
"""


def run(tmp_path, **environment) -> dict:
    names = (caches.PROGRAMS, "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    environment = clean | {"MI_JAX_CACHE": str(tmp_path / "kept"), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kept(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith("-cache")]


def test_a_second_run_compiles_nothing_that_took_long(tmp_path):
    little = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.005"
    }  # which of them takes 0.1 s is the machine's affair
    first = run(tmp_path, **little)
    assert first["hits"] == 0
    assert first["folder"].startswith(str(tmp_path / "kept" / "programs"))
    names = kept(tmp_path / "kept")
    assert len(names) >= 1
    second = run(tmp_path, **little)
    assert second["hits"] == len(names)
    assert run(tmp_path)["least"] == caches.MIN_COMPILE_SECONDS
    assert sorted(kept(tmp_path / "kept")) == sorted(names)


def test_the_folder_that_jax_is_told_comes_first(tmp_path):
    every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    told = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "told"), **every)
    assert told["folder"] == str(tmp_path / "told")
    assert len(kept(tmp_path / "told")) == told["asked"]
    assert not (tmp_path / "kept").exists()
    assert run(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1000")["asked"] > 0
    assert kept(tmp_path / "kept") == []  # what compiles faster than that is not kept


@pytest.mark.parametrize("told", [{"MI_JAX_CACHE": "/proc/kept"}, {"JAX_COMPILATION_CACHE_DIR": "/proc/kept"}])
def test_where_nothing_can_be_written_it_is_off(tmp_path, told):
    """No warning (they are errors here), no file, no failure."""
    found = run(tmp_path, **told)
    assert (found["asked"], found["folder"]) == (0, None)


def test_users_can_turn_it_off(tmp_path):
    found = run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert (found["asked"], found["folder"]) == (0, None)
    assert kept(tmp_path) == []


def test_another_processor_or_jaxlib_has_a_folder_of_its_own(monkeypatch):
    own = caches.own_programs_dir()
    assert caches.own_programs_dir() == own
    monkeypatch.setattr(caches, "version", lambda name: "0.0.1")
    assert caches.own_programs_dir() != own
    monkeypatch.undo()
    monkeypatch.setattr(caches, "_cpu_features", lambda: "avx512f")
    assert caches.own_programs_dir() != own


@pytest.mark.parametrize(
    ("processes", "folder", "kept"), [(1, None, True), (2, None, False), (2, "/shared/programs", True)]
)
def test_several_processes_keep_programs_only_in_a_folder_for_all(monkeypatch, processes, folder, kept):
    monkeypatch.setenv(caches.PROGRAMS, folder or str(caches.own_programs_dir()))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        caches.share_programs()
        assert jax.config.jax_enable_compilation_cache == kept
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
