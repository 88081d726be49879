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
from jaxtyping import Array, Bool, Float, Float32, UInt8
from PIL import Image

from mi_jax.avatar.config import AvatarConfig
from mi_jax.avatar.folders import load_models, save_avatar
from mi_jax.bounds import Seconds, fault_of
from mi_jax.conditions import Conditions
from mi_jax.data import faces, pictures, sound, sound_files, video_files
from mi_jax.data.features import Encoders, latent_mask, portrait_latents, prompt_features, to_pixels
from mi_jax.data.samples import mono, samples_from
from mi_jax.diffusion import add_noise, sigma_schedule
from mi_jax.errors import InputError
from mi_jax.files import PathLike
from mi_jax.mesh import make_mesh, on_mesh, shard_parameters, take_devices
from mi_jax.models.audio_encoder import cut_audio
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.tiling import decode_pieces
from mi_jax.models.wav2vec2 import hidden_states
from mi_jax.rates import FPS, SAMPLE_RATE
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.layout import group_size, mesh_shape
from mi_jax.sample.sizes import check_memory
from mi_jax.sample.sliding_window import sliding_window
from mi_jax.sample.windows import plan_windows

AUDIO_CHUNK = 64  # latent frames whose audio windows are in memory at a time

log = logging.getLogger("mi_jax")


Sound = Any
"""A file, or samples of any library's array or a list."""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A voice, and the region of the portrait that it moves.

    audio: a file that FFmpeg reads, or samples at 16 kHz (`data.samples.samples_from` says which kinds).
    mask: a PNG or a boolean array [H W] of the portrait; white or True is the face. None: it is looked for.
    """

    audio: Sound
    mask: PathLike | np.ndarray | None = None


Portrait = PathLike | Image.Image | np.ndarray


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
        speakers: Sequence[Speaker] = (),
        prompt: str = "",
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
          portrait: a picture file, a PIL image or pixels [H W 3]; its centre is cropped to the video's aspect.
          speakers: those without a mask get the found faces from left to right.
          prompt: may be empty; cut where the text encoder ends.
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
        config = self.config.replace(
            steps=steps, guidance_audio=guidance_audio, guidance_text=guidance_text, height=height, width=width
        )
        check_request(config, portrait=portrait is not None, voices=len(speakers), seconds=seconds, seed=seed)
        avatar = dataclasses.replace(self, config=config)
        pixels = None if portrait is None else read_portrait(portrait)
        voices = [read_voice(speaker.audio, f"voice {i + 1}", seconds) for i, speaker in enumerate(speakers)]
        longest = max(map(len, voices), default=0) / SAMPLE_RATE
        frames = num_frames(longest if seconds is None else seconds)
        check_memory(config, frames, len(voices), window)
        for i, heard in enumerate(voices, 1):
            for remark in sound.remarks(heard, f"voice {i}"):
                log.warning("%s", remark)
        latent_frames = -(-(config.lead_in + frames - 1) // config.vae.temporal_stride) + 1
        plan_windows(latent_frames, window, overlap)  # a bad window is known before the long work
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
            length = min(AUDIO_CHUNK, total - first)
            steps = np.stack([cut_audio(states, first, length) for states in hidden])[None]
            with self._on_mesh():
                tokens.append(np.asarray(_encode_audio(self.dit, steps, np.float32([first == 0]))[0]))
        return np.concatenate(tokens, axis=1)

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
        sigmas = sigma_schedule(steps, self.config.shift)
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


def check_request(config: AvatarConfig, *, portrait: bool, voices: int, seconds: float | None, seed: int) -> None:
    """Whether a model can make a video of what it is given; asked before anything large is loaded.

    Raises:
      InputError: a portrait, voices or a length are missing, or given to a model that has no use for them; or the video
        is more than the machine's memory holds.
    """
    sees, hears = config.dit.image_to_video or config.dit.token_replace, config.dit.audio is not None
    if sees and not portrait:
        raise InputError("no portrait: this model animates one")
    if portrait and not sees:
        raise InputError("this model makes videos from text alone, not from a portrait")
    if voices and not hears:
        raise InputError("this model has no audio attention: it makes silent videos, without voices")
    if not voices and seconds is None:
        raise InputError(f"no {'voice and no ' * hears}length: a silent video needs its length in seconds")
    if seconds is not None:
        check_memory(config, num_frames(seconds), voices, window=1)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, must lie in 0 .. 2^32 - 1")


def num_frames(seconds: float) -> int:
    """Video frames of a sound: seconds x 25, rounded, at least one."""
    if fault_of(Seconds, seconds, ""):
        raise InputError(f"a video of {seconds} seconds cannot be made")
    return max(1, round(seconds * FPS))


def read_portrait(portrait: Portrait) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a file, a PIL image or an array."""
    if isinstance(portrait, np.ndarray):
        if portrait.dtype != np.uint8 or portrait.ndim != 3 or portrait.shape[2] != 3:
            raise InputError(f"portrait: an array must be uint8 [H W 3], this is {portrait.dtype} {portrait.shape}")
        pixels = portrait
    elif isinstance(portrait, Image.Image):
        try:
            pixels = pictures.rgb_from_image(portrait, "portrait")
        except InputError:
            raise
        except pictures.DAMAGED as fault:  # PIL reads a file's pixels when they are asked for
            raise InputError(f"portrait: cannot be read ({fault})") from None
    else:
        return pictures.read_image(portrait)
    if min(pixels.shape[:2]) < pictures.MIN_SIDE:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise InputError(f"portrait: {size} is too small (at least {pictures.MIN_SIDE} px a side)")
    return pixels


