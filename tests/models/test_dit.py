"""The denoiser: parity with diffusers' HunyuanVideo, and the laws of the portrait and audio conditions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from flax import nnx
from reference import fill, numpy_tensors, relative_error
from tiny_avatar import draw_weights
from tiny_dit import SMALL, TALKING, conditions, latents_and_sigma, random_dit, velocity

from mi_jax.conditions import Conditions
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.dit_blocks import Context
from mi_jax.models.layers import grid_positions, rope_table, sinusoid
from mi_jax.weights.hunyuan_video import diffusers_table

# --- parity --------------------------------------------------------------------------------------------------------


def _reference(config: DiTConfig, seed: int, scale: float = 0.1) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(seed)
    with torch.device("meta"):  # its own initialisation would be overwritten
        model = HunyuanVideoTransformer3DModel(
            in_channels=config.in_channels,
            out_channels=config.latent_channels,
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            num_layers=config.double_depth,
            num_single_layers=config.single_depth,
            num_refiner_layers=config.refiner_depth,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=config.guidance_embedding,
            text_embed_dim=config.text_dim,
            pooled_projection_dim=config.pooled_dim,
            rope_axes_dim=config.rope_axes,
            image_condition_type="token_replace" if config.token_replace else None,
        )
    model = model.to_empty(device="cpu").eval()
    assert not list(model.buffers())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, scale)
    return model


def _reference_velocity(reference: HunyuanVideoTransformer3DModel, x, sigma, told: Conditions) -> np.ndarray:
    """The reference's [b t h w c]."""
    as_torch = lambda a: torch.from_numpy(np.array(a))  # noqa: E731
    with torch.no_grad():
        made = reference(
            hidden_states=as_torch(jnp.moveaxis(x, -1, 1)),
            timestep=as_torch(1000 * sigma),
            encoder_hidden_states=as_torch(told.text_tokens),
            encoder_attention_mask=as_torch(told.text_mask),
            pooled_projections=as_torch(told.text_pooled),
            guidance=None if told.guidance is None else as_torch(1000 * told.guidance),
        ).sample
    return np.moveaxis(made.numpy(), 1, -1)


def _from_reference(config: DiTConfig, model: HunyuanVideoTransformer3DModel) -> DiT:
    return fill(lambda: DiT(config, rngs=nnx.Rngs(0)), diffusers_table(config), numpy_tensors(model))


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize(("t", "h", "w"), [(1, 4, 4), (3, 4, 10)])
def test_velocity_equals_diffusers(guidance, t, h, w):
    config = dataclasses.replace(SMALL, guidance_embedding=guidance)
    reference = _reference(config, seed=t)
    ours = _from_reference(config, reference)
    told = conditions(config, seed=t)
    x, sigma = latents_and_sigma(config, t=t, h=h, w=w)
    expected = _reference_velocity(reference, x, sigma, told)
    assert relative_error(velocity(ours, x, sigma, told), expected) < 1e-5


