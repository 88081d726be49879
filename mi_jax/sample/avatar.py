"""The whole path: a portrait, voices and a sentence of direction become a talking video.

Models that lack a part take what they have: without audio attention the video is silent, without portrait inputs
(HunyuanVideo) it is made of the sentence alone.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from mi_jax.avatar.config import AvatarConfig
from mi_jax.avatar.folders import load_models, save_avatar
from mi_jax.bounds import shown
from mi_jax.conditions import Conditions
from mi_jax.data import pictures
from mi_jax.data.features import Encoders, portrait_latents, prompt_features
from mi_jax.data.utterances import Utterances
from mi_jax.errors import InputError
from mi_jax.files import PathLike
from mi_jax.mesh import make_mesh, on_mesh, shard_parameters, take_devices
from mi_jax.models.audio_encoder import cut_audio
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.hidden_states import HiddenStates, RunningStates, filled_length, hidden_states
from mi_jax.models.tiling import Decoder
from mi_jax.rates import FPS
from mi_jax.sample.frames import Frames, Latents
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.inputs import Masks, Portrait, Prompts, Sound, Speaker, latent_masks
from mi_jax.sample.layout import group_size, mesh_shape
from mi_jax.sample.listening import Listening, LiveListening, LiveSound, pieces_of
from mi_jax.sample.noise import FrameNoise, GivenNoise, NoiseAndPortrait
from mi_jax.sample.order import Order
from mi_jax.sample.request import Request, read_request
from mi_jax.sample.sizes import check_array_memory
from mi_jax.sample.stream import Arriving, stream
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
        prompt: str | Prompts | None = "",
        *,
        seed: int = 0,
        steps: int | None = None,
        window: int = 33,
        overlap: int = 8,
        order: Order = "wavefront",
        guidance_audio: float | None = None,
        guidance_text: float | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
        face_model: PathLike | None = None,
        progress: Callable[[int, int | None], None] | None = None,
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
          prompt: may be empty or None; cut where the text encoder ends. One that changes is a list of (seconds,
            prompt), the first at 0: a window takes the one that holds in its middle.
          seed: of the noise; the same seed gives the same video.
          steps: Euler steps; more is finer and slower. Default: the model's.
          window, overlap: latent frames (4 video frames each) that the denoiser sees at a time, and that are blended.
          order: in which windows pass through the denoiser (`mi_jax.sample.order`); "causal" gives another video.
          guidance_audio, guidance_text: see `Guidance`. Default: the model's.
          seconds: length of the video; default is that of the longest voice.
          height, width: of the video in pixels. Default: the model's.
          face_model: a model file of MediaPipe's Face Detector; by default the one kept from before, or downloaded
            (`data.detector.find_detector`).
          progress: called with (passes done, passes) before the first and after every one: a pass is one step of one
            window.

        Raises:
          InputError: a file or an argument cannot be used; the message names it.
        """
        request = read_request(
            self.config, portrait, speakers, prompt, seed=seed, steps=steps, window=window, overlap=overlap,
            order=order, guidance_audio=guidance_audio, guidance_text=guidance_text, seconds=seconds, height=height,
            width=width, face_model=face_model, progress=progress,
        )  # fmt: skip
        if request.frames is not None:
            check_array_memory(request.config, request.frames)
        return np.concatenate(list(self.make(request)))

    def stream(
        self,
        portrait: Portrait | None = None,
        speakers: Sequence[Speaker | Sound] | Speaker | Sound | None = (),
        prompt: str | Prompts | None = "",
        **options: Any,
    ) -> Frames:
        """The frames of `animate`'s video, a few at a time, as soon as they are final: for hours of video, or to show
        it while it is made. Memory and the time to the first frames do not grow with the length.

        A speaker's `audio` may be an iterator of samples that are still arriving: frames come as soon as the sound does
        that they need, some windows ahead (docs/long-video.md), and the video ends with the last voice.

        The iterator's place can be kept and taken up again (`Frames`). options: those of `animate`.

        Raises:
          InputError: as there, when it is called.
        """
        return self.make(read_request(self.config, portrait, speakers, prompt, **options))

    def make(self, request: Request) -> Frames:
        """The frames of a video that was read and checked before (`read_request`, of this avatar's config)."""
        avatar, config = dataclasses.replace(self, config=request.config), request.config
        scene = (request.portrait, request.masks, request.voices, request.prompts)
        if request.frames is None:
            told = avatar.live_listening(*scene, seconds=request.seconds)
            end = lambda: told.video_frames and config.lead_in + told.video_frames  # noqa: E731
        else:
            told = avatar.listening(*scene, config.latent_frames(request.frames))
            end = lambda: config.lead_in + request.frames  # noqa: E731
        latents = avatar.denoise_stream(
            told,
            seed=request.seed,
            steps=config.steps,
            window=request.window,
            overlap=request.overlap,
            order=request.order,
            weights={"audio": config.guidance_audio, "text": config.guidance_text},
            progress=request.progress,
        )
        return avatar.decode_stream(latents, config.lead_in, end)

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
        told = self._fixed(portrait, masks, prompt)
        if not len(voices):
            return told
        frames = self.config.vae.temporal_stride * (latent_frames - 1) + 1
        hidden = np.stack([hidden_states(self.encoders.wav2vec2, voice, frames) for voice in voices])
        return dataclasses.replace(told, audio=jnp.asarray(self.audio_tokens(hidden))[None])

    def listening(
        self,
        portrait: UInt8[np.ndarray, "H W 3"] | None,
        masks: Masks,
        voices: Sequence[np.ndarray | Utterances],
        prompt: str | Prompts,
        latent_frames: int,
    ) -> Listening:
        """The same window by window: voices are encoded where a window asks for them, and may lie on the disk. The
        prompt may change: (second from which on it holds, prompt) of each."""
        frames = self.config.vae.temporal_stride * (latent_frames - 1) + 1
        heard = [list(voice) if isinstance(voice, Utterances) else voice for voice in voices]
        return Listening(
            fixed=self._over_time(portrait, masks, prompt),
            voices=[HiddenStates(self.encoders.wav2vec2, voice, frames) for voice in heard],
            encode=self._encode_window,
            latent_frames=latent_frames,
        )

    def live_listening(
        self,
        portrait: UInt8[np.ndarray, "H W 3"] | None,
        masks: Masks,
        voices: Sequence[Any],
        prompt: str | Prompts,
        *,
        seconds: float | None = None,
        stall: float = 60.0,
    ) -> LiveListening:
        """The same of voices that are still arriving: iterators of samples at 16 kHz, or all the samples of a voice.

        seconds: of the video at most. stall: seconds without sound after which a voice is given up.
        """
        sounds = [LiveSound(pieces_of(voice), f"voice {i}", stall) for i, voice in enumerate(voices, 1)]
        return LiveListening(
            self._over_time(portrait, masks, prompt),
            [(RunningStates(self.encoders.wav2vec2), sound) for sound in sounds],
            self._encode_window,
            seconds=seconds,
            lead_in=self.config.lead_in,
        )

    def _over_time(
        self, portrait: np.ndarray | None, masks: Masks, prompt: str | Prompts
    ) -> list[tuple[int, Conditions]]:
        """(latent frame from which on they hold, all conditions but the voices) of each prompt."""
        (_, first), *later = [(0.0, prompt)] if isinstance(prompt, str) else prompt
        fixed = self._fixed(portrait, masks, first)
        held = [(0, fixed)]
        for start, text in later:
            frame = -(-(self.config.lead_in + round(start * FPS)) // self.config.vae.temporal_stride)
            read = {name: jnp.asarray(leaf)[None] for name, leaf in self._read_prompt(portrait, text).items()}
            held.append((frame, dataclasses.replace(fixed, **read)))
        return held

    def _read_prompt(self, portrait: np.ndarray | None, prompt: str) -> dict[str, np.ndarray]:
        with self._on_mesh():
            features, dropped = prompt_features(self.encoders, portrait, prompt)
        if dropped:
            log.warning("prompt: too long, its last %d tokens are not read", dropped)
        return features

    def _fixed(self, portrait: UInt8[np.ndarray, "H W 3"] | None, masks: Any, prompt: str) -> Conditions:
        """All conditions but the voices."""
        height, width = self.config.padded_size
        face = None if portrait is None else pictures.fit_image(portrait, height, width)
        if len(masks):
            masks = latent_masks(masks, self.config)
        features = self._read_prompt(portrait, prompt)
        if face is not None:
            features |= {
                "image_mask": np.ones(features["image_tokens"].shape[0], bool),
                "portrait": np.asarray(portrait_latents(self.encoders.vae, face)),
                "is_start": np.ones((), np.float32),
            }
        if len(masks):
            features["face_mask"] = masks
        if self.config.dit.guidance_embedding:
            features["guidance"] = np.float32(self.config.embedded_guidance)
        return Conditions(**{name: jnp.asarray(leaf)[None] for name, leaf in features.items()})

    def _encode_window(self, steps: Float[np.ndarray, "s n l d"], is_start: bool) -> Float[np.ndarray, "s t a e"]:
        with self._on_mesh():
            return np.asarray(_encode_audio(self.dit, steps[None], np.float32([is_start]))[0])

    def audio_tokens(self, hidden: Float[np.ndarray, "s n l d"]) -> Float[np.ndarray, "s t a e"]:
        """Audio tokens of each speaker and latent frame from wav2vec2's states, in chunks of bounded memory."""
        stride = self.config.vae.temporal_stride
        total = (hidden.shape[1] // 2 - 1) // stride + 1
        tokens = []
        for first in range(0, total, AUDIO_CHUNK):
            length = filled_length(total - first, AUDIO_CHUNK)
            steps = np.stack([cut_audio(states, first, length) for states in hidden])
            tokens.append(self._encode_window(steps, first == 0))
        return np.concatenate(tokens, axis=1)[:, :total]

    def denoise(
        self, conditions: Conditions | Arriving, *, latent_frames: int | None = None, **options: Any
    ) -> Float[np.ndarray, "t h w c"]:
        """Latents of the whole video: the chunks of `denoise_stream`, whose options these are."""
        return np.concatenate(list(self.denoise_stream(conditions, latent_frames=latent_frames, **options)))

    def denoise_stream(
        self,
        conditions: Conditions | Arriving,
        *,
        seed: int,
        steps: int,
        window: int,
        overlap: int,
        weights: dict[str, float],
        latent_frames: int | None = None,
        noise: Float[Array | np.ndarray, "1 t h w c"] | None = None,
        order: Order = "wavefront",
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Latents:
        """Latents of a video in chunks [n h w c], from `noise` or that of `seed`.

        conditions: of the whole video, of `latent_frames`, by default as many as its audio has; or such as say
          themselves how many there are. weights: of guidance, by the names audio and text. Else see `sample.stream`.
        """
        arriving = isinstance(conditions, Arriving)
        if latent_frames is None and not arriving:
            latent_frames = conditions.audio.shape[2]
        frames, ended = conditions.known() if arriving and latent_frames is None else (latent_frames, True)
        height, width = (side // self.config.vae.spatial_stride for side in self.config.padded_size)
        branches = guidance_branches(self.config.dit, weights)
        avatar = self._fitted(len(plan_windows(frames, window, overlap)) if ended else steps, branches)
        velocity = jax.tree_util.Partial(guided_velocity, avatar.dit, guidance_weights(self.config.dit, weights))
        if noise is None:
            noise = FrameNoise(jax.random.key(seed), (1, height, width, self.config.vae.latent_channels))
        else:
            noise = GivenNoise(noise)
        portrait = (conditions.fixed[0][1] if hasattr(conditions, "fixed") else conditions).portrait
        if self.config.portrait_in_noise and portrait is not None:
            noise = NoiseAndPortrait(noise, portrait, self.config.portrait_in_noise)
        chunks = stream(
            velocity,
            noise,
            self.config.sigmas(steps),
            conditions,
            length=latent_frames,
            window=window,
            overlap=overlap,
            group=1 if avatar.mesh is None else group_size(branches, avatar.mesh.shape["data"]),
            order=order,
            progress=progress,
        )
        return Latents(chunks, avatar._on_mesh)

    def decode(self, latents: Float[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "f H W 3"]:
        """Pixels of latents, cropped to the model's size; a few frames at a time are in floating point."""
        return np.concatenate(list(self.decode_stream(iter([latents]))))

    def decode_stream(
        self,
        latents: Iterator[Float[np.ndarray, "n h w c"]],
        first: int = 0,
        end: Callable[[], int | None] = lambda: None,
    ) -> Frames:
        """Pixels of latents that come in chunks, as soon as they are known; of the frames from `first` on, before
        `end()`, if that is a number by then."""
        devices, vae = None if self.mesh is None else self.mesh.local_devices, self.encoders.vae
        size = (self.config.height, self.config.width)
        return Frames(latents, Decoder(vae, devices=devices), vae.config.scaling_factor, size, first, end)

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


def guided_velocity(dit: DiT, weights: dict[str, Array], latents: Array, sigma: Array, conditions: Conditions) -> Array:
    """The velocity that avatars are sampled with; `weights` of `guidance_weights` are those that are not 0."""
    return Guidance(**weights)(dit)(latents, sigma, conditions)


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