def find_masks(
    config: AvatarConfig,
    portrait: UInt8[np.ndarray, "H W 3"],
    masks: Sequence[faces.MaskSource | None],
    face_model: PathLike | None = None,
) -> Bool[np.ndarray, "s H W"]:
    """One face mask for each speaker, at the portrait's size: those given, or of the faces found (`faces.face_masks`).
    Where they came from is logged; a whole picture for want of a face is a warning.

    Raises:
      InputError: of `faces.face_masks`, and of `fit_masks` at the config's size.
    """
    found, origin = faces.face_masks(portrait, len(masks), masks, model_path=face_model)
    fit_masks(found, *config.padded_size)  # what is wrong with them is said first, and alone
    if not all(isinstance(mask, np.ndarray) for mask in masks):
        whole = masks[0] is None and bool(found.all())
        log.log(logging.WARNING if whole else logging.INFO, origin)
    return found


def fit_masks(masks: Sequence[np.ndarray] | np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """The masks of a portrait's faces, cropped and scaled with it to the video's size.

    Raises:
      InputError: of a face nothing is left.
    """
    fitted = [pictures.fit_mask(mask, height, width) for mask in masks]
    for number, mask in enumerate(fitted, 1):
        if not mask.any():
            raise InputError(
                f"voice {number}: its face lies outside the part of the portrait that a video of {width}x{height} "
                "shows; give another height and width, or crop the portrait"
            )
    return fitted


def read_voice(audio: Sound, name: str, seconds: float | None = None) -> Float32[np.ndarray, " n"]:
    """Mono samples at 16 kHz of a file, or of samples at 16 kHz, which are called `name` in messages.

    Of more than `seconds` only these. Raises InputError: see `read_audio` and `samples_from`.
    """
    if isinstance(audio, PathLike):
        return sound_files.read_audio(audio, seconds=seconds)
    samples = mono(samples_from(audio, name))
    return samples if seconds is None else samples[: round(seconds * SAMPLE_RATE)]


def load(
    name: str | os.PathLike, *, devices: int | None = None, seq: int | None = None, mesh: Mesh | None = None
) -> Avatar:
    """The avatar shipped under `name` ("puppet"), or that of a model folder.

    The denoiser and the MLLM are read straight into the shards of the devices, and `animate` shares the work of a video
    out over them: its windows and guidance branches, and the tokens of each.

    Args:
      devices: how many of this process's; by default all.
      seq: how many of them share the tokens of a window, the same for all videos; by default what suits each.
      mesh: instead of both, `mi_jax.mesh.make_mesh`; on several hosts the way to use all of them.

    Raises:
      InputError: no such model, or a folder whose files are missing, damaged or do not fit each other; no such devices.
    """
    if mesh is None:
        chosen = take_devices(devices, seq)
        mesh = make_mesh(None, seq or 1, chosen) if len(chosen) > 1 else None
        fits_mesh = mesh is not None and seq is None
    elif devices is not None or seq is not None:
        raise InputError("load takes a mesh, or devices and seq, not both")
    else:
        fits_mesh = False
    config, encoders, dit = load_models(name, mesh=mesh)
    return Avatar(config=config, dit=dit, encoders=encoders, mesh=mesh, fits_mesh=fits_mesh)


def save_video(
    path: PathLike, video: UInt8[np.ndarray, "f H W 3"], audio: Sound | Sequence[Sound] | None = None
) -> None:
    """Writes a video of 25 fps with its sound, cut or filled with silence to its length; stereo where a sound is.

    Args:
      path: .mp4, .m4v, .mov or .mkv, in a folder that exists.
      audio: a sound file, samples at 16 kHz (see `samples_from`), or a list of several of these, which are mixed.

    Raises:
      InputError: a sound cannot be read, or the file cannot be written.
    """
    sources = _sources(audio)
    if not sources:
        video_files.write_video(path, video)
        return
    seconds = len(video) / FPS
    # files keep more than the 16 kHz that the model hears
    rate = 48_000 if all(isinstance(source, PathLike) for source in sources) else SAMPLE_RATE
    voices = []
    for number, source in enumerate(sources, 1):
        if isinstance(source, PathLike):
            voices.append(sound_files.read_audio(source, rate, stereo=True, seconds=seconds))
        else:
            voices.append(samples_from(source, "audio" if len(sources) == 1 else f"audio {number}"))
    mixed = mix(voices, round(seconds * rate))
    peak = np.abs(mixed).max(initial=0)
    if peak > 1 and rate == SAMPLE_RATE:
        log.warning("audio: reaches %.2f times full scale, cut off at 1 in the video", peak)
    video_files.write_video(path, video, mixed, sample_rate=rate)


def _sources(audio: Sound | Sequence[Sound] | None) -> list[Sound]:
    """One entry per sound. A list of numbers is one sound."""
    if audio is None:
        return []
    if isinstance(audio, PathLike) or hasattr(audio, "shape") or not isinstance(audio, Sequence):
        return [audio]
    numbers = len(audio) > 0 and not isinstance(audio[0], PathLike) and np.ndim(audio[0]) == 0
    return [audio] if numbers else list(audio)


def mix(
    voices: Sequence[np.ndarray], length: int
) -> Float32[np.ndarray, " {length}"] | Float32[np.ndarray, "{length} 2"]:
    """The sum of voices ([n], [n 1] or [n 2]) over `length` samples, scaled down as a whole where it would clip.

    In stereo if one of them is.
    """
    voices = [voice.reshape(len(voice), -1) for voice in voices]
    total = np.zeros((length, max(voice.shape[1] for voice in voices)), np.float32)
    for voice in voices:
        total[: len(voice)] += voice[:length]
    if len(voices) > 1:
        total /= max(1.0, np.abs(total).max(initial=0))
    return total if total.shape[1] == 2 else total[:, 0]
