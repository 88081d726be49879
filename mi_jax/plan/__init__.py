"""Memory, arithmetic and traffic of the real programs on machines that are not here (`mi-jax plan`)."""

import dataclasses
import math

import jax

from mi_jax.avatar.config import AvatarConfig
from mi_jax.avatar.folders import avatar_config
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.models.flops import Flops, dit_flops
from mi_jax.plan.programs import PRESETS, latent_grid, preset_of, sampler_step, training_batch, training_step
from mi_jax.plan.report import Plan, make_plan
from mi_jax.plan.topologies import Topology, find_topology
from mi_jax.rates import FPS
from mi_jax.sample.avatar import guidance_branches
from mi_jax.sample.layout import group_size, mesh_shape
from mi_jax.sample.windows import plan_windows
from mi_jax.train.denoiser import DenoiserObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import Turn


def plan_training(
    config: TrainConfig,
    topology: str,
    *,
    data: int | None = None,
    seq: int = 1,
    size: tuple[int, int] | None = None,
    turn: str | None = None,
) -> Plan:
    """The plan of one optimiser step of an experiment, of its largest batch, on a mesh of `data` x `seq`.

    size: height and width in pixels, where the records are not there yet (`programs.training_batch`).
    turn: whose step, of an objective with several turns; by default the first.

    Raises:
      InputError: no such topology, a mesh that does not fit it, a batch that does not divide, or records that are
        neither there nor described.
    """
    place = find_topology(topology)
    mesh = make_mesh(data, seq, place.devices)
    batch = training_batch(config, size)
    with training_step(config, batch, mesh, turn) as (lowered, arguments):
        state, frozen, _ = arguments
        own = turn or next(iter(state.params))
        plan = make_plan(
            f"a training step of {config.name} ({_described(batch)}{'' if own == Turn().name else f', {own}'})",
            lowered,
            arguments,
            place,
            (mesh.shape["data"], seq),
            **_training_flops(config, batch, place, own),
        )
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    parameters = {name: count(part) for name, part in state.params.items()} | {"frozen": count(frozen)}
    return dataclasses.replace(plan, parameters={name: n for name, n in parameters.items() if n})


def plan_sampling(
    config: AvatarConfig,
    topology: str,
    *,
    data: int | None = None,
    seq: int | None = None,
    latent_frames: int = 33,
    window: int = 33,
    overlap: int = 8,
    speakers: int = 1,
) -> Plan:
    """The plan of the step that sampling a video of `latent_frames` repeats: a group of windows, all branches of
    guidance; and how often the whole video takes it.

    Without `data` and `seq` the mesh is the one that `mi-jax animate` would choose (`layout.mesh_shape`).

    Raises:
      InputError: no such topology, a mesh that does not fit it, no speaker, or a window that cannot be.
    """
    if speakers < 1:
        raise InputError(f"--speakers is {speakers}, at least 1 is needed")
    place = find_topology(topology)
    windows = len(plan_windows(latent_frames, window, overlap))
    branches = guidance_branches(config.dit, {"audio": config.guidance_audio, "text": config.guidance_text})
    if data is None and seq is None:
        data, seq = mesh_shape(windows, branches, len(place.devices), config.dit.heads, config.dit.ulysses)
    mesh = make_mesh(data, 1 if seq is None else seq, place.devices)
    data, seq = mesh.shape["data"], mesh.shape["seq"]
    options = {"window": window, "overlap": overlap, "speakers": speakers}
    text = config.mllm.prompts.max_tokens
    if config.dit.image_to_video or config.dit.token_replace:
        text += config.mllm.num_image_tokens
    grid = latent_grid(config, config.height, config.width)
    flops = dit_flops(config.dit, min(window, latent_frames), *grid, text, speakers=speakers)
    group = group_size(branches, data)
    passes = windows * config.steps
    with sampler_step(config, latent_frames, mesh, **options) as (lowered, arguments):
        made = make_plan(
            f"{group} pass{'es' * (group != 1)} of {config.height}x{config.width}, "
            f"windows of {min(window, latent_frames)} latent frames, {branches} branches",
            lowered,
            arguments,
            place,
            (data, seq),
            model_flops=(flops * (branches * group)).forward,
            executed_flops=(flops * (branches * group)).forward,
        )
    video = (latent_frames - 1) * config.vae.temporal_stride + 1
    return dataclasses.replace(made, calls=-(-passes // group), video_seconds=video / FPS)


def sampled_model(name: str | DenoiserObjective) -> AvatarConfig:
    """The model to plan sampling for: that of a preset or a model folder, or the one that an objective trains.

    Raises:
      InputError: no such model, or an objective that trains no denoiser.
    """
    if isinstance(name, str):
        return PRESETS[name]() if name in PRESETS else avatar_config(name)
    if not isinstance(name, DenoiserObjective):
        raise InputError(f"{type(name).__name__}: trains no denoiser to sample with")
    return dataclasses.replace(preset_of(name.dit), dit=name.dit)


def _training_flops(config: TrainConfig, batch: dict, place: Topology, turn: str) -> dict[str, float | None]:
    """By formula for denoisers; for other objectives there is none."""
    objective = config.objective
    if not isinstance(objective, DenoiserObjective):
        return {"model_flops": None, "executed_flops": None}
    clips, frames, height, width, _ = batch["latents"].shape
    text = batch["text_tokens"].shape[1] + batch["image_tokens"].shape[1]
    flops: Flops = (
        dit_flops(objective.dit, frames, height, width, text, speakers=objective.speakers, encode=True) * clips
    )
    backward = 3.5 if place.platform == "tpu" else 2.5
    executed = flops.executed_in_training(remat=objective.dit.remat != "none", attention_backward=backward)
    forward, trained = objective.evaluations(turn)
    only = forward * flops.forward
    return {"model_flops": only + trained * flops.training, "executed_flops": only + trained * executed}


def _described(batch: dict) -> str:
    leaf = max(batch.values(), key=lambda x: x.size)
    shape = batch["latents"].shape if "latents" in batch else leaf.shape
    return f"a batch of {' x '.join(map(str, shape))}"


__all__ = ["Plan", "plan_sampling", "plan_training", "sampled_model"]
