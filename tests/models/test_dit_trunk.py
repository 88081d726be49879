"""The denoiser opened: bodies of any count, hidden states of named blocks, extra tokens and terms of the vector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_dit import SMALL, TALKING, conditions, kept_by, latents_and_sigma, random_dit, velocity

from mi_jax.models.dit import DiT, DiTConfig

PAIRED = dataclasses.replace(TALKING, double_per_body=2, single_per_body=1, audio_after=("double",), double_depth=4)
"""HunyuanVideo-Avatar's: audio attention after every second double block, and after no single one."""


def pick(stack, i: int):
    return jax.tree.map(lambda leaf: leaf[i], stack)


def by_hand(model: DiT, video, text, context):
    """The trunk as a loop over its blocks, and every block's hidden states."""
    hidden = {}
    for kind in ("double", "single"):
        bodies, count = getattr(model, kind), getattr(model.config, f"{kind}_per_body")
        for i in range(model.config.bodies(kind)):
            body = pick(bodies, i)
            for j in range(count):
                video, text = pick(body.blocks, j)(video, text, context)
                hidden[kind, i * count + j] = video
            if kind in model.config.audio_after:
                video = body.audio(video, context.audio, context.audio_mask)
    return video, hidden


# --- bodies --------------------------------------------------------------------------------------------------------


def test_bodies_of_other_counts_run_as_a_loop_over_their_blocks():
    model = random_dit(PAIRED)
    assert model.double.blocks.video.out.kernel.shape == (2, 2, 48, 48)
    assert model.double.audio.out.kernel.shape == (2, 48, 48)
    assert model.single.blocks.mlp_in.kernel.shape == (4, 1, 48, 192)
    assert model.single.audio is None
    x, sigma = latents_and_sigma(PAIRED)
    told = conditions(PAIRED)

    @jax.jit
    def looped(model):
        video, text, context = model.embed(x, sigma, told)
        return model.unembed(by_hand(model, video, text, context)[0], context, x, sigma, told)

    expected = looped(model)
    np.testing.assert_allclose(velocity(model, x, sigma, told), expected, rtol=1e-5, atol=1e-5)
    silent = velocity(model, x, sigma, dataclasses.replace(told, audio=None))
    assert np.abs(np.asarray(silent - expected)).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"single_depth": 5}, "single_depth 5 must be a multiple of single_per_body 2"),
        ({"double_per_body": 3}, "double_depth 20 must be a multiple of double_per_body 3"),
        ({"double_per_body": 0}, "double_per_body is 0, must lie in"),
    ],
)
def test_bodies_divide_the_depth(fields, said):
    with pytest.raises(ValueError, match=said):
        DiTConfig(**fields)


# --- taps ----------------------------------------------------------------------------------------------------------


