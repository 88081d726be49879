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
    from mi_jax.data import pictures, video_files
    from mi_jax.data.detector import named_detector
    from mi_jax.data.growing_video import GrowingVideo
    from mi_jax.files import digest, refuse_inputs
    from mi_jax.mesh import take_devices
    from mi_jax.models.prompts import check_prompt
    from mi_jax.rates import FPS, SAMPLE_RATE
    from mi_jax.sample import avatar, inputs
    from mi_jax.sample.save import sound_of
    from mi_jax.sample.scene import read_scene
    from mi_jax.sample.sizes import check_device_memory
    from mi_jax.sample.windows import check_overlap

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
        check_prompt(prompt)
        speakers = [inputs.Speaker(*both) for both in zip(audio, mask or [None] * len(audio), strict=True)]
        prompts, files = prompt, [portrait, *audio, *mask]
    options = {
        "steps": steps,
        "guidance_audio": guidance_audio,
        "guidance_text": guidance_text,
        "height": height,
        "width": width,
    }
    config = avatar_config(model).replace(**options)
    inputs.check_request(config, portrait=portrait is not None, voices=len(speakers), seconds=seconds, seed=seed)
    check_overlap(window, overlap)
    given = [speaker.mask for speaker in speakers]
    if speakers and all(one is None for one in given):
        named_detector(face_model)
    take_devices(devices, seq)
    adaptations = adaptations_of(lora)
    refuse_inputs(out, *files, *(path for path, _ in adaptations))
    pixels = None if portrait is None else pictures.read_image(portrait)
    voices = [
        inputs.read_voice(speaker.audio, f"voice {i}" if scene else str(speaker.audio), seconds)
        for i, speaker in enumerate(speakers, 1)
    ]
    longest = max(map(len, voices), default=0) / SAMPLE_RATE
    frames = inputs.num_frames(longest if seconds is None else seconds)
    video_files.check_space(out, frames, config.height, config.width)
    check_device_memory(config, frames, window, overlap, order)
    masks = inputs.find_masks(config, pixels, given, face_model, frames) if voices else []
    settings = {"seed": seed, "window": window, "overlap": overlap, "order": order}
    made_of = {
        "portrait": None if pixels is None else digest(pixels),
        "audio": [inputs.digest_of(voice) for voice in voices],
        "mask": [inputs.digest_of(mask) for mask in masks],
        "prompt": prompts,
        "seconds": frames / FPS,
        "model": {"config": repr(config), "files": weights_described(model, adaptations)},
    }
    track, rate = sound_of(speakers or None, frames)
    size = config.height, config.width
    with GrowingVideo(out, *size, track, sample_rate=rate, request=made_of | settings, resume=resume) as growing:
        loaded = avatar.load(model, lora=adaptations, devices=devices, seq=seq)
        heard = [inputs.Speaker(voice, mask) for voice, mask in zip(voices, masks)]
        with ProgressBar("denoising", "pass") as bar:
            video = loaded.stream(pixels, heard, prompts, seconds=seconds, progress=bar, **settings, **options)
            if growing.state is not None:
                video.restore(growing.state)
            for piece in video:
                growing.write(piece)
                if growing.segment_is_long:
                    growing.keep(video.state())
        growing.finish()
    height, width = video_files.written_size(config.height, config.width)
    print(f"{out}: {frames / FPS:.2f} s, {frames} frames of {width}x{height}")
