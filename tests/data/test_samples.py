"""Samples that callers hand over: every kind that can be understood means the same, the rest is refused in one line."""

import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.data.samples import mono, samples_from
from mi_jax.errors import InputError

TONE = (0.5 * np.sin(0.1 * np.arange(400))).astype(np.float32)
STEREO = np.stack([TONE, -0.2 * TONE], -1)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (TONE, 0),
        (TONE.astype(np.float64), 0),
        (TONE.astype(np.float16), 3e-4),
        (TONE.tolist(), 0),
        (tuple(TONE.tolist()), 0),
        (jnp.asarray(TONE), 0),
        (jnp.asarray(TONE, jnp.bfloat16), 2e-3),
        (TONE[None], 0),
        (TONE[:, None], 0),
        (TONE[None, None], 0),
        ((TONE * 2**15).astype(np.int16), 2**-15),
        (jnp.asarray(TONE * 2**15, jnp.int16), 2**-15),
        ((TONE.astype(np.float64) * 2**31).astype(np.int32), 1e-7),
        ((TONE * 2**7).astype(np.int8), 2**-7),
        (np.floor(TONE * 2**7 + 2**7).astype(np.uint8), 2**-7),
        (np.asfortranarray(TONE[::-1])[::-1], 0),
    ],
)
def test_what_means_the_same(given, error):
    samples = samples_from(given, "voice 1")
    assert samples.shape == (400, 1)
    np.testing.assert_allclose(samples[:, 0], TONE, atol=error, rtol=0)
    np.testing.assert_array_equal(mono(samples), samples[:, 0])


@pytest.mark.parametrize("given", [STEREO, STEREO.T, STEREO.T[None], STEREO.tolist(), jnp.asarray(STEREO)])
def test_two_channels_on_either_axis(given):
    np.testing.assert_array_equal(samples_from(given, "voice 1"), STEREO)


def test_mono_is_the_mean_unless_that_is_lost():
    np.testing.assert_allclose(mono(STEREO), 0.4 * TONE, atol=1e-7)
    np.testing.assert_array_equal(mono(np.stack([TONE, -TONE], -1)), TONE)
    np.testing.assert_array_equal(mono(np.stack([-0.95 * TONE, TONE], -1)), TONE)


def test_full_scale_of_whole_numbers():
    np.testing.assert_array_equal(samples_from(np.int16([-(2**15), 0, 2**14]), "v")[:, 0], [-1, 0, 0.5])
    np.testing.assert_array_equal(samples_from(np.int32([-(2**31), 0, 2**30]), "v")[:, 0], [-1, 0, 0.5])
    np.testing.assert_array_equal(samples_from(np.uint8([0, 128, 192]), "v")[:, 0], [-1, 0, 0.5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(0), "without a single sample"),
        ([], "without a single sample"),
        (np.zeros((0, 2)), "without a single sample"),
        (np.zeros((400, 3)), r"these are \[400, 3\]"),
        (np.zeros((2, 400, 2)), r"these are \[2, 400, 2\]"),
        (np.arange(400), "these are int64"),
        ([0, 100, -100], "these are int64"),
        (np.zeros(400, np.uint16), "these are uint16"),
        (np.zeros(400, bool), "these are bool"),
        (0.5, r"these are \[\]"),
        (np.zeros(400, complex), "these are complex128"),
        (np.array(["a"] * 400), "ndarray cannot be meant"),
        (None, "None cannot be meant"),
        ({"array": TONE}, "dict cannot be meant"),
        (b"RIFF", "bytes cannot be meant"),
        ((16000, TONE), "tuple cannot be meant"),
        ([TONE, TONE[:3]], "list cannot be meant"),
        (np.full(400, np.nan), "NaN"),
        (np.full(400, 1e300), "infinite"),
        (TONE * 2**15, "samples reach 16384, but full scale is 1"),
    ],
)
def test_what_cannot_be_meant(given, message):
    with pytest.raises(InputError, match=message) as caught:
        samples_from(given, "voice 1")
    assert str(caught.value).startswith("voice 1: ")
    assert "\n" not in str(caught.value)