def test_token_replace_equals_diffusers():
    """The first frame given clean and modulated at time 0; its own velocity is the one that leads to the portrait."""
    t, h, w = 3, 6, 4
    config = dataclasses.replace(SMALL, token_replace=True, guidance_embedding=True)
    reference = _reference(config, seed=t)
    ours = _from_reference(config, reference)
    x, sigma = latents_and_sigma(config, t=t, h=h, w=w)
    portrait = jax.random.normal(jax.random.key(3), (2, h, w, config.latent_channels))
    told = dataclasses.replace(conditions(config, seed=t), portrait=portrait, is_start=jnp.ones(2))
    expected = _reference_velocity(reference, x.at[:, 0].set(portrait), sigma, told)
    got = velocity(ours, x, sigma, told)
    assert relative_error(got[:, 1:], expected[:, 1:]) < 1e-5
    implied = x[:, 0] - sigma.reshape(2, 1, 1, 1) * got[:, 0]
    np.testing.assert_allclose(implied, portrait, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("replace", [False, True])
def test_every_part_equals_diffusers(replace, seed):
    """Each part, given what the reference's own part was given: an error cannot hide behind a later norm."""
    config = dataclasses.replace(SMALL, guidance_embedding=True, token_replace=replace)
    reference = _reference(config, seed)
    ours = _from_reference(config, reference)
    seen = []
    blocks = [*reference.transformer_blocks, *reference.single_transformer_blocks]
    parts = {"rope": reference.rope, "embed": reference.time_text_embed, "refiner": reference.context_embedder}
    for module in (*parts.values(), *blocks):
        module.register_forward_hook(lambda module, told, made: seen.append((module, told, made)))
    told, (x, sigma) = conditions(config, seed), latents_and_sigma(config, t=3, h=4, w=10)
    _reference_velocity(reference, x, sigma, told)
    made = {name: out for name, part in parts.items() for module, _, out in seen if module is part}
    rope = rope_table(grid_positions(jnp.arange(3.0), 2, 5), config.rope_axes, config.rope_theta)
    for mine, theirs in zip(rope, made["rope"]):  # theirs holds every angle twice, for the two of a pair
        np.testing.assert_allclose(mine, theirs[:, ::2], atol=1e-6)
        np.testing.assert_allclose(mine, theirs[:, 1::2], atol=1e-6)

    embed = lambda level: sinusoid(jnp.asarray(level), 256)  # noqa: E731
    length = told.text_mask.sum(1, dtype=jnp.int32)
    refined = ours.text_in(told.text_tokens, embed(1000 * sigma), length)
    valid = np.asarray(told.text_mask)
    assert relative_error(np.asarray(refined)[valid], made["refiner"].numpy()[valid]) < 1e-5
    rest = ours.pooled_in(told.text_pooled)
    vec = ours.time_in(embed(1000 * sigma)) + rest + ours.guidance_in(embed(1000 * told.guidance))
    at_zero = ours.time_in(embed(jnp.zeros(2))) + rest
    assert relative_error(vec, made["embed"][0]) < 1e-5
    if replace:
        assert relative_error(at_zero, made["embed"][1]) < 1e-5

    replaced = jnp.broadcast_to((jnp.arange(30) < 10)[None, :, None], (2, 30, 1)) if replace else None
    context = Context(
        vector=vec, vector_at_zero=at_zero, replaced=replaced, rope=rope, video_length=30, text_length=length
    )
    pick = lambda stack, *i: jax.tree.map(lambda leaf: leaf[i], stack)  # noqa: E731
    for number, block in enumerate(blocks):
        (video, tokens), outputs = next(
            ([jnp.asarray(a.numpy()) for a in given[:2]], out) for module, given, out in seen if module is block
        )
        single = number - config.double_depth
        mine = pick(ours.double.blocks, number, 0) if single < 0 else pick(ours.single.blocks, *divmod(single, 2))
        got = mine(video, tokens, context)
        assert relative_error(got[0], outputs[0]) < 1e-5, number
        assert relative_error(np.asarray(got[1])[valid], outputs[1].numpy()[valid]) < 1e-5, number


@pytest.mark.long
def test_full_width_equals_diffusers():
    """HunyuanVideo's own widths, one double block deep: 0.9 G parameters on either side."""
    config = dataclasses.replace(DiTConfig.hunyuan_video(), double_depth=1, single_depth=2, refiner_depth=1)
    reference = _reference(config, seed=0, scale=0.02)
    ours = _from_reference(config, reference)
    told = conditions(config, seed=0, b=1)
    x, sigma = latents_and_sigma(config, b=1, t=2, h=4, w=6)
    expected = _reference_velocity(reference, x, sigma, told)
    assert relative_error(velocity(ours, x, sigma, told), expected) < 1e-4


def test_a_window_without_its_portrait_replaces_no_token():
    config = dataclasses.replace(SMALL, token_replace=True)
    replacing, plain = (draw_weights(DiT, c, 0) for c in (config, SMALL))
    x, sigma = latents_and_sigma(config)
    told = dataclasses.replace(conditions(config), portrait=x[:, 1], is_start=jnp.asarray([0.0, 1.0]))
    got, expected = (np.asarray(velocity(model, x, sigma, told)) for model in (replacing, plain))
    np.testing.assert_array_equal(got[0], expected[0])
    assert np.abs(got[1, 1:] - expected[1, 1:]).max() > 1e-3


# --- sizes ---------------------------------------------------------------------------------------------------------


def _count(config: DiTConfig) -> int:
    state = nnx.state(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_parameter_counts():
    assert _count(DiTConfig.hunyuan_video()) == 12_821_012_544
    assert _count(DiTConfig.magic_infinite_13b(audio=False)) == 12_810_991_680
    assert _count(DiTConfig.puppet()) == 13_428_800
    assert _count(DiTConfig.puppet(audio=False)) == 12_239_424


# --- laws ----------------------------------------------------------------------------------------------------------


def test_fresh_image_and_audio_inputs_leave_the_base_unchanged():
    """Zero-initialised image channels and audio outputs: a base model extended to MagicInfinite computes the same."""
    base = random_dit(SMALL)
    extended = jax.jit(lambda: DiT(TALKING, rngs=nnx.Rngs(1)))()
    old, new = nnx.to_pure_dict(nnx.state(base)), nnx.to_pure_dict(nnx.state(extended))
    assert not np.asarray(new["image_in"]["kernel"][old["image_in"]["kernel"].shape[0] :]).any()
    kernel = (
        jnp.zeros_like(new["image_in"]["kernel"])
        .at[: old["image_in"]["kernel"].shape[0]]
        .set(old["image_in"]["kernel"])
    )
    audio = {part: new[part]["audio"] for part in ("double", "single")}
    merged = new | old | {"image_in": {"kernel": kernel, "bias": old["image_in"]["bias"]}, "audio_in": new["audio_in"]}
    merged |= {part: old[part] | {"audio": audio[part]} for part in audio}
    nnx.update(extended, merged)
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING)
    plain = dataclasses.replace(
        told, image_tokens=None, image_mask=None, portrait=None, is_start=None, audio=None, face_mask=None
    )
    with_images = dataclasses.replace(plain, image_tokens=told.image_tokens, image_mask=told.image_mask)
    expected = velocity(base, x, sigma, with_images)
    np.testing.assert_allclose(velocity(extended, x, sigma, told), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(expected)).max() > 0.1


@pytest.fixture(scope="module")
def talking() -> DiT:
    return random_dit(TALKING)


def test_audio_adds_exactly_zero_outside_every_mask(talking):
    """Paper Eq. 2: per body, a video token outside all masks keeps its value to the bit."""
    audio = jax.tree.map(lambda leaf: leaf[0], talking.double.audio)
    t, n = 3, 6
    video = jax.random.normal(jax.random.key(0), (2, t * n, TALKING.width))
    tokens = jax.random.normal(jax.random.key(1), (2, 2, t, 4, TALKING.audio.width))
    mask = jnp.zeros((2, 2, t * n)).at[:, 0, ::4].set(1.0).at[:, 1, 1::4].set(0.5)
    out = audio(video, tokens, mask)
    outside = np.asarray(mask.sum(1) == 0)
    assert (np.asarray(out)[outside] == np.asarray(video)[outside]).all()
    assert (np.abs(np.asarray(out - video))[~outside].max(-1) > 1e-3).all()


def test_audio_adds_exactly_zero_outside_a_mask_that_moves(talking):
    """In each latent frame what lies outside the masks of that frame, wherever those of the others are."""
    x, sigma = latents_and_sigma(TALKING)
    t, h, w = x.shape[1:4]
    masks = jnp.zeros((2, 2, t, h, w)).at[:, 0, 0, 0, 1].set(1.0).at[:, 1, 1, 2:].set(0.5)  # in frame 2 nobody
    told = dataclasses.replace(conditions(TALKING, s=2), face_mask=masks)
    video, _, context = jax.jit(DiT.embed)(talking, x, sigma, told)
    tokens = np.zeros((t, h // 2, w // 2), bool)
    tokens[0, 0, 0] = tokens[1, 1] = True
    for bodies in (talking.double, talking.single):
        audio = jax.tree.map(lambda leaf: leaf[0], bodies.audio)
        changed = np.asarray(audio(video, context.audio, context.audio_mask) != video).any(-1)
        np.testing.assert_array_equal(changed.reshape(2, *tokens.shape), np.stack([tokens] * 2))


def test_no_audio_is_mask_zero(talking):
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING)
    np.testing.assert_array_equal(
        velocity(talking, x, sigma, told.drop(audio=True)),
        velocity(talking, x, sigma, dataclasses.replace(told, audio=None)),
    )
    assert (
        np.abs(np.asarray(velocity(talking, x, sigma, told) - velocity(talking, x, sigma, told.drop(audio=True)))).max()
        > 1e-3
    )


def test_a_face_of_one_latent_pixel_is_a_whole_token(talking):
    """The mask of a token is the largest of its four pixels': small faces survive."""
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING)
    corners = jnp.zeros((2, 1, 4, 6)).at[:, :, ::2, 1::2].set(1.0)
    got = velocity(talking, x, sigma, dataclasses.replace(told, face_mask=corners))
    np.testing.assert_array_equal(got, velocity(talking, x, sigma, told))


def test_frames_hear_only_their_own_audio(talking):
    audio = jax.tree.map(lambda leaf: leaf[0], talking.single.audio)
    t, n = 3, 6
    video = jax.random.normal(jax.random.key(0), (1, t * n, TALKING.width))
    tokens = jax.random.normal(jax.random.key(1), (1, 1, t, 4, TALKING.audio.width))
    mask = jnp.ones((1, 1, t * n))
    changed = np.abs(np.asarray(audio(video, tokens, mask) - audio(video, tokens.at[:, :, 1].add(1.0), mask)))
    per_frame = changed.reshape(t, -1).max(1)
    assert per_frame[0] == 0
    assert per_frame[2] == 0
    assert per_frame[1] > 1e-3


def test_speakers_add_up_in_any_order(talking):
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING, s=2)
    left = jnp.zeros((2, 2, 4, 6)).at[:, 0, :, :3].set(1.0).at[:, 1, :, 3:].set(1.0)
    told = dataclasses.replace(told, face_mask=left)
    swapped = dataclasses.replace(told, face_mask=left[:, ::-1], audio=told.audio[:, ::-1])
    np.testing.assert_allclose(
        velocity(talking, x, sigma, told), velocity(talking, x, sigma, swapped), rtol=1e-5, atol=1e-5
    )


