"""The whole path: a portrait, voices and a sentence of direction become a talking video.

Models that lack a part take what they have: without audio attention the video is silent, without portrait inputs
(HunyuanVideo) it is made of the sentence alone.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from mi_jax.avatar.config import AvatarConfig
from mi_jax.avatar.folders import load_models, save_avatar
from mi_jax.bounds import shown
from mi_jax.conditions import Conditions
from mi_jax.data import pictures, sound
from mi_jax.data.features import Encoders, latent_mask, portrait_latents, prompt_features, to_pixels
from mi_jax.diffusion import add_noise
from mi_jax.errors import InputError
from mi_jax.files import PathLike
from mi_jax.mesh import make_mesh, on_mesh, shard_parameters, take_devices
from mi_jax.models.audio_encoder import cut_audio
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.prompts import check_prompt
from mi_jax.models.tiling import decode_pieces
from mi_jax.models.wav2vec2 import filled_length, hidden_states
from mi_jax.rates import SAMPLE_RATE
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.inputs import (
    Portrait,
    Sound,
    Speaker,
    check_options,
    check_request,
    find_masks,
    fit_masks,
    num_frames,
    read_portrait,
    read_speakers,
    read_voice,
)
from mi_jax.sample.layout import group_size, mesh_shape
from mi_jax.sample.sizes import check_memory
from mi_jax.sample.sliding_window import sliding_window
from mi_jax.sample.windows import plan_windows
from mi_jax.weights.factors import Adaptation

AUDIO_CHUNK = 64  # latent frames whose audio windows are in memory at a time

log = logging.getLogger("mi_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Avatar:
    """A loaded model. `load` makes one; the parts are public so that scripts can run them alone.

    mesh: the devices over which denoiser and MLLM are spread; None: the default device.
    fits_mesh: `denoise` lays these devices out anew where another mesh suits a video better (`layout.mesh_shape`).
    """

    config: AvatarConfig
    dit: DiT
    encoders: Encoders
    mesh: Mesh | None = None
    fits_mesh: bool = False

    def animate(
        self,
        portrait: Portrait | None = None,
        speakers: Sequence[Speaker | Sound] | Speaker | Sound | None = (),
        prompt: str | None = "",
        *,
        seed: int = 0,
        steps: int | None = None,
        window: int = 33,
        overlap: int = 8,
        guidance_audio: float | None = None,
        guidance_text: float | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
        face_model: PathLike | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "f H W 3"]:
        """A video of the portrait speaking, at 25 fps and the model's size, as long as the longest voice.

        Without speakers the video is silent and `seconds` long. A model without audio attention (HunyuanVideo-I2V)
        makes no other; one without portrait inputs either (HunyuanVideo) takes no portrait.

        Where a mask came from, what was cut or resized, and voices that are all but silent are logged to the logger
        `mi_jax` (INFO and WARNING).

        Args:
          portrait: a picture file, a PIL image or pixels [H W 3] (`data.pixels.pixels_from`); its centre is cropped to
            the video's aspect.
          speakers: `Speaker`s, or sounds alone; those without a mask get the found faces from left to right.
          prompt: may be empty or None; cut where the text encoder ends.
          seed: of the noise; the same seed gives the same video.
          steps: Euler steps; more is finer and slower. Default: the model's.
          window, overlap: latent frames (4 video frames each) that the denoiser sees at a time, and that are blended.
          guidance_audio, guidance_text: see `Guidance`. Default: the model's.
          seconds: length of the video; default is that of the longest voice.
          height, width: of the video in pixels. Default: the model's.
          face_model: a model file of MediaPipe's Face Detector; by default the one kept from before, or downloaded
            (`data.detector.find_detector`).
          progress: called with (steps done, steps) before the first step and after every one.

        Raises:
          InputError: a file or an argument cannot be used; the message names it.
        """
        speakers, prompt = read_speakers(speakers), "" if prompt is None else prompt
        check_prompt(prompt)
        check_options(face_model=face_model, progress=progress)
        config = self.config.replace(
            steps=steps, guidance_audio=guidance_audio, guidance_text=guidance_text, height=height, width=width
        )
        check_request(config, portrait=portrait is not None, voices=len(speakers), seconds=seconds, seed=seed)
        avatar = dataclasses.replace(self, config=config)
        pixels = None if portrait is None else read_portrait(portrait)
        voices = [read_voice(speaker.audio, f"voice {i + 1}", seconds) for i, speaker in enumerate(speakers)]
        longest = max(map(len, voices), default=0) / SAMPLE_RATE
        frames = num_frames(longest if seconds is None else seconds)
        plan_windows(1, window, overlap)  # a bad window is known before the long work
        check_memory(config, frames, len(voices), window)
        for i, heard in enumerate(voices, 1):
            for remark in sound.remarks(heard, f"voice {i}"):
                log.warning("%s", remark)
        latent_frames = -(-(config.lead_in + frames - 1) // config.vae.temporal_stride) + 1
        masks = []
        if speakers:
            given = [speaker.mask for speaker in speakers]
            masks = find_masks(config, pixels, given, face_model)

        conditions = avatar.conditions(pixels, masks, voices, prompt, latent_frames)
        latents = avatar.denoise(
            conditions,
            seed=seed,
            steps=config.steps,
            window=window,
            overlap=overlap,
            weights={"audio": config.guidance_audio, "text": config.guidance_text},
            latent_frames=latent_frames,
            progress=progress,
        )
        return avatar.decode(latents)[config.lead_in : config.lead_in + frames]

    def conditions(
        self,
        portrait: UInt8[np.ndarray, "H W 3"] | None,
        masks: Sequence[np.ndarray] | np.ndarray,
        voices: Sequence[np.ndarray],
        prompt: str,
        latent_frames: int,
    ) -> Conditions:
        """What the denoiser is told of a video of `latent_frames`, one example.

        portrait: None for a model of text alone. masks: bool [s H W] of the portrait's size; voices: one per mask,
        samples at 16 kHz, of any lengths; none for a silent video.
        """
        height, width = self.config.padded_size
        face = None if portrait is None else pictures.fit_image(portrait, height, width)
        masks = fit_masks(masks, height, width)
        with self._on_mesh():
            features, dropped = prompt_features(self.encoders, portrait, prompt)
        if dropped:
            log.warning("prompt: too long, its last %d tokens are not read", dropped)
        if face is not None:
            features |= {
                "image_mask": np.ones(features["image_tokens"].shape[0], bool),
                "portrait": np.asarray(portrait_latents(self.encoders.vae, face)),
                "is_start": np.ones((), np.float32),
            }
        if voices:
            frames = self.config.vae.temporal_stride * (latent_frames - 1) + 1
            hidden = [hidden_states(self.encoders.wav2vec2, voice, frames) for voice in voices]
            features |= {
                "audio": self.audio_tokens(np.stack(hidden)),
                "face_mask": np.stack([latent_mask(mask, self.config.vae.spatial_stride) for mask in masks]),
            }
        if self.config.dit.guidance_embedding:
            features["guidance"] = np.float32(self.config.embedded_guidance)
        return Conditions(**{name: jnp.asarray(leaf)[None] for name, leaf in features.items()})

    def audio_tokens(self, hidden: Float[np.ndarray, "s n l d"]) -> Float[np.ndarray, "s t a e"]:
        """Audio tokens of each speaker and latent frame from wav2vec2's states, in chunks of bounded memory."""
        stride = self.config.vae.temporal_stride
        total = (hidden.shape[1] // 2 - 1) // stride + 1
        tokens = []
        for first in range(0, total, AUDIO_CHUNK):
            length = filled_length(total - first, AUDIO_CHUNK)
            steps = np.stack([cut_audio(states, first, length) for states in hidden])[None]
            with self._on_mesh():
                tokens.append(np.asarray(_encode_audio(self.dit, steps, np.float32([first == 0]))[0]))
        return np.concatenate(tokens, axis=1)[:, :total]

    def denoise(
        self,
        conditions: Conditions,
        *,
        seed: int,
        steps: int,
        window: int,
        overlap: int,
        weights: dict[str, float],
        latent_frames: int | None = None,
        noise: Float[Array | np.ndarray, "1 t h w c"] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[np.ndarray, "t h w c"]:
        """Latents of the whole video, from `noise` or that of `seed`; `latent_frames` is by default the audio's.

        weights: of guidance, by the names audio and text.
        """
        height, width = self.config.padded_size
        stride = self.config.vae.spatial_stride
        frames = conditions.audio.shape[2] if latent_frames is None else latent_frames
        shape = (1, frames, height // stride, width // stride, self.config.vae.latent_channels)
        sigmas = self.config.sigmas(steps)
        branches = guidance_branches(self.config.dit, weights)
        avatar = self._fitted(len(plan_windows(frames, window, overlap)), branches)
        group = 1 if avatar.mesh is None else group_size(branches, avatar.mesh.shape["data"])
        weights = guidance_weights(self.config.dit, weights)
        with avatar._on_mesh():
            latents = jax.random.normal(jax.random.key(seed), shape, jnp.float32) if noise is None else jnp.array(noise)
            if self.config.portrait_in_noise and conditions.portrait is not None:
                latents = add_noise(
                    conditions.portrait[:, None], latents, jnp.float32(1 - self.config.portrait_in_noise)
                )
            # Where a level leaves them, so that all levels are one program.
            latents = jax.device_put(latents, _whole(avatar.mesh, avatar.dit))
            if progress is not None:
                progress(0, steps)
            for i in range(steps):
                latents = denoise_level(
                    avatar.dit,
                    latents,
                    sigmas[i : i + 2],
                    conditions,
                    weights,
                    window=window,
                    overlap=overlap,
                    group=group,
                )
                if progress is not None:
                    latents.block_until_ready()
                    progress(i + 1, steps)
            return np.asarray(latents)[0]

    def decode(self, latents: Float[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "f H W 3"]:
        """Pixels of latents, cropped to the model's size; a few frames at a time are in floating point."""
        vae, (height, width) = self.encoders.vae, (self.config.height, self.config.width)
        top, left = (
            (padded - side) // 2 for padded, side in zip(self.config.padded_size, (height, width), strict=True)
        )
        devices = None if self.mesh is None else self.mesh.local_devices
        pieces = decode_pieces(vae, latents[None] / np.float32(vae.config.scaling_factor), devices=devices)
        return np.concatenate([to_pixels(piece[0, :, top : top + height, left : left + width]) for piece in pieces])

    def on(self, mesh: Mesh) -> "Avatar":
        """The same avatar with its weights on `mesh`. Those that lie there already as they should are not copied."""
        if mesh == self.mesh:
            return self
        encoders = dataclasses.replace(self.encoders, mllm=shard_parameters(self.encoders.mllm, mesh))
        return dataclasses.replace(self, mesh=mesh, dit=shard_parameters(self.dit, mesh), encoders=encoders)

    def _fitted(self, windows: int, branches: int) -> "Avatar":
        if self.mesh is None or not self.fits_mesh:
            return self
        devices = list(self.mesh.devices.flat)
        dit = self.config.dit
        data, seq = mesh_shape(windows, branches, len(devices), dit.heads, dit.ulysses)
        log.info(
            f"{len(devices)} devices: {_number(windows, 'window')} x {_number(branches, 'guidance branch', 'es')}"
            f" over {data}, the tokens of each over {seq}"
        )
        return self.on(make_mesh(data, seq, devices))

    def save(self, folder: str | os.PathLike, *, dtype: Any = None, overwrite: bool = False) -> None:
        """Writes what `load` reads (see `save_avatar`); with a mesh of several processes, all of them call it."""
        save_avatar(folder, self.config, self.encoders, self.dit, dtype=dtype, overwrite=overwrite)

    def _on_mesh(self):
        return on_mesh(self.mesh)


def _whole(mesh: Mesh | None, module: Any) -> jax.sharding.Sharding:
    """Of an array that every device has whole; without a mesh, that of the module's weights."""
    return jax.tree.leaves(module)[0].sharding if mesh is None else jax.NamedSharding(mesh, P())


@jax.jit
def _encode_audio(dit: DiT, steps: Array, is_start: Array) -> Array:
    return dit.encode_audio(steps, is_start)


@partial(jax.jit, static_argnames=("window", "overlap", "group"), donate_argnames="latents")
def denoise_level(
    dit: DiT,
    latents: Array,
    sigmas: Array,
    conditions: Conditions,
    weights: dict[str, Array],
    *,
    window,
    overlap,
    group,
) -> Array:
    """One noise level of the whole video, the jitted program that sampling repeats; `latents` are donated.

    Compiled once for all levels (`sigmas` are two neighbours) and step counts, and for all `guidance_weights` that are
    not 0. window, overlap, group: see `sliding_window`.
    """
    velocity = Guidance(**weights)(dit)
    return sliding_window(velocity, latents, sigmas, conditions, window=window, overlap=overlap, group=group)


def guidance_weights(dit: DiTConfig, weights: dict[str, float]) -> dict[str, Array]:
    """The arguments of `Guidance` for weights named audio and text; those that are 0 cost nothing and are left out."""
    weights = {name: jnp.float32(weight) for name, weight in weights.items() if weight}
    if dit.audio is None and "text" in weights:
        # Nothing is heard: two branches, all and none, at every noise level.
        weights = {"audio": weights["text"], "two_fold_above": jnp.float32(-1.0)}
    return weights


def guidance_branches(dit: DiTConfig, weights: dict[str, float]) -> int:
    """Evaluations of the denoiser in one guided velocity, for weights named audio and text."""
    return Guidance(**guidance_weights(dit, weights)).branches


def _number(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural * (count != 1)}"


def load(
    name: str | os.PathLike,
    *,
    lora: Sequence[Adaptation] | PathLike = (),
    devices: int | None = None,
    seq: int | None = None,
    mesh: Mesh | None = None,
) -> Avatar:
    """The avatar shipped under `name` ("puppet"), or that of a model folder.

    The denoiser and the MLLM are read straight into the shards of the devices, and `animate` shares the work of a video
    out over them: its windows and guidance branches, and the tokens of each.

    Args:
      lora: files of LoRA factors by which the denoiser is changed, each alone or as (file, weight).
      devices: how many of this process's; by default all.
      seq: how many of them share the tokens of a window, the same for all videos; by default what suits each.
      mesh: instead of both, `mi_jax.mesh.make_mesh`; on several hosts the way to use all of them.

    Raises:
      InputError: no such model, or a folder whose files are missing, damaged or do not fit each other; no such devices;
        a file of factors that is damaged or made for another model.
    """
    if isinstance(lora, PathLike):
        lora = (lora,)
    if not isinstance(name, PathLike) or not os.fspath(name):
        raise InputError(f"load takes the name of a shipped model or a folder, not {shown(name)}")
    if not isinstance(mesh, Mesh | None):
        raise InputError(f"mesh is {shown(mesh)}, must be of mi_jax.mesh.make_mesh")
    if mesh is None:
        chosen = take_devices(devices, seq)
        mesh = make_mesh(None, seq or 1, chosen) if len(chosen) > 1 else None
        fits_mesh = mesh is not None and seq is None
    elif devices is not None or seq is not None:
        raise InputError("load takes a mesh, or devices and seq, not both")
    else:
        fits_mesh = False
    config, encoders, dit = load_models(name, lora=lora, mesh=mesh)
    return Avatar(config=config, dit=dit, encoders=encoders, mesh=mesh, fits_mesh=fits_mesh)
