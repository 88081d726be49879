"""Packets out of a file that is damaged between them."""

import pathlib
import types

import av
import pytest

from mi_jax.data.containers import MAX_BREAKS, Losses, decoded


def packet(frames=(), fault=None, size=1):
    def decode():
        if fault is not None:
            raise fault
        return list(frames)

    return types.SimpleNamespace(size=size, duration=3, time_base=0.5, decode=decode)


class Container:
    """Hands out `entries` over all calls of `demux`; those that are exceptions are raised, which ends an iterator."""

    def __init__(self, entries):
        self.entries = iter(entries)

    def demux(self, _):
        for entry in self.entries:
            if isinstance(entry, Exception):
                raise entry
            yield entry


FAULT = av.error.InvalidDataError(1094995529, "Invalid data found when processing input")


def test_what_lies_behind_a_fault_is_read():
    losses = Losses()
    entries = [
        packet("a"),
        packet(fault=FAULT),
        packet("bc"),
        FAULT,
        packet("d"),
        IndexError("list index out of range"),
    ]
    entries += [packet("e"), packet(fault=FAULT, size=0)]
    assert list(decoded(Container(entries), None, losses)) == list("abcde")
    assert (losses.seconds, losses.fault) == (1.5, FAULT)


def test_a_whole_file_has_no_losses(caplog, tmp_path):
    losses = Losses()
    assert list(decoded(Container([packet("a"), packet("b")]), None, losses)) == ["a", "b"]
    losses.warn(tmp_path)
    assert not caplog.records


def test_a_file_that_only_breaks_comes_to_an_end():
    def breaks():
        for _ in range(MAX_BREAKS + 1):
            yield FAULT
        pytest.fail("reading went on")

    losses = Losses()
    assert list(decoded(Container(breaks()), None, losses)) == []
    assert losses.fault is FAULT


@pytest.mark.parametrize(("seconds", "said"), [(0.0261, "0.026"), (0.3132, "0.3"), (12.04, "12.0")])
def test_how_much_is_lost_is_said(caplog, seconds, said):
    losses = Losses()
    losses.add(seconds, FAULT)
    losses.warn(pathlib.Path("speech.mp3"))
    assert [record.getMessage() for record in caplog.records] == [f"speech.mp3: {said} s could not be decoded, skipped"]
