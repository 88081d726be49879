"""`mi-jax animate`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.bounds import Devices, Guidance, LatentFrames, Pixels, SamplingSteps, Seconds, Seed
from mi_jax.commands.terminal import ProgressBar, adaptations_of
from mi_jax.errors import InputError


def animate(
    out: Annotated[Path, tyro.conf.arg(metavar="VIDEO.mp4")],
    portrait: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[PORTRAIT]")]] = None,
    audio: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[AUDIO ...]")]] = (),
    prompt: str = "",
    model: Annotated[str, tyro.conf.arg(metavar="puppet|DIR")] = "puppet",
    lora: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:WEIGHT]")]] = (),
    mask: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")] = (),
    scene: Annotated[Path | None, tyro.conf.arg(metavar="SCENE.yaml")] = None,
    steps: SamplingSteps | None = None,
    window: LatentFrames = 33,
    overlap: LatentFrames = 8,
    order: Literal["wavefront", "level", "causal"] = "wavefront",
    seed: Seed = 0,
    guidance_audio: Guidance | None = None,
    guidance_text: Guidance | None = None,
    seconds: Seconds | None = None,
    height: Pixels | None = None,
    width: Pixels | None = None,
    face_model: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    devices: Devices | None = None,
    seq: Devices | None = None,
    resume: bool = False,
) -> None:
    """A portrait, a voice and a sentence become a talking video.

    The video can be watched while it is made: it grows as VIDEO.mp4.partial/video.mp4, and has its name when it is
    whole. What was made before a kill or a full disk stays there; --resume goes on with it.

    Without AUDIO the video is silent; without PORTRAIT it is made of the sentence alone, if the model can do that.

    Args:
      out: the video to write.
      portrait: a picture: png, jpg, webp, ...
      audio: one sound file per speaker, from left to right: wav, mp3, flac, m4a, mp4, ...
      prompt: a sentence of direction: expression, movement, background.
      model: a shipped model or a model folder.
      lora: a file of LoRA factors that change the denoiser, with its weight, by default 1; may be given again.
      mask: one picture, or video that moves, per voice, white where its face is, after PORTRAIT and AUDIO; by default
        the face is looked for.
      scene: a file that says portrait, voices, masks and prompts, and when (docs/long-video.md), instead of these.
      steps: denoising steps; by default the model's.
      window: latent frames (of 4 video frames) that the denoiser sees at a time.
      overlap: latent frames that neighbouring windows share.
      order: in which windows are denoised. By wavefront the video grows from its first frame on, by level all of it at
        once, from noise; both are the same video. Causal: each window is done before the next begins, which takes the
        frames that both share as they are.
      seed: of the noise: the same seed makes the same video.
      guidance_audio: how strongly the voice is followed; by default the model's.
      guidance_text: how strongly the prompt is followed; by default the model's.
      seconds: length of the video; by default that of the longest voice.
      height: of the video in pixels; by default the model's.
      width: of the video in pixels; by default the model's.
      face_model: a model of MediaPipe's Face Detector (.tflite); by default MI_JAX_FACE_MODEL, else the one kept
        from before or downloaded.
      devices: how many share the work; by default all.
      seq: of these, how many share the tokens of a window; by default what suits the video.
      resume: go on with a video that an earlier run of the same command did not finish.
    """
    from mi_jax.avatar.folders import avatar_config, weights_described
    from mi_jax.data import video_files
    from mi_jax.data.detector import named_detector
    from mi_jax.data.growing_video import GrowingVideo
    from mi_jax.files import refuse_inputs
    from mi_jax.mesh import take_devices
    from mi_jax.rates import FPS
    from mi_jax.sample import avatar
    from mi_jax.sample.inputs import Speaker
    from mi_jax.sample.request import read_request
    from mi_jax.sample.save import sound_of
    from mi_jax.sample.scene import read_scene

    # Whatever can be wrong is found before a model is loaded: a mistake costs a second, not a minute.
    video_files.check_video_path(out)
    if scene is not None:
        if portrait is not None or audio or mask or prompt:
            raise InputError(f"{scene} says portrait, voices, masks and prompt: give none of them beside --scene")
        told = read_scene(scene)
        speakers, prompts, files = told.speakers, told.prompt, [scene, *told.files]
        portrait, seconds = told.portrait, told.seconds if seconds is None else seconds
    else:
        if mask and portrait is None:
            raise InputError("--mask, but no PORTRAIT before it: --mask comes after PORTRAIT and AUDIO")
        if mask and len(mask) != len(audio):
            raise InputError(f"{len(mask)} masks for {len(audio)} voices: give one --mask picture per voice, or none")
        speakers = [Speaker(*both) for both in zip(audio, mask or [None] * len(audio), strict=True)]
        prompts, files = prompt, [portrait, *audio, *mask]
    config, given = avatar_config(model), [speaker.mask for speaker in speakers]
    if speakers and all(one is None for one in given):
        named_detector(face_model)
    take_devices(devices, seq)
    adaptations = adaptations_of(lora)
    refuse_inputs(out, *files, *(path for path, _ in adaptations))
    with ProgressBar("denoising", "pass") as bar:
        asked = read_request(
            config, portrait, speakers, prompts, seed=seed, steps=steps, window=window, overlap=overlap, order=order,
            guidance_audio=guidance_audio, guidance_text=guidance_text, seconds=seconds, height=height, width=width,
            face_model=face_model, progress=bar, out=out,
        )  # fmt: skip
        config, frames = asked.config, asked.frames
        described = asked.described() | {"model": weights_described(model, adaptations)}
        track, rate = sound_of(speakers or None, frames)
        size = config.height, config.width
        with GrowingVideo(out, *size, track, sample_rate=rate, request=described, resume=resume) as growing:
            video = avatar.load(model, lora=adaptations, devices=devices, seq=seq).make(asked)
            if growing.state is not None:
                video.restore(growing.state)
            for piece in video:
                growing.write(piece)
                if growing.segment_is_long:
                    growing.keep(video.state())
            growing.finish()
    height, width = video_files.written_size(config.height, config.width)
    print(f"{out}: {frames / FPS:.2f} s, {frames} frames of {width}x{height}")
