"""The numbers of benchmarks/distillation.py, where they are known."""

import runpy
from pathlib import Path

import numpy as np
import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "distillation.py"))


def test_the_distance_of_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 where both are of independent coordinates."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 3))
    spread, mean = np.array([2.0, 0.5, 1.0]), np.array([1.0, 0.0, -2.0])
    assert SCRIPT["frechet"](x, x) == pytest.approx(0.0, abs=1e-6)
    assert SCRIPT["frechet"](x * spread + mean, x) == pytest.approx(5 + 1 + 0.25, rel=0.02)


def test_motion_is_the_spread_over_time():
    video = np.zeros((4, 2, 2, 3), np.uint8)
    assert SCRIPT["motion"](video) == 0
    video[::2] = 10
    assert SCRIPT["motion"](video) == pytest.approx(5)


def test_places_are_pooled_three_by_three():
    latents = np.arange(36.0).reshape(1, 6, 6, 1)
    pooled = SCRIPT["pooled"](latents)
    assert pooled.shape == (1, 3, 3, 1)
    assert pooled[0, 0, 0, 0] == np.mean([0, 1, 6, 7])


def test_a_checkpoint_is_chosen_by_lips_among_those_that_move():
    summary = {
        name: {"correlation": {"mean": lips}, "motion": {"mean": moves}}
        for name, lips, moves in (
            ("teacher", 0.9, 0.8),
            ("still", 0.95, 0.7),
            ("good", 0.91, 0.85),
            ("worse", 0.9, 0.8),
        )
    }
    assert SCRIPT["chosen"](summary, "teacher", ["still", "good", "worse"]) == "good"
    assert SCRIPT["chosen"](summary, "teacher", ["still"]) is None
