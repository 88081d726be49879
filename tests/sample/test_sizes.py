"""What a video takes at least, against its parts counted by hand."""

import pytest

from mi_jax import memory
from mi_jax.avatar.config import AvatarConfig
from mi_jax.errors import InputError
from mi_jax.sample.sizes import array_bytes_of, check_array_memory, check_device_memory, device_bytes_of

PUPPET = AvatarConfig.puppet()


def test_bytes_of_a_puppet_by_hand():
    """101 frames of 96x96 pixels: 26 latent frames of 12x12x16, 36 tokens each, of width 256 and 1024."""
    frame, token = 12 * 12 * 16 * 4, 36 * 256 * (4 + 4) * 4
    assert array_bytes_of(PUPPET, 101) == 2 * 101 * 96 * 96 * 3
    assert device_bytes_of(PUPPET, 101, 33, 8) == 2 * 26 * frame + 26 * token
    # 25 levels, each a window further, of 6 new frames; the whole video by level; one window if causal.
    assert device_bytes_of(PUPPET, 1001, 9, 3) == 2 * (24 * 6 + 9) * frame + 9 * token
    assert device_bytes_of(PUPPET, 1001, 9, 3, "level") == 2 * 251 * frame + 9 * token
    assert device_bytes_of(PUPPET, 1001, 9, 3, "causal") == 2 * 9 * frame + 9 * token
    assert device_bytes_of(PUPPET, 10**7, 9, 3) == device_bytes_of(PUPPET, 1001, 9, 3)


def test_a_video_is_refused_exactly_where_memory_ends(monkeypatch):
    needed = array_bytes_of(PUPPET, 25_001)
    monkeypatch.setattr(memory, "host_bytes", lambda: needed)
    check_array_memory(PUPPET, 25_001)
    monkeypatch.setattr(memory, "host_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match=r"^a video of 1000\.04 s and 96x96 pixels takes at least 1\.2\d* GiB"):
        check_array_memory(PUPPET, 25_001)
    monkeypatch.setattr(memory, "host_bytes", lambda: None)  # a system that does not tell
    check_array_memory(PUPPET, 25_001)


def test_accelerators_have_memory_of_their_own(monkeypatch):
    class Device:
        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    needed = device_bytes_of(PUPPET, 25_001, 33, 8)
    for limit in (needed // 2, needed // 2 - 1):
        devices = [Device(limit), Device(needed - needed // 2)]
        monkeypatch.setattr("jax.local_devices", lambda devices=devices: devices)
        if limit == needed // 2:
            check_device_memory(PUPPET, 25_001, 33, 8)
        else:
            with pytest.raises(InputError, match="of the accelerators' memory"):
                check_device_memory(PUPPET, 25_001, 33, 8)


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5 B"), (1023, "1.02e+03 B"), (3 * 2**20, "3 MiB"), (2**40 - 1, "1024 GiB"), (5 * 2**40, "5 TiB")],
)
def test_sizes_for_people(count, text):
    assert memory.as_size(count) == text


def test_the_machine_has_some_memory():
    assert 2**28 < memory.host_bytes() < 2**50
