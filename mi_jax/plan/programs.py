"""The programs to plan: the trainer's step and the sampler's noise level, for arrays that exist nowhere."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mi_jax.avatar.config import AvatarConfig
from mi_jax.conditions import Conditions
from mi_jax.data.records import write_records
from mi_jax.errors import InputError
from mi_jax.mesh import on_mesh, parameter_spec
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.sample.avatar import guidance_weights, guided_velocity
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.layout import group_size
from mi_jax.sample.order import Order, held_windows
from mi_jax.sample.stream import Grid, Held, advance
from mi_jax.sample.windows import grid_length
from mi_jax.train.denoiser import DenoiserObjective
from mi_jax.train.loop import arrays_of
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import turns_of


def _placed(tree: Any, mesh: Mesh, spec=lambda shape: P()) -> Any:
    """Abstract arrays, spread over the mesh by `spec(shape)`."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x.shape)))  # noqa: E731
    return jax.tree.map(place, tree)


def _spread(tree: Any, mesh: Mesh) -> Any:
    return _placed(tree, mesh, lambda shape: parameter_spec(shape, mesh))


@contextlib.contextmanager
def training_step(
    config: TrainConfig, batch: dict[str, Any], mesh: Mesh, turn: str | None = None
) -> Iterator[tuple[jax.stages.Lowered, Any]]:
    """The trainer's jitted, donated step, lowered for `mesh` as `mi_jax.train.loop` lays it out, and its state.

    `batch` are abstract arrays of all of the step's clips (`training_batch`). turn: whose step, of an objective with
    several turns; by default the first. Compile it inside the context.

    Raises:
      InputError: the batch does not divide over the mesh's `data` axis; no such turn.
    """
    objective = config.objective
    turns = {turn.name: turn for turn in turns_of(objective)}
    if turn is not None and turn not in turns:
        raise InputError(f"--turn is {turn}, none of {', '.join(turns)}")
    own = turns[turn or next(iter(turns))]
    rows = {x.shape[0] for x in batch.values()}
    if any(n % mesh.shape["data"] for n in rows):
        raise InputError(f"a batch of {max(rows)} clips does not divide over data={mesh.shape['data']}")
    key = jax.eval_shape(lambda: jax.random.key(0))  # nothing can be computed on devices that are not here
    with on_mesh(mesh):
        graph, params, frozen = split_model(nnx.eval_shape(objective.init, key), objective)
        params, frozen = _spread(params, mesh), _spread(frozen, mesh)
        state = jax.eval_shape(lambda params: init_state(config, params, jax.random.key(0)), params)
        state = jax.tree.map(lambda x: _placed(x, mesh) if x.sharding is None else x, state)  # counters, the key
        placed = _placed(batch, mesh, lambda shape: P("data"))
        yield make_step(config, graph, own).lower(state, frozen, placed), (state, frozen, placed)


