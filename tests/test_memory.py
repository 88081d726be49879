"""What the host has left, as Linux and a container's limit say it."""

import pathlib

import pytest

from mi_jax.memory import available_bytes

MEMINFO = "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"meminfo": MEMINFO}, 1_024_000),
        ({"meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "5\n"}, 1_024_000),
        ({"meminfo": MEMINFO, "memory.max": "500000\n", "memory.current": "100000\n"}, 400_000),
        ({"meminfo": MEMINFO, "memory.max": "500000\n", "memory.current": "600000\n"}, 0),
        ({"meminfo": "nothing is known here"}, None),
        ({}, None),
    ],
)
def test_available_bytes(monkeypatch, files, expected):
    def read_text(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name]

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert available_bytes() == expected
