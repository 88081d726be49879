"""Conditions slice themselves along latent frames and drop parts of themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mi_jax.conditions import Conditions, concatenate


def make(b: int = 2, t: int = 6, moving: bool = False) -> Conditions:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    return Conditions(
        text_tokens=normal(b, 4, 8),
        text_mask=jnp.ones((b, 4), bool),
        text_pooled=normal(b, 5),
        image_tokens=normal(b, 3, 8),
        image_mask=jnp.ones((b, 3), bool),
        portrait=normal(b, 2, 2, 16),
        is_start=jnp.ones(b),
        audio=normal(b, 2, t, 4, 8),
        face_mask=jnp.abs(normal(b, 2, t, 2, 2)) if moving else jnp.ones((b, 2, 2, 2)),
    )


def test_window_cuts_what_moves_and_keeps_what_does_not():
    told = make(moving=True)
    cut = jax.jit(lambda told, start: told.window(start, 3))(told, 2)
    np.testing.assert_array_equal(cut.audio, told.audio[:, :, 2:5])
    np.testing.assert_array_equal(cut.face_mask, told.face_mask[:, :, 2:5])
    np.testing.assert_array_equal(cut.portrait, told.portrait)
    still = make()
    np.testing.assert_array_equal(still.window(2, 3).face_mask, still.face_mask)


def test_only_the_first_window_starts_with_the_portrait():
    told = make()
    assert (np.asarray(told.window(0, 3).is_start) == 1).all()
    assert (np.asarray(told.window(1, 3).is_start) == 0).all()
    starts = jax.vmap(lambda start: told.window(start, 3).is_start)(jnp.arange(3))
    np.testing.assert_array_equal(starts, [[1, 1], [0, 0], [0, 0]])


def test_drop_touches_only_what_is_named_and_only_where():
    told = make()
    who = jnp.asarray([True, False])
    dropped = told.drop(audio=who)
    assert (np.asarray(dropped.face_mask[0]) == 0).all()
    np.testing.assert_array_equal(dropped.face_mask[1], told.face_mask[1])
    np.testing.assert_array_equal(dropped.portrait, told.portrait)
    dropped = told.drop(text=True, image=who)
    assert not np.asarray(dropped.text_mask).any()
    assert not np.asarray(dropped.text_pooled).any()
    np.testing.assert_array_equal(dropped.image_mask, [[False] * 3, [True] * 3])
    np.testing.assert_array_equal(dropped.is_start, [0, 1])
    np.testing.assert_array_equal(dropped.audio, told.audio)


def test_absent_parts_stay_absent():
    told = dataclasses.replace(make(), audio=None, face_mask=None, text_pooled=None)
    for changed in (told.window(1, 2), told.drop(text=True, image=True, audio=True)):
        assert changed.audio is None
        assert changed.face_mask is None
        assert changed.text_pooled is None


def test_concatenate_joins_branches_along_the_batch():
    told = make()
    both = concatenate([told, told.drop(audio=True)])
    assert both.batch_size == 4
    np.testing.assert_array_equal(both.face_mask[:2], told.face_mask)
    assert not np.asarray(both.face_mask[2:]).any()
