"""Training windows of prepared records: cut on the host one at a time, or on the device out of a pool of all clips."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Key

from mi_jax.data.records import RecordSource
from mi_jax.errors import InputError
from mi_jax.mesh import axis_size, per_device
from mi_jax.models.audio_encoder import FRAMES, WINDOW, cut_audio

CONDITIONS = ("text_tokens", "text_mask", "text_pooled", "image_tokens")
"""What a window takes from its clip as it stands, where the record has it."""


def masks_move(sources: Sequence[RecordSource]) -> bool:
    """Whether a record of these has a face mask of every latent frame, [s t h w], by their indices.

    Then every window is cut with such masks, so that batches are even: one for a whole clip, [s h w], is repeated.
    """
    return any(len(source.leaves["face_mask"]["shape"]) == 4 for source in sources)


def cut_window(
    record: dict[str, np.ndarray],
    rng: np.random.Generator,
    *,
    length: int,
    mid_clip: float,
    speakers: int,
    face_masked: bool = True,
    whole_mask: float = 0.0,
    moving: bool = False,
):
    """A window of `length` latent frames: at the clip's start, or (with probability `mid_clip`) anywhere after it.

    Beside the faces' region [h w], for the loss, stands where each speaker's audio may act [s h w]: the own face, or
    (not `face_masked`, or for one alone by the chance of `whole_mask`) everywhere. Without `speakers` there is no
    audio.

    Masks that move, or all if `moving`, are cut as the latents are: [t h w] for the loss, [s t h w] for the audio.

    Raises:
      InputError: the record is shorter than `length`, has more than `speakers` speakers, or its masks are neither for a
        whole clip nor for each of its latent frames.
    """
    frames = record["latents"].shape[0]
    room = frames - length
    if room < 0:
        raise InputError(f"a record has {frames} latent frames, a window {length}: prepare longer clips")
    masks = _masks_of(record, moving)
    start = int(rng.integers(1, room + 1)) if room > 0 and rng.random() < mid_clip else 0
    if masks.ndim == 4:
        masks = masks[:, start : start + length]
    window = {
        "latents": record["latents"][start : start + length],
        "portrait": record["portrait"].astype(np.float32),
        "is_start": np.float32(start == 0),
        "face_mask": masks.max(0).astype(np.float32),
    }
    for name in CONDITIONS:
        if name in record:
            window[name] = record[name]
    if speakers:
        speaking = _speakers_of(record, speakers)
        empty = ((0, speakers - speaking), *[(0, 0)] * (masks.ndim - 1))
        steps = np.stack([cut_audio(hidden, start, length) for hidden in record["audio_hidden"]])
        window["audio_steps"] = np.pad(steps, ((0, speakers - speaking), (0, 0), (0, 0), (0, 0)))
        everywhere = not face_masked or (speaking == 1 and rng.random() < whole_mask)
        window["audio_mask"] = np.pad(np.ones_like(masks) if everywhere else masks, empty).astype(np.float32)
    return window


def stack_clips(sources: Sequence[RecordSource], *, longest_window: int, speakers: int) -> dict[str, np.ndarray]:
    """All n clips as one pool, in the records' dtypes: latents [n t h w c], frames [n] (each clip's own length),
    portrait [n h w c], face_mask [n s h w] (or, if `masks_move`, [n s t h w]), what `CONDITIONS` names; with `speakers`
    also audio_steps [n s m l d] and voices [n] (how many speak).

    Clips are padded with zeros to the longest and to `speakers`. audio_steps are what `cut_audio` gives for a window
    over all of the longest clip, zeros beyond each clip's own sound: a shorter window is then a plain slice of it.
    Without `speakers`, face_mask is the union over the speakers, s = 1.

    Raises:
      InputError: a clip is shorter than `longest_window` latent frames, has more than `speakers` speakers, or masks
        that are neither for the whole clip nor for each of its latent frames.
    """
    moving = masks_move(sources)
    count, longest = sum(map(len, sources)), max(map(_longest_clip, sources))
    padded = {  # the first axes of a clip's
        "latents": (longest,),
        "face_mask": (speakers or 1, longest) if moving else (speakers or 1,),
        "audio_steps": (speakers,),
    }
    pool: dict[str, np.ndarray] = {}
    records = ((source, i, source[i]) for source in sources for i in range(len(source)))
    for place, (source, i, record) in enumerate(records):
        frames = len(record["latents"])
        if frames < longest_window:
            fault = f"record {i} has {frames} latent frames, a window {longest_window}"
            raise InputError(f"{source.directory}: {fault}: prepare longer clips")
        clip = {name: record[name] for name in ("latents", "portrait", *CONDITIONS) if name in record}
        clip["face_mask"] = _masks_of(record, moving)
        clip["frames"] = np.asarray(frames, np.int32)
        if speakers:
            clip["voices"] = np.asarray(_speakers_of(record, speakers), np.int32)
            clip["audio_steps"] = np.stack([cut_audio(hidden, 0, longest) for hidden in record["audio_hidden"]])
        else:
            clip["face_mask"] = clip["face_mask"].max(0, keepdims=True)
        for name, x in clip.items():
            if name not in pool:
                first = padded.get(name, ())
                pool[name] = np.zeros((count, *first, *x.shape[len(first) :]), x.dtype)
            pool[name][(place, *map(slice, x.shape))] = x
    return pool


def draw_windows(
    pool: dict[str, Array],
    key: Key[Array, ""],
    *,
    length: int,
    batch: int,
    mid_clip: float,
    face_masked: bool = True,
    whole_mask: float = 0.0,
) -> dict[str, Array]:
    """A batch of windows out of the pool of `stack_clips`, on the device: distributed as `cut_window`'s of clips drawn
    with replacement. No window reaches beyond its clip's own end.

    Which windows depends on the key alone. On a mesh the pool is whole on every device, and each cuts its own rows of
    the batch.

    Raises:
      InputError: the batch does not divide over the devices.
    """
    keys = jax.random.split(key, 4)
    clips = jax.random.randint(keys[0], (batch,), 0, len(pool["frames"]))
    room = pool["frames"][clips] - length
    later = jax.random.bernoulli(keys[1], mid_clip, (batch,)) & (room > 0)
    starts = jnp.where(later, jax.random.randint(keys[2], (batch,), 1, jnp.maximum(room, 1) + 1), 0)
    everywhere = jnp.full((batch,), not face_masked)
    if face_masked and "voices" in pool:
        everywhere = jax.random.bernoulli(keys[3], whole_mask, (batch,)) & (pool["voices"][clips] == 1)
    return cut_windows(pool, clips, starts, everywhere, length=length)


def cut_windows(
    pool: dict[str, Array],
    clips: Int[Array, "b"],
    starts: Int[Array, "b"],
    everywhere: Bool[Array, "b"],
    *,
    length: int,
) -> dict[str, Array]:
    """The windows [b ...] of `length` latent frames from frame `starts` of `clips`, named as `cut_window` names them;
    `everywhere`: whether the audio of those who speak there may act outside their faces."""
    if len(clips) % axis_size("data"):
        raise InputError(f"a batch of {len(clips)} does not divide over data={axis_size('data')}")
    rows = clips, starts, everywhere
    if jax.sharding.get_abstract_mesh().size > 1:
        rows = jax.reshard(rows, P("data"))
    return per_device(jax.vmap(partial(_cut, length=length), in_axes=(None, 0, 0, 0)), P("data"))(pool, *rows)


def _cut(pool: dict[str, Array], clip: Array, start: Array, everywhere: Array, *, length: int) -> dict[str, Array]:
    def part(x, axis, first, size):
        """`size` entries of the clip's array along its `axis`, from `first` on."""
        firsts = [first if i == axis else 0 for i in range(x.ndim - 1)]
        sizes = [size if i == axis else n for i, n in enumerate(x.shape[1:])]
        return jax.lax.dynamic_slice(x, (clip, *firsts), (1, *sizes))[0]

    moving = pool["face_mask"].ndim == 5
    masks = part(pool["face_mask"], 1, start, length) if moving else pool["face_mask"][clip]
    masks = masks.astype(jnp.float32)
    window = {name: pool[name][clip] for name in CONDITIONS if name in pool} | {
        "latents": part(pool["latents"], 0, start, length),
        "portrait": pool["portrait"][clip].astype(jnp.float32),
        "is_start": (start == 0).astype(jnp.float32),
        "face_mask": masks.max(0),
    }
    if "audio_steps" in pool:
        speaks = jnp.arange(len(masks)) < pool["voices"][clip]
        speaks = speaks.reshape(-1, *[1] * (masks.ndim - 1))
        window["audio_mask"] = jnp.where(everywhere & speaks, 1.0, masks)
        window["audio_steps"] = part(pool["audio_steps"], 1, 2 * FRAMES * start, 2 * FRAMES * length + WINDOW - 2)
    return window


def _longest_clip(source: RecordSource) -> int:
    """Latent frames of the longest record; read through only where the index says that they differ."""
    frames = source.leaves["latents"]["shape"][0]
    return max(len(record["latents"]) for record in source) if frames is None else frames


def _masks_of(record: dict[str, np.ndarray], moving: bool) -> np.ndarray:
    """The record's face masks [s h w], or [s t h w] where they move or `moving` asks for it."""
    masks, frames = record["face_mask"], len(record["latents"])
    if masks.ndim not in (3, 4):
        raise InputError(f"a record's face_mask has {masks.ndim} axes: expected [s h w], or [s t h w]")
    if masks.ndim == 4 and masks.shape[1] != frames:
        raise InputError(f"a record's face_mask has {masks.shape[1]} latent frames, its latents {frames}")
    if masks.ndim == 3 and moving:
        return np.broadcast_to(masks[:, None], (len(masks), frames, *masks.shape[1:]))
    return masks


def _speakers_of(record: dict[str, np.ndarray], most: int) -> int:
    speaking = len(record["audio_hidden"])
    if speaking > most:
        raise InputError(f"a record has {speaking} speakers, the objective takes {most} (--objective.speakers)")
    return speaking
