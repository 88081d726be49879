"""HunyuanVideo's denoisers from files in Tencent's names and in diffusers', and their extension to MagicInfinite."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers
from flax import nnx
from reference import relative_error
from safetensors.torch import save_file

from mi_jax.avatar.families import convert
from mi_jax.avatar.folders import load_part
from mi_jax.conditions import Conditions
from mi_jax.errors import InputError
from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.weights.configs import config_to_json
from mi_jax.weights.hunyuan_video import denoiser, diffusers_table, extend, tencent_table
from mi_jax.weights.rows import Part, check, leaf_shapes, plan, write_model
from mi_jax.weights.sources import Checkpoint, Stored

SMALL = DiTConfig(
    width=64, heads=2, double_depth=2, single_depth=4, refiner_depth=1, text_dim=20, pooled_dim=12,
    rope_axes=(4, 14, 14),
)  # fmt: skip
AUDIO = AudioEncoderConfig(input_dim=8, layers=2, width=16, heads=2, depth=1)


def tencent_tensors(c: DiTConfig, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Noise under the names and shapes of `HYVideoDiffusionTransformer`, written down from its public code."""
    generator = torch.Generator().manual_seed(seed)
    named = {}

    def dense(name: str, d_in: int, d_out: int) -> None:
        named[f"{name}.weight"] = 0.1 * torch.randn(d_out, d_in, generator=generator)
        named[f"{name}.bias"] = 0.1 * torch.randn(d_out, generator=generator)

    def norm(name: str, dim: int, bias: bool) -> None:
        named[f"{name}.weight"] = 1 + 0.2 * torch.randn(dim, generator=generator)
        if bias:
            named[f"{name}.bias"] = 0.2 * torch.randn(dim, generator=generator)

    w, mlp, head = c.width, c.mlp_ratio * c.width, c.head_dim
    dense("img_in.proj", 4 * c.in_channels, w)
    named["img_in.proj.weight"] = named["img_in.proj.weight"].reshape(w, c.in_channels, 1, 2, 2)
    dense("txt_in.input_embedder", c.text_dim, w)
    embedders = [("time_in.mlp.0", "time_in.mlp.2", 256), ("vector_in.in_layer", "vector_in.out_layer", c.pooled_dim)]
    embedders += [("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.mlp.2", 256)]
    embedders += [("txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2", c.text_dim)]
    if c.guidance_embedding:
        embedders += [("guidance_in.mlp.0", "guidance_in.mlp.2", 256)]
    for first, second, dim in embedders:
        dense(first, dim, w)
        dense(second, w, w)
    for i in range(c.refiner_depth):
        block = f"txt_in.individual_token_refiner.blocks.{i}"
        norm(f"{block}.norm1", w, bias=True)
        norm(f"{block}.norm2", w, bias=True)
        for name, d_in, d_out in (
            ("self_attn_qkv", w, 3 * w), ("self_attn_proj", w, w), ("mlp.fc1", w, mlp), ("mlp.fc2", mlp, w),
            ("adaLN_modulation.1", w, 2 * w),
        ):  # fmt: skip
            dense(f"{block}.{name}", d_in, d_out)
    for i in range(c.double_depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            for name, d_in, d_out in (
                ("mod.linear", w, 6 * w), ("attn_qkv", w, 3 * w), ("attn_proj", w, w), ("mlp.fc1", w, mlp),
                ("mlp.fc2", mlp, w),
            ):  # fmt: skip
                dense(f"{block}_{name}", d_in, d_out)
            norm(f"{block}_attn_q_norm", head, bias=False)
            norm(f"{block}_attn_k_norm", head, bias=False)
    for i in range(c.single_depth):
        block = f"single_blocks.{i}"
        dense(f"{block}.linear1", w, 3 * w + mlp)
        dense(f"{block}.linear2", w + mlp, w)
        dense(f"{block}.modulation.linear", w, 3 * w)
        norm(f"{block}.q_norm", head, bias=False)
        norm(f"{block}.k_norm", head, bias=False)
    dense("final_layer.linear", w, 4 * c.latent_channels)
    dense("final_layer.adaLN_modulation.1", w, 2 * w)
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def diffusers_model(c: DiTConfig, named: dict[str, torch.Tensor]) -> HunyuanVideoTransformer3DModel:
    """The reference with these weights, whose names diffusers itself translates."""
    renamed = convert_hunyuan_video_transformer_to_diffusers(
        {name: tensor for name, tensor in named.items() if ".linear1." not in name}
    )
    for i in range(c.single_depth):  # diffusers splits these at width 3072 alone
        for kind in ("weight", "bias"):
            joined = named[f"single_blocks.{i}.linear1.{kind}"]
            q, k, v, mlp = torch.split(joined, [c.width] * 3 + [joined.shape[0] - 3 * c.width])
            block = f"single_transformer_blocks.{i}"
            renamed |= {f"{block}.attn.to_{name}.{kind}": part for name, part in zip("qkv", (q, k, v))}
            renamed[f"{block}.proj_mlp.{kind}"] = mlp
    model = HunyuanVideoTransformer3DModel(
        in_channels=c.in_channels,
        out_channels=c.latent_channels,
        num_attention_heads=c.heads,
        attention_head_dim=c.head_dim,
        num_layers=c.double_depth,
        num_single_layers=c.single_depth,
        num_refiner_layers=c.refiner_depth,
        mlp_ratio=c.mlp_ratio,
        guidance_embeds=c.guidance_embedding,
        text_embed_dim=c.text_dim,
        pooled_projection_dim=c.pooled_dim,
        rope_axes_dim=c.rope_axes,
        image_condition_type=("token_replace" if c.token_replace else "latent_concat" if c.image_to_video else None),
    ).eval()
    model.load_state_dict(renamed, strict=True)
    return model


def told(
    c: DiTConfig, seed: int, b: int, t: int, h: int, w: int, n: int = 7
) -> tuple[jax.Array, jax.Array, Conditions]:
    """Latents, noise levels and conditions; the text of the examples is padded by different lengths."""
    n, rng = 7, np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    conditions = Conditions(
        text_tokens=normal(b, n, c.text_dim),
        text_mask=jnp.arange(n)[None] < jnp.asarray([[n], [n - 4]])[:b],
        text_pooled=normal(b, c.pooled_dim),
        portrait=normal(b, h, w, c.latent_channels),
        is_start=jnp.ones(b),
        guidance=jnp.ones(b) if c.guidance_embedding else None,
    )
    return normal(b, t, h, w, c.latent_channels), jnp.asarray([0.83, 0.31])[:b], conditions


def reference_velocity(c: DiTConfig, model, x, sigma, conditions) -> np.ndarray:
    """diffusers' velocity [b t h w c], its input put together as its pipeline does."""
    if c.token_replace:
        x = x.at[:, 0].set(conditions.portrait)
    if c.image_to_video:
        portrait = jnp.zeros_like(x).at[:, 0].set(conditions.portrait)
        mask = jnp.zeros((*x.shape[:-1], 1)).at[:, 0].set(1.0)
        x = jnp.concatenate([x, portrait, mask], axis=-1)
    as_torch = lambda a: torch.from_numpy(np.array(a))  # noqa: E731
    with torch.no_grad():
        out = model(
            hidden_states=as_torch(jnp.moveaxis(x, -1, 1)),
            timestep=as_torch(1000 * sigma),
            encoder_hidden_states=as_torch(conditions.text_tokens),
            encoder_attention_mask=as_torch(conditions.text_mask),
            pooled_projections=as_torch(conditions.text_pooled),
            guidance=as_torch(1000 * conditions.guidance) if c.guidance_embedding else None,
        ).sample
    return np.moveaxis(out.numpy(), 1, -1)


velocity = jax.jit(lambda model, *arguments: model(*arguments))


def leaves(module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module))}


