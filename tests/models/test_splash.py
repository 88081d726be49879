"""Splash attention's kernels, interpreted, against the plain formula; the whole of `joint_attention` with them."""

import ast
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mi_jax.mesh import make_mesh
from mi_jax.models import splash
from mi_jax.models.attention import attention, attention_gradients, attention_with_lse
from mi_jax.models.sequence_parallel import joint_attention


def qkv(n: int, m: int, heads: int = 2, dim: int = 24):
    shapes = [(2, n, heads, dim)] + [(2, m, heads, dim)] * 2
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 3), shapes)]


def test_attention_and_its_gradients_equal_the_formula():
    """Neither sequence fills its blocks, heads are narrower than a lane, and keys are padded."""
    q, k, v = qkv(150, 200)
    length = jnp.asarray([200, 77], jnp.int32)
    run = lambda kind: jax.vjp(lambda *x: attention(*x, length=length, implementation=kind), q, k, v)  # noqa: E731
    (expected, pull), (got, pull_back) = run("xla"), run("splash")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    g = jnp.cos(expected)
    chex.assert_trees_all_close(pull_back(g), pull(g), rtol=1e-4, atol=1e-5)


def test_denominators_and_gradients_by_them():
    q, k, v = qkv(40, 130)
    length = jnp.asarray([130, 5], jnp.int32)
    run = lambda kind: attention_with_lse(q, k, v, length=length, implementation=kind)  # noqa: E731
    (out, lse), (got, got_lse) = run("xla"), run("splash")
    chex.assert_trees_all_close((got, got_lse), (out, lse), rtol=1e-5, atol=1e-5)
    g = jnp.sin(out)
    lse = lse + 0.5  # keys elsewhere take their share
    delta = jnp.einsum("bnkd,bnkd->bkn", g, out)
    parts = lambda kind: attention_gradients(q, k, v, g, lse, delta, length=length, implementation=kind)  # noqa: E731
    chex.assert_trees_all_close(parts("splash"), parts("xla"), rtol=1e-4, atol=1e-5)


def test_no_keys_is_finite():
    q, k, v = qkv(3, 4)
    assert np.isfinite(attention(q, k, v, length=jnp.zeros(2, jnp.int32), implementation="splash")).all()


@pytest.mark.parametrize("ulysses", [4, 2])
def test_spread_over_devices(ulysses):
    """Ulysses alone, and with a ring of two around it: the kernels' parts are folded, forwards and backwards."""
    streams = [tuple(qkv(n, n, heads=4, dim=8)) for n in (24, 8)]
    length = jnp.asarray([8, 3], jnp.int32)

    def loss(video, text, **options):
        out, _ = joint_attention(video, text, length, **options)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, expected), pulled = jax.jit(grad)(*streams)
    mesh = make_mesh(data=2, seq=4)
    with jax.set_mesh(mesh):
        streams = jax.tree.map(lambda x: jax.device_put(x, P("data", "seq")), streams)
        length = jax.device_put(length, P("data"))
        run = jax.jit(lambda v, t: grad(v, t, video_length=24, ulysses=ulysses, implementation="splash"))
        (_, got), pulled_too = run(*streams)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(pulled_too, pulled, rtol=1e-4, atol=1e-5)


# What `mi_jax.models.splash` takes of JAX that JAX does not promise, and the parameters that it passes.
COMMON = "is_mqa mask_value attn_logits_soft_cap mask_function interpret"
BACKWARD = f"q k v segment_ids sinks logsumexp do di bq bkv mask_info q_layout k_layout v_layout {COMMON}"
INTERNALS = {
    "kernels._splash_attention_forward": f"fwd_mask_info q k v segment_ids sinks block_sizes residual_checkpoint_name "
    f"save_residuals {COMMON}",
    "kernels._splash_attention_bwd_dkv": f"{BACKWARD} bkv_compute use_fused_bwd_kernel",
    "kernels._splash_attention_bwd_dq": BACKWARD,
    "kernels.make_splash_mha": "mask head_shards q_seq_shards block_sizes",
    "kernels.SplashAttentionKernel": "fwd_mask_info dq_mask_info dkv_mask_info",
    "kernels.SegmentIds": "q kv",
    "kernels.BlockSizes": "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq "
    "block_kv_dq q_layout k_layout v_layout",
    "kernels.DEFAULT_MASK_VALUE": "",
    "masks.MultiHeadMask": "masks",
    "masks.FullMask": "_shape",
    "jax._src.config._check_vma": "",
}


@pytest.mark.parametrize("name", INTERNALS)
def test_jax_still_has_what_it_does_not_promise(name):
    """Named one by one: a JAX that has moved something says here what, and the bound in pyproject.toml follows."""
    root, *parts = name.split(".")
    found = {"kernels": splash.kernels, "masks": splash.masks, "jax": jax}[root]
    for part in parts:
        assert hasattr(found, part), f"jax {jax.__version__} has no {found.__name__}.{part}, which splash.py uses"
        found = getattr(found, part)
    if INTERNALS[name]:
        known = inspect.signature(found).parameters
        missing = [parameter for parameter in INTERNALS[name].split() if parameter not in known]
        assert not missing, f"jax {jax.__version__}: {name} takes no {', '.join(missing)}, which splash.py passes"


def test_the_internals_listed_are_those_used():
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(splash))):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith(("kernels.", "masks.")) or name == "jax._src.config._check_vma":
            used.add(name)
    assert used == set(INTERNALS)


def test_a_device_s_share_says_along_which_axes_it_varies():
    """Of the type of an array inside `jax.shard_map`: `mat.varying`."""
    seen = []

    def local(x):
        seen.append(jax.typeof(x).mat.varying)
        return x

    with jax.set_mesh(make_mesh(data=8)):
        jax.jit(jax.shard_map(local, out_specs=P("data")))(jax.device_put(jnp.ones(8), P("data")))
    assert seen == [frozenset({"data"})], f"jax {jax.__version__}: {seen}"
