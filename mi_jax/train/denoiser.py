"""What objectives of denoisers have in common: prepared records, what the denoiser is told of them, and samples."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Annotated

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mi_jax.avatar.folders import load_part, part_config
from mi_jax.bounds import Batch, LatentFrames, Share, Shift, Weight, Within, check_fields
from mi_jax.conditions import Conditions
from mi_jax.data.batches import batches
from mi_jax.data.features import to_pixels
from mi_jax.data.records import RecordSource
from mi_jax.diffusion import euler_step, sigma_schedule
from mi_jax.errors import InputError
from mi_jax.memory import check_host_memory
from mi_jax.mesh import spec_of
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.tiling import decode_latents
from mi_jax.models.vae import VAE
from mi_jax.train.flow import Velocity, per_example
from mi_jax.train.windows import cut_window, draw_windows, masks_move, stack_clips


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserObjective:
    """Windows of prepared records, for a denoiser or several of one kind. Subclasses add module, turns and loss."""

    dit: DiTConfig
    records: str | tuple[str, ...]
    """Folder of feature records (`mi-jax prepare`), or several, taken as one."""
    shift: Shift = 3.0
    windows: tuple[tuple[LatentFrames, Batch], ...] = ((9, 6), (17, 3), (33, 2))
    """(latent frames, batch size) of the training windows. Each step draws one kind, so that every length is
    learned."""
    window_weights: tuple[Weight, ...] = (0.4, 0.3, 0.3)
    """How often each kind of several is drawn."""
    mid_clip: Share = 0.5
    """Share of windows cut from the middle of a clip: the portrait stays as identity, but does not start the window.
    So are all windows but the first of a long video; clips must be longer than every kind of window for it."""
    adaptive_weight: Weight = 0.0
    """lambda of Eq. 4; the paper's stage 2 has 10."""
    face_masked: bool = True
    """False lets audio act everywhere (for the ablation of Eq. 2)."""
    speakers: Annotated[int, Within(1, 64)] = 1
    """Most speakers of a record. Records with fewer get speakers who are nowhere (mask 0), so that batches are even."""
    whole_mask: Share = 0.0
    """Share of one speaker's windows whose audio may act everywhere, as at sampling when no face mask is known."""
    sample_vae: str | None = None
    """Shipped model or model folder whose VAE decodes the samples shown during training."""

    def __post_init__(self):
        check_fields(self)
        if not self.windows:
            raise InputError("windows is empty: at least one kind, of so many latent frames and so large a batch")
        if len(self.windows) == 1:
            return  # all windows are of this kind, whatever the weights
        if len(self.windows) != len(self.window_weights):
            raise InputError(f"window_weights has {len(self.window_weights)} entries, for {len(self.windows)} windows")
        if not any(self.window_weights):
            raise InputError(f"window_weights {self.window_weights}: one must be above 0")

    def dataset(self, seed: int, share: int = 0, shares: int = 1) -> grain.MapDataset:
        """Batches of windows, any step of which can be drawn on its own; the mixture of lengths is fixed by
        the seed."""
        sources = self._sources()
        records = grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources])
        kinds = []
        for i, (length, batch) in enumerate(self.windows):
            cut = functools.partial(
                cut_window,
                length=length,
                mid_clip=self.mid_clip,
                speakers=self.speakers if self.dit.audio else 0,
                face_masked=self.face_masked,
                whole_mask=self.whole_mask,
                moving=masks_move(sources),
            )
            clips = records.seed(seed + i).shuffle().repeat()
            kinds.append(batches(clips.random_map(cut), batch, share, shares))
        return grain.MapDataset.mix(kinds, weights=self.window_weights) if len(kinds) > 1 else kinds[0]

    def pool(self) -> dict[str, np.ndarray]:
        """All clips of the records, for `draw` (`windows.stack_clips`)."""
        speakers = self.speakers if self.dit.audio else 0
        return stack_clips(self._sources(), longest_window=self._longest, speakers=speakers)

    def kinds(self) -> tuple[float, ...]:
        """Shares of the `windows` in training."""
        return self.window_weights if len(self.windows) > 1 else (1.0,)

    def draw(self, pool: dict[str, Array], key: Key[Array, ""], kind: int) -> dict[str, Array]:
        """A batch of `windows[kind]` out of the pool, on the device. Unlike `dataset`, which deals out all clips
        before any comes again, every window is of a random clip."""
        length, batch = self.windows[kind]
        return draw_windows(
            pool,
            key,
            length=length,
            batch=batch,
            mid_clip=self.mid_clip,
            face_masked=self.face_masked,
            whole_mask=self.whole_mask,
        )

    @property
    def _longest(self) -> int:
        return max(length for length, _ in self.windows)

    def _sources(self) -> list[RecordSource]:
        folders = [self.records] if isinstance(self.records, str) else self.records
        sources = _open_records(folders, self._longest, self.mid_clip)
        _, *picture = sources[0].leaves["latents"]["shape"]
        largest = max(length * batch for length, batch in self.windows)
        check_host_memory(4 * largest * math.prod(picture), f"a batch of windows {self.windows}")
        return sources

    def evaluations(self, turn: str) -> tuple[float, float]:
        """How often a step of this turn evaluates a denoiser without and with a backward pass, on the mean."""
        return 0.0, 1.0

    def conditions(self, model: DiT | Velocity, batch: dict[str, Array]) -> Conditions:
        """What the denoiser is told of a batch of `dataset`. With audio it must be a `DiT`, which encodes it."""
        return Conditions(
            text_tokens=batch["text_tokens"],
            text_mask=batch["text_mask"],
            text_pooled=batch.get("text_pooled"),
            image_tokens=batch["image_tokens"],
            image_mask=jnp.ones(batch["image_tokens"].shape[:2], bool),
            portrait=batch["portrait"],
            is_start=batch["is_start"],
            audio=model.encode_audio(batch["audio_steps"], batch["is_start"]) if self.dit.audio else None,
            face_mask=batch["audio_mask"] if self.dit.audio else None,
        )

    def shows(self) -> bool:
        """Whether a VAE is named that decodes samples. Raises InputError where it is not there."""
        if self.sample_vae is not None:
            try:
                part_config(self.sample_vae, "vae")
            except InputError as fault:
                raise InputError(f"sample_vae, which decodes samples: {fault}") from None
        return self.sample_vae is not None

    def sample(self, model: DiT, batch: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        """The latents [b t h w c] of a batch's windows, true and generated (20 Euler steps, no guidance)."""
        truth = batch["latents"].astype(jnp.float32)
        noise = jax.random.normal(key, truth.shape, jnp.float32, out_sharding=spec_of(truth))
        return {
            "truth": truth,
            "generated": euler(model, noise, sigma_schedule(20, self.shift), self.conditions(model, batch)),
        }

    def show(self, sampled: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The first window of what `sample` gave, true above generated, as uint8 frames."""
        vae = cached_vae(self.sample_vae)
        rows = [to_pixels(decode_latents(vae, sampled[name][:1])[0]) for name in ("truth", "generated")]
        return {"truth above, generated below": np.concatenate(rows, axis=1)}


def euler(
    velocity: Velocity,
    noise: Float[Array, "b t h w c"],
    sigmas: Float[Array, "levels"],
    conditions: Conditions | None,
) -> Float[Array, "b t h w c"]:
    """Latents at the last of `sigmas`, from `noise` at the first: one Euler step between each two."""

    def step(x, pair):
        return euler_step(x, velocity(x, per_example(pair[0], x), conditions), *pair), None

    return jax.lax.scan(step, noise, (sigmas[:-1], sigmas[1:]))[0]


@functools.cache
def cached_vae(folder: str) -> VAE:
    return load_part(folder, "vae")


_EVEN = {"latents": 3, "face_mask": 2, "audio_hidden": 2}  # last axes, in which records agree; not in time, speakers


def _open_records(folders: Sequence[str], longest: int, mid_clip: float) -> list[RecordSource]:
    """Folders that can be taken as one: of one picture size, made by encoders of the same sizes, and with clips that
    hold the longest window, and more than that where some windows do not start a clip."""
    if not folders:
        raise InputError("records: no folder is given")
    sources = [RecordSource(folder) for folder in folders]
    kinds = [
        {name: (leaf["dtype"], *leaf["shape"][-_EVEN.get(name, 0) :]) for name, leaf in source.leaves.items()}
        for source in sources
    ]
    for folder, source, leaves in zip(folders, sources, kinds):
        mixed = sorted(name for name, kind in leaves.items() if None in kind)
        if mixed:
            raise InputError(f"{folder}: its records differ in the size of {mixed[0]}; a batch needs one size")
        frames = source.leaves["latents"]["shape"][0]
        if frames is not None and frames < longest:
            raise InputError(
                f"{folder}: its clips have {frames} latent frames, a window {longest}; prepare longer clips (mi-jax "
                "prepare --seconds), or give shorter windows (--objective.windows)"
            )
        masks = source.leaves["face_mask"]["shape"]
        if len(masks) == 4 and None not in (masks[1], frames) and masks[1] != frames:
            raise InputError(f"{folder}: its face masks have {masks[1]} latent frames, its latents {frames}")
        if frames == longest and mid_clip > 0:
            raise InputError(
                f"{folder}: its clips have {frames} latent frames, as many as a window: none could start later, as "
                f"mid_clip {mid_clip:g} asks; prepare longer clips (mi-jax prepare --seconds), or set it to 0"
            )
    first, *others = kinds
    for folder, leaves in zip(folders[1:], others):
        odd = sorted(name for name in first.keys() | leaves.keys() if first.get(name) != leaves.get(name))
        if odd:
            raise InputError(
                f"{folder}: of another size, or made by other encoders, than {folders[0]}: {odd[0]} is "
                f"{leaves.get(odd[0])}, there {first.get(odd[0])}"
            )
    return sources
