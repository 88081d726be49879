"""Guidance is the closed form, at every noise level, and costs no branch that changes nothing."""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.conditions import Conditions
from mi_jax.sample.guidance import Guidance

B, T, H, W, C = 3, 2, 4, 4, 5


@pytest.fixture
def conditions() -> Conditions:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Conditions(
        text_tokens=normal(B, 6, 8),
        text_mask=jnp.ones((B, 6), bool),
        portrait=normal(B, H, W, C),
        is_start=jnp.ones(B),
        audio=normal(B, 1, T, 4, 8),
        face_mask=jnp.ones((B, 1, H, W)),
    )


class Probe:
    """A velocity that is a different linear function of each condition, and counts its batch."""

    def __init__(self):
        self.evaluated = 0

    def __call__(self, latents, sigma, conditions):
        self.evaluated += latents.shape[0]
        text = jnp.where(conditions.text_mask[..., None], conditions.text_tokens, 0.0).sum((1, 2))
        audio = conditions.audio.sum((1, 2, 3, 4)) * conditions.face_mask.mean((1, 2, 3))
        portrait = conditions.portrait.sum((1, 2, 3))
        bias = text + 10 * audio + 100 * portrait + sigma
        return latents * 2.0 + bias.reshape(-1, 1, 1, 1, 1)


def branches(latents, sigma, conditions):
    probe = Probe()
    u_all = probe(latents, sigma, conditions)
    u_no_audio = probe(latents, sigma, conditions.drop(audio=True))
    u_none = probe(latents, sigma, conditions.drop(text=True, image=True, audio=True))
    return u_all, u_no_audio, u_none


LATENTS = jnp.asarray(np.random.default_rng(7).normal(size=(B, T, H, W, C)), jnp.float32)
SIGMA = jnp.asarray([0.2, 0.75, 0.9])  # below, on and above the border


@pytest.mark.parametrize(
    ("audio", "text", "cost"), [(0.0, 0.0, 1), (2.0, 0.0, 2), (2.0, 1.5, 3), (0.0, 1.5, 3), (-0.5, 0.5, 3)]
)
def test_closed_form_and_cost(conditions, audio, text, cost):
    probe = Probe()
    u = Guidance(audio=audio, text=text)(probe)(LATENTS, SIGMA, conditions)
    u_all, u_no_audio, u_none = branches(LATENTS, SIGMA, conditions)
    three_fold = u_all + audio * (u_all - u_no_audio) + text * (u_no_audio - u_none)
    two_fold = u_all + audio * (u_all - u_none)
    expected = jnp.stack([three_fold[0], two_fold[1], two_fold[2]])
    np.testing.assert_allclose(u, expected, rtol=1e-4, atol=1e-3)
    assert probe.evaluated == cost * B
    assert Guidance(audio=audio, text=text).branches == cost


def test_equal_weights_are_continuous_across_the_border(conditions):
    def at(border):
        return Guidance(audio=1.7, text=1.7, two_fold_above=border)(Probe())(LATENTS, SIGMA, conditions)

    np.testing.assert_allclose(at(0.0), at(2.0), rtol=1e-4, atol=1e-3)


def test_weights_per_example_equal_each_example_alone(conditions):
    audio, text = jnp.asarray([0.0, 1.0, 3.0]), jnp.asarray([2.0, 0.5, 0.0])
    together = Guidance(audio=audio, text=text)(Probe())(LATENTS, SIGMA, conditions)
    for i in range(B):
        one = jax.tree.map(itemgetter(slice(i, i + 1)), conditions)
        guidance = Guidance(audio=float(audio[i]), text=float(text[i]))
        alone = guidance(Probe())(LATENTS[i : i + 1], SIGMA[i : i + 1], one)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-4, atol=1e-3)


def test_one_graph_for_all_noise_levels(conditions):
    guided = jax.jit(Guidance(audio=2.0, text=1.0)(Probe()))
    for sigma in (0.1, 0.75, 1.0):
        traced = guided(LATENTS, jnp.full(B, sigma), conditions)
        eager = Guidance(audio=2.0, text=1.0)(Probe())(LATENTS, jnp.full(B, sigma), conditions)
        np.testing.assert_allclose(traced, eager, rtol=1e-4, atol=1e-3)
    assert guided._cache_size() == 1
