"""`mi-jax env`: one page that says what a report needs, and the same for machines."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tomllib

import jax

from mi_jax import caches, cli, environment
from mi_jax.data import detector


def test_the_page_says_what_is_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MI_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv(caches.PROGRAMS, str(tmp_path / "programs"))
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    monkeypatch.delenv(detector.VARIABLE, raising=False)
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "one-cache").write_bytes(bytes(3 * 1024))
    assert cli.main(["env"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"mi_jax {importlib.metadata.version('mi-jax')} in ")
    assert f"Python {platform.python_version()} on " in page
    assert f"  jax               {jax.__version__}\n" in page
    assert "  8 x cpu (cpu)\n" in page
    assert f"  programs       {tmp_path / 'programs'}: 1 file, 3 KiB\n" in page
    kept = tmp_path / "blaze_face_short_range.tflite"
    assert f"not there; downloaded when it is first needed, or save {detector.DETECTOR_URL} as {kept}\n" in page
    assert f"  MI_JAX_CACHE={tmp_path}\n" in page
    assert max(map(len, page.splitlines())) < 400
    assert len(page.splitlines()) < 60


def test_missing_extras_and_libraries_are_named_with_what_brings_them(capsys, monkeypatch):
    there = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: None if name in ("libtpu", "grain") else there(name))
    assert cli.main(["env"]) == 0
    page = capsys.readouterr().out
    assert "  tpu      pip install 'mi-jax[tpu]': runs on TPUs\n" in page
    assert "  puppets  there: draws talking puppets and trains on them\n" in page
    assert "  grain             missing\n" in page


def test_as_json(capsys, monkeypatch, tmp_path):
    model = tmp_path / "model.tflite"
    model.write_bytes(b"x")
    monkeypatch.setenv(detector.VARIABLE, str(model))
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == [{"kind": "cpu", "platform": "cpu", "memory_bytes": None, "count": 8}]
    assert found["caches"] == {"programs": None, "face_model": {"place": str(model), "there": True}}
    assert found["variables"]["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    monkeypatch.setenv(detector.VARIABLE, str(tmp_path / "gone.tflite"))
    assert environment.describe()["caches"]["face_model"]["there"] is False


def test_without_a_device_it_says_why(monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda': no GPU\nand more")

    monkeypatch.setattr(jax, "devices", none)
    assert "\n  none: Unable to initialize backend 'cuda': no GPU\n" in environment.page(environment.describe())


def test_extras_are_those_of_the_package():
    """The libraries that an extra brings are named; the CUDA plug-in and libtpu come by way of JAX's own extras."""
    project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = {name: told for name, told in project["optional-dependencies"].items() if not name.startswith("test")}
    assert set(environment.EXTRAS) == set(extras)
    for name in ("puppets", "tokamax", "prepare"):
        assert environment.EXTRAS[name][1] == tuple(line.split(">=")[0] for line in extras[name])
    default = {line.split(">=")[0] for line in project["dependencies"]}
    assert {*environment.LIBRARIES} - {"jaxlib"} <= default


def test_no_library_but_jax_is_imported():
    code = (
        "import sys, mi_jax.cli; mi_jax.cli.main(['env']); "
        "sys.exit(' '.join(m for m in sys.argv[1:] if m in sys.modules) or 0)"
    )
    heavy = ["flax", "optax", "orbax", "grain", "av", "PIL", "transformers", "mediapipe", "librosa", "numba", "torch"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