CASES = {
    "hunyuan-video": (SMALL, "hunyuan-video", (2, 1, 6, 10)),
    "hunyuan-video with guidance": (dataclasses.replace(SMALL, guidance_embedding=True), "hunyuan-video", (2, 9, 2, 6)),
    "token replace": (
        dataclasses.replace(SMALL, token_replace=True, guidance_embedding=True), "hunyuan-video-i2v", (2, 9, 6, 2),
    ),
    "latent concat": (dataclasses.replace(SMALL, image_to_video=True), "hunyuan-video-i2v", (2, 1, 10, 4)),
    "magic-141": (dataclasses.replace(SMALL, image_to_video=True), "magic-141", (1, 5, 4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_layouts_compute_what_diffusers_does(tmp_path, case):
    config, family, shape = CASES[case]
    seed = list(CASES).index(case)
    named = tencent_tensors(config, seed)
    model = diffusers_model(config, named)
    torch.save({"module": named}, tmp_path / "mp_rank_00_model_states.pt")
    model.save_pretrained(tmp_path / "diffusers" / "transformer", max_shard_size="300KB")
    convert(family, tmp_path / "mp_rank_00_model_states.pt", tmp_path / "tencent")
    convert(family, tmp_path / "diffusers", tmp_path / "hub")
    assert len(list((tmp_path / "diffusers" / "transformer").glob("*.safetensors"))) > 2
    ours, same = (load_part(tmp_path / name, "dit") for name in ("tencent", "hub"))
    assert dataclasses.replace(ours.config, remat="blocks") == config
    assert same.config == config
    for name, leaf in leaves(ours).items():
        np.testing.assert_array_equal(leaf, leaves(same)[name], err_msg=name)
    x, sigma, conditions = told(config, seed, *shape)
    expected = reference_velocity(config, model, x, sigma, conditions)
    skip = 1 if config.token_replace else 0  # the first frame's velocity is ours: it leads to the portrait
    got = np.asarray(velocity(ours, x, sigma, conditions))
    assert relative_error(got[:, skip:], expected[:, skip:]) <= 1e-5


def test_the_full_models_tensors_make_up_the_full_tree():
    """Names and shapes of the 13B model of diffusers, of which nothing is left over or missing."""
    config = DiTConfig.hunyuan_video()
    shapes = leaf_shapes(lambda: DiT(config, rngs=nnx.Rngs(0)))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 12_821_012_544
    with torch.device("meta"):
        state = HunyuanVideoTransformer3DModel().state_dict()
    stored = {n: Stored(tuple(x.shape), np.dtype(jnp.bfloat16), (0, i), list) for i, (n, x) in enumerate(state.items())}
    rows = plan(shapes, diffusers_table(config))
    assert check(Part("dit", Checkpoint(Path("meta"), stored), shapes, rows)) == []
    # Tencent's names: as many rows, of fewer and larger tensors.
    assert len(plan(shapes, tencent_table(config))) == len(rows)


def test_bf16_weights_stay_bf16_on_disk(tmp_path):
    named = tencent_tensors(SMALL, dtype=torch.bfloat16)
    save_file(named, tmp_path / "a.safetensors")
    convert("hunyuan-video", tmp_path / "a.safetensors", tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 2 * sum(tensor.numel() for tensor in named.values()) + 20_000
    loaded = leaves(load_part(tmp_path / "out", "dit", dtype=jnp.bfloat16))
    np.testing.assert_array_equal(
        loaded["final.modulation.linear.bias"].astype(np.float32),
        named["final_layer.adaLN_modulation.1.bias"].float().numpy(),
    )


# --- extension -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_an_extended_model_computes_what_it_did(tmp_path, case):
    """On the old inputs, whatever portrait and voices it is given: stage 2 and stage 1."""
    config, family, _ = CASES[case]
    save_file(tencent_tensors(config, 3), tmp_path / "a.safetensors")
    original_config, part = denoiser(tmp_path / "a.safetensors", family)
    for name, audio in (("stage2", AUDIO), ("stage1", None)):
        extended_config, extended = extend(original_config, part, audio, seed=5)
        assert extended_config == dataclasses.replace(
            config, image_to_video=True, token_replace=False, guidance_embedding=False, audio=audio
        )
        write_model(tmp_path / name, [extended], {"dit": config_to_json(extended_config)})
    write_model(tmp_path / "original", [part], {"dit": config_to_json(original_config)})
    original, stage2, stage1 = (load_part(tmp_path / name, "dit") for name in ("original", "stage2", "stage1"))

    x, sigma, conditions = told(config, 1, 1, 3, 4, 6)
    if config.token_replace:  # replaced tokens have become channels: as in a window that the portrait does not start
        conditions = dataclasses.replace(conditions, is_start=jnp.zeros(1))
    expected = np.asarray(velocity(original, x, sigma, conditions))
    rng = np.random.default_rng(2)
    heard = dataclasses.replace(
        conditions,
        audio=jnp.asarray(rng.normal(size=(1, 2, 3, AUDIO.tokens, AUDIO.width)), jnp.float32),
        face_mask=jnp.ones((1, 2, 4, 6)),
    )
    assert relative_error(velocity(stage2, x, sigma, heard), expected) <= 2e-6
    # Stage 1 is stage 2 without its audio, leaf by leaf.
    one, two = leaves(stage1), leaves(stage2)
    assert {name for name in two if "audio" not in name} == one.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name], err_msg=name)
    # What is new is drawn as at a fresh start: outputs zero, each layer's queries its own.
    assert not two["double.audio.out.kernel"].any()
    assert not two["single.audio.out.kernel"].any()
    queries = np.concatenate([two["double.audio.q.kernel"], two["single.audio.q.kernel"]])
    assert len({layer.tobytes() for layer in queries}) == len(queries) == 4
    np.testing.assert_allclose(queries.std(), np.sqrt(2 / (2 * 64)), rtol=0.1)
    kernel = two["image_in.kernel"]
    assert kernel.shape == (33 * 4, 64)
    if not config.image_to_video:
        assert not kernel[64:].any()


def test_the_guidance_that_an_extension_keeps_is_one(tmp_path):
    """A guidance of 6 would be another function: the constant is that of scale 1."""
    config = CASES["hunyuan-video with guidance"][0]
    save_file(tencent_tensors(config, 3), tmp_path / "a.safetensors")
    _, part = denoiser(tmp_path / "a.safetensors", "hunyuan-video")
    new, extended = extend(config, part, None)
    write_model(tmp_path / "out", [extended], {"dit": config_to_json(new)})
    write_model(tmp_path / "original", [part], {"dit": config_to_json(config)})
    original, ours = (load_part(tmp_path / name, "dit") for name in ("original", "out"))
    from mi_jax.models.layers import sinusoid

    embedding = {g: original.guidance_in(sinusoid(jnp.asarray([1000.0 * g]), 256))[0] for g in (1.0, 6.0)}
    added = ours.time_in.fc2.bias[...] - original.time_in.fc2.bias[...]
    np.testing.assert_allclose(added, embedding[1.0], atol=1e-5)
    assert np.abs(np.asarray(added - embedding[6.0])).max() > 1e-2


# --- bad input -----------------------------------------------------------------------------------------------------


@functools.cache
def _named(channels: int) -> dict[str, torch.Tensor]:
    return tencent_tensors(dataclasses.replace(SMALL, image_to_video=channels == 33))


def test_other_families_are_refused(tmp_path):
    for channels in (16, 33):
        save_file(_named(channels), tmp_path / f"{channels}.safetensors")
    with pytest.raises(InputError, match=r"33 input channels is no hunyuan-video \(but hunyuan-video-i2v or magic-141"):
        denoiser(tmp_path / "33.safetensors", "hunyuan-video")
    with pytest.raises(InputError, match=r"16 input channels is no magic-141"):
        denoiser(tmp_path / "16.safetensors", "magic-141")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"no HunyuanVideo denoiser: neither img_in\.proj\.weight"):
        denoiser(tmp_path / "other.safetensors", "hunyuan-video")


def test_damaged_models_are_refused(tmp_path):
    named = dict(_named(16))
    del named["single_blocks.2.linear1.bias"]
    save_file(named | {"double_blocks.0.img_attn_extra.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(
        InputError,
        match=r"1 unexpected: double_blocks\.0\.img_attn_extra\.weight; 1 missing: single_blocks\.2\.l",
    ):
        convert("hunyuan-video", tmp_path / "a.safetensors", tmp_path / "out")
    named = {name: tensor for name, tensor in _named(16).items() if not name.startswith("single_blocks.3")}
    save_file(named, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors: single_depth 3 must be a multiple of single_per_body 2"):
        convert("hunyuan-video", tmp_path / "b.safetensors", tmp_path / "out")
    (tmp_path / "hub").mkdir()
    save_file({"x_embedder.proj.weight": torch.zeros(2)}, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(InputError, match=r"hub/config\.json: No such file"):
        convert("hunyuan-video", tmp_path / "hub", tmp_path / "out")
    (tmp_path / "hub" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"not the config of HunyuanVideoTransformer3DModel \(KeyError\('in_channels'"):
        convert("hunyuan-video", tmp_path / "hub", tmp_path / "out")
    assert not (tmp_path / "out").exists()