def test_padded_text_has_no_effect(talking):
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING)
    other = jnp.where(told.text_mask[:, :, None], told.text_tokens, 7.0)
    got = velocity(talking, x, sigma, dataclasses.replace(told, text_tokens=other))
    np.testing.assert_allclose(got, velocity(talking, x, sigma, told), rtol=1e-5, atol=1e-5)


def test_dropped_text_and_image_carry_nothing(talking):
    """With text and image dropped, no value of theirs reaches the velocity."""
    x, sigma = latents_and_sigma(TALKING)
    one, two = (conditions(TALKING, seed=s).drop(text=True, image=True) for s in (0, 1))
    two = dataclasses.replace(two, audio=one.audio, face_mask=one.face_mask)
    np.testing.assert_allclose(velocity(talking, x, sigma, one), velocity(talking, x, sigma, two), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_scan_equals_unrolled(talking):
    """The scans over depth compute what a loop over the blocks does."""
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING)
    scanned = velocity(talking, x, sigma, told)
    with jax.disable_jit():  # lax.scan runs as a Python loop
        unrolled = talking(x, sigma, told)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-4, atol=1e-5)
    together = random_dit(dataclasses.replace(TALKING, unroll=2))
    np.testing.assert_allclose(scanned, velocity(together, x, sigma, told), rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_remat_changes_no_gradient():
    x, sigma = latents_and_sigma(TALKING)
    told = conditions(TALKING)
    grads = []
    for remat in ("none", "blocks", "offload"):
        model = random_dit(dataclasses.replace(TALKING, remat=remat))
        graphdef, state = nnx.split(model)
        loss = lambda state, graphdef=graphdef: jnp.mean(nnx.merge(graphdef, state)(x, sigma, told) ** 2)  # noqa: E731
        traced = jax.jit(jax.grad(loss)).trace(state)
        grads.append(jax.tree.leaves(traced.lower().compile()(state)))
        assert ("<host>" in str(traced.jaxpr)) == (remat == "offload")
    for kept, *computed in zip(*grads):
        for gradient in computed:
            np.testing.assert_allclose(gradient, kept, rtol=1e-3, atol=1e-6)
