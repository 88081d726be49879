"""Which Python the second leg of CI takes."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / ".ci" / "newest-python"


def put(path: pathlib.Path, says: str | None) -> pathlib.Path:
    """A Python that says its version; None: a shim of a version that is not switched on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + ("exit 127\n" if says is None else f"echo {says}\n"))
    path.chmod(0o755)
    return path


def newest(tmp_path: pathlib.Path, than: str) -> str:
    (tmp_path / "bin").mkdir(exist_ok=True)
    for tool in ("bash", "env"):
        link = tmp_path / "bin" / tool
        if not link.exists():
            link.symlink_to(subprocess.check_output(["/bin/sh", "-c", f"command -v {tool}"], text=True).strip())
    environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)}
    done = subprocess.run([str(SCRIPT), than], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_newest_python_that_works_and_is_newer(tmp_path):
    assert newest(tmp_path, "3.11") == ""
    twelve = put(tmp_path / "bin" / "python3.12", "3.12")
    put(tmp_path / "bin" / "python3.13", None)
    assert newest(tmp_path, "3.11") == str(twelve)
    thirteen = put(tmp_path / "pyenv" / "versions" / "3.13.2" / "bin" / "python", "3.13")
    put(tmp_path / "pyenv" / "versions" / "3.14.0" / "bin" / "python", "3.14")  # not supported
    assert newest(tmp_path, "3.11") == newest(tmp_path, "3.12") == str(thirteen)
    assert newest(tmp_path, "3.13") == ""