def test_taps_are_a_loops_hidden_states_and_so_are_their_gradients():
    config = dataclasses.replace(TALKING, double_per_body=2)
    model = random_dit(config)
    graph, state = nnx.split(model)
    x, sigma = latents_and_sigma(config)
    told = conditions(config)
    taps = (("double", 1), ("single", 2), ("single", 0))

    def loss(state, trunk):
        model = nnx.merge(graph, state)
        video, text, context = model.embed(x, sigma, told)
        video, hidden = trunk(model, video, text, context)
        return sum(jnp.mean(jnp.sin((2 + i) * hidden[tap])) for i, tap in enumerate(taps)), (video, hidden)

    tapped = lambda *arguments: DiT.trunk(*arguments, taps)  # noqa: E731
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, (video, hidden)), gradients = grad(state, tapped)
    (_, (last, every)), expected = grad(state, by_hand)
    assert set(hidden) == set(taps)
    for tap in taps:
        np.testing.assert_allclose(hidden[tap], every[tap], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(video, last, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(*map(jax.tree.leaves, (gradients, expected))):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_a_tap_keeps_one_blocks_hidden_states():
    """Of 16 bodies' hidden states one tap keeps its own, in the backward pass too: memory of the compiled gradients."""
    config = dataclasses.replace(SMALL, double_depth=1, single_depth=32)
    graph, state = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    x, sigma = latents_and_sigma(config, t=5, h=16, w=16)
    told = conditions(config, t=5, h=16, w=16)

    def temporary(taps, differentiated):
        def loss(state):
            model = nnx.merge(graph, state)
            video, hidden = model.trunk(*model.embed(x, sigma, told), taps)
            return jnp.mean(video) + sum(jnp.mean(h**2) for h in hidden.values())

        compiled = jax.jit(jax.grad(loss) if differentiated else loss).lower(state).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    size = 2 * 5 * 64 * config.width * 4
    for differentiated in (False, True):
        more = temporary((("single", 9),), differentiated) - temporary((), differentiated)
        assert more < 5 * size


def test_a_block_that_is_not_there_cannot_be_tapped():
    x, sigma = latents_and_sigma(SMALL)
    tapped = lambda model: model.trunk(*model.embed(x, sigma, conditions(SMALL)), (("double", 2),))  # noqa: E731
    with pytest.raises(ValueError, match="no double block 2 to tap: there are 2"):
        jax.eval_shape(tapped, random_dit(SMALL))


# --- extra tokens and terms ----------------------------------------------------------------------------------------


def extended(model, x, sigma, told, **extra):
    video, text, context = model.embed(x, sigma, told, **extra)
    return model.unembed(model.trunk(video, text, context)[0], context, x, sigma, told)


@pytest.mark.parametrize("config", [SMALL, TALKING], ids=["text", "talking"])
def test_frames_of_a_video_may_be_given_as_extra_tokens(config):
    """The first frames' velocity is the same, whether the last frames are the video's or stand beside it as references
    at their times."""
    model = random_dit(config)
    x, sigma = latents_and_sigma(config, t=5)
    whole = conditions(config, t=5)
    told = whole
    if config.audio:  # references hear nothing
        whole = dataclasses.replace(whole, face_mask=jnp.ones((2, 1, 5, 4, 6)).at[:, :, 3:].set(0.0))
        told = whole.window(0, 3)
    expected = velocity(model, x, sigma, whole)[:, :3]
    run = jax.jit(
        lambda model, times: extended(model, x[:, :3], sigma, told, extra_latents=x[:, 3:], extra_times=times)
    )
    np.testing.assert_allclose(run(model, jnp.asarray([3.0, 4.0])), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(run(model, jnp.asarray([-2.0, -1.0])) - expected)).max() > 1e-3


@pytest.mark.parametrize("replace", [False, True])
def test_an_extra_vector_is_a_term_of_the_conditioning_vector(replace):
    """As is a bias of the embedded timestep, which all examples share."""
    config = dataclasses.replace(SMALL, token_replace=replace)
    model = random_dit(config)
    x, sigma = latents_and_sigma(config)
    told = dataclasses.replace(conditions(config), portrait=x[:, 1], is_start=jnp.ones(2))
    extra = jax.random.normal(jax.random.key(0), (config.width,))
    got = jax.jit(extended)(model, x, sigma, told, extra_vector=jnp.tile(extra, (2, 1)))
    model.time_in.fc2.bias[...] += extra
    np.testing.assert_allclose(got, velocity(model, x, sigma, told), rtol=1e-5, atol=1e-5)


# --- the backward pass ---------------------------------------------------------------------------------------------


def test_the_scans_keep_no_parameters():
    """With all activations kept, a block's parameters, taken out of their stack, are not: [bodies i o] are kernels."""
    config = dataclasses.replace(TALKING, remat="none")
    graph, state = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    x, sigma = latents_and_sigma(config)
    told = conditions(config)
    jaxpr = jax.make_jaxpr(jax.grad(lambda state: jnp.mean(nnx.merge(graph, state)(x, sigma, told) ** 2)))(state)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and not eqn.params["reverse"]]
    assert [eqn.params["length"] for eqn in scans] == [config.refiner_depth, 2, 2]
    kept = [aval for eqn in scans for aval in kept_by(eqn)]
    assert len(kept) > 50
    assert [aval.shape for aval in kept if aval.ndim == 3 and min(aval.shape[1:]) >= config.width] == []