def training_batch(config: TrainConfig, size: tuple[int, int] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The largest batch of the experiment, as its own dataset gives it; the first dimension is the batch.

    Where the records of a curriculum are not there yet, one of zeros stands in for them: of pictures of `size` (height,
    width), with the encoders' sizes of the model's preset.

    Raises:
      InputError: the records are not there and no size is given; or what the dataset says of bad input.
    """
    objective = config.objective
    if not isinstance(objective, DenoiserObjective):
        return _shapes(arrays_of(next(iter(objective.dataset(config.seed)))))
    frames, clips = max(objective.windows, key=lambda kind: (kind[0] * kind[1], kind[0]))
    one = dataclasses.replace(objective, windows=((frames, 1),), window_weights=(1.0,))
    folders = [objective.records] if isinstance(objective.records, str) else list(objective.records)
    if size is None and not all(pathlib.Path(folder).is_dir() for folder in folders):
        raise InputError(f"{folders[0]}: no such records; --size HxW says what pictures to plan for")
    with tempfile.TemporaryDirectory() as scratch:
        if size is not None:
            folder = pathlib.Path(scratch) / "records"
            write_records(folder, [_empty_record(objective, frames, size)])
            one = dataclasses.replace(one, records=str(folder))
        batch = _shapes(arrays_of(one.dataset(config.seed)[0]))
    return {name: jax.ShapeDtypeStruct((clips, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def _shapes(arrays: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)) for name, x in arrays.items()}


def _empty_record(objective: DenoiserObjective, frames: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A record of zeros as `mi_jax.data.features.clip_record` makes them, a latent frame longer than a window."""
    preset = preset_of(objective.dit)
    h, w = latent_grid(preset, *size)
    half = lambda *shape: np.zeros(shape, np.float16)  # noqa: E731
    dit, prompts = objective.dit, preset.mllm.prompts
    video_frames = preset.vae.temporal_stride * frames + 1
    record = {
        "latents": half(frames + 1, h, w, dit.latent_channels),
        "portrait": half(h, w, dit.latent_channels),
        "face_mask": np.zeros((objective.speakers, h, w), np.float32),
        "text_tokens": half(prompts.max_tokens, dit.text_dim),
        "text_mask": np.zeros(prompts.max_tokens, bool),
        "image_tokens": half(preset.mllm.num_image_tokens, dit.text_dim),
    }
    if dit.pooled_dim:
        record["text_pooled"] = half(dit.pooled_dim)
    if dit.audio:
        record["audio_hidden"] = half(objective.speakers, 2 * video_frames, dit.audio.layers, dit.audio.input_dim)
    return record


PRESETS = {"puppet": AvatarConfig.puppet, "magic-infinite-13b": AvatarConfig.magic_infinite_13b}


def preset_of(dit: DiTConfig) -> AvatarConfig:
    """The preset whose encoders and VAE feed this denoiser.

    Raises:
      InputError: there is none.
    """
    fed = lambda d: (d.text_dim, d.pooled_dim, d.latent_channels)  # noqa: E731
    for make in PRESETS.values():
        if fed(make().dit) == fed(dit):
            return make()
    raise InputError(
        f"no preset has a denoiser of text {dit.text_dim}, pooled text {dit.pooled_dim} and "
        f"{dit.latent_channels} latent channels: its records must be there to plan for it"
    )


def latent_grid(config: AvatarConfig, height: int, width: int) -> tuple[int, int]:
    """Latent height and width of a video of so many pixels, padded to what VAE and patches divide."""
    padded = config.replace(height=height, width=width).padded_size
    return padded[0] // config.vae.spatial_stride, padded[1] // config.vae.spatial_stride


@contextlib.contextmanager
def sampler_step(
    config: AvatarConfig,
    latent_frames: int,
    mesh: Mesh,
    *,
    window: int = 33,
    overlap: int = 8,
    speakers: int = 1,
    order: Order = "wavefront",
) -> Iterator[tuple[jax.stages.Lowered, Any]]:
    """The step that `Avatar.denoise` repeats (`sample.stream.advance`), jitted, lowered for `mesh`, and its arguments:
    a group of windows, as many as the mesh shares out.

    The video is of `config.height` x `config.width` and `latent_frames` long; guidance is the config's. Compile it
    inside the context.
    """
    dit, dtype = config.dit, jnp.dtype(config.dtype)
    h, w = latent_grid(config, config.height, config.width)
    weights = guidance_weights(dit, {"audio": config.guidance_audio, "text": config.guidance_text})
    group = group_size(Guidance(**weights).branches, mesh.shape["data"])
    grid = Grid(window, overlap, order, grid_length(latent_frames, window, overlap))
    length, held = grid.window, grid.held_frames(held_windows(order, config.steps, grid.reach, group))
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    prompts = config.mllm.prompts
    conditions = {
        "text_tokens": shape(1, prompts.max_tokens, dit.text_dim, dtype=dtype),
        "text_mask": shape(1, prompts.max_tokens, dtype=bool),
    }
    if dit.pooled_dim:
        conditions["text_pooled"] = shape(1, dit.pooled_dim, dtype=dtype)
    if dit.image_to_video or dit.token_replace:
        conditions |= {
            "image_tokens": shape(1, config.mllm.num_image_tokens, dit.text_dim, dtype=dtype),
            "image_mask": shape(1, config.mllm.num_image_tokens, dtype=bool),
            "portrait": shape(1, h, w, dit.latent_channels),
            "is_start": shape(1),
        }
    if dit.audio:
        audio = (1, speakers, length, dit.audio.tokens, dit.audio.width)
        conditions |= {"audio": shape(*audio, dtype=dtype), "face_mask": shape(1, speakers, h, w)}
    if dit.guidance_embedding:
        conditions["guidance"] = shape(1)
    with on_mesh(mesh):
        graph, state = nnx.split(nnx.eval_shape(lambda: DiT(dit, rngs=nnx.Rngs(0))))
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), state)
        model = nnx.merge(graph, _spread(state, mesh))
        frames = shape(1, held, h, w, config.vae.latent_channels)
        flags = shape(group, length, dtype=bool)
        weights, *rest = _placed(
            (
                jax.tree.map(lambda x: shape(*x.shape), weights),
                Held(frames, frames),
                shape(group, dtype=jnp.int32),
                shape(group, length),
                flags,
                flags,
                shape(group, 2),
                [Conditions(**conditions)] * group,
            ),
            mesh,
        )
        arguments = (jax.tree_util.Partial(guided_velocity, model, weights), *rest)
        yield advance.lower(*arguments), arguments
