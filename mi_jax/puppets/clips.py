"""Puppets: talking portraits drawn by the project itself, with voice, prompt and the truth about every frame.

`draw(index, seed=..., split=...)` makes any clip on the fly, the same on every machine; `write_puppets` writes
clips as files. Training and test share no voice, no language's word list
and no face (the faces of a split come from generators seeded apart).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from mi_jax.bounds import ClipSeconds, fault_of
from mi_jax.errors import InputError
from mi_jax.files import new_folder, reason
from mi_jax.memory import check_host_memory
from mi_jax.puppets.backgrounds import Background, add_movers, base_picture, sample_background
from mi_jax.puppets.drawing import add_puppet
from mi_jax.puppets.face import mouth_truth
from mi_jax.puppets.geometry import Scene
from mi_jax.puppets.head import Pose, face_polygon
from mi_jax.puppets.looks import Look, sample_look
from mi_jax.puppets.motion import move, sample_direction
from mi_jax.puppets.prompts import write_prompt
from mi_jax.puppets.speech import mouth_track, sample_voice, speak
from mi_jax.rates import FPS, SAMPLE_RATE

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A talking puppet.

    `mouth` holds opening (height of the mouth's interior), width, x and y (its centre) as fractions of the picture;
    `mask` is the union of the face's region over all frames, or the region in each; `phonemes` are (start s, end s,
    class of `PHONEME_CLASSES`) without gaps. Frame f shows the mouth at (f + 0.5) / 25 s.
    """

    video: UInt8[np.ndarray, "f h w 3"]
    audio: Float[np.ndarray, "n"]
    prompt: str
    attributes: dict
    mouth: Float[np.ndarray, "f 4"]
    mask: Bool[np.ndarray, "h w"] | Bool[np.ndarray, "f h w"]
    phonemes: list[tuple[float, float, int]]


def num_frames(seconds: float) -> int:
    """The 4k+1 frames (25 fps) nearest to a length in seconds."""
    return 4 * max(0, round((seconds * FPS - 1) / 4)) + 1


def draw(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    seconds: float = 5.16,
    size: int = 96,
    window: tuple[int, int] | None = None,
    moving_masks: bool = False,
) -> Clip:
    """Clip number `index`: any index >= 0, the same bits in every process and order.

    `window=(start, stop)` gives only those frames of it (with their sound and truth) at the cost of drawing only
    those. With `moving_masks` the clip's `mask` is one for each frame.
    """
    look_rng, speech_rng, motion_rng, background_rng, prompt_rng = generators(index, seed, split)
    frames = num_frames(seconds)
    start, stop = window or (0, frames)
    if not 0 <= start < stop <= frames:
        raise InputError(f"window: frames {start}..{stop} do not lie in a clip of {frames}")
    look = sample_look(look_rng)
    voice = sample_voice(speech_rng, split)
    speech = speak(speech_rng, voice, frames / FPS, split)
    direction = sample_direction(motion_rng)
    pose = move(motion_rng, direction, mouth_track(speech, frames))[start:stop]
    background = sample_background(background_rng, look.style == "line drawing")
    prompt = write_prompt(prompt_rng, look, direction, background.kind, background.motion)

    video = render([(look, pose)], background, np.arange(start, stop) / FPS, size)
    attributes = {
        **describe(index, seed, split, size, look, direction, background, pose),
        "frames": stop - start,
        "first_frame": start,
        "voice": dataclasses.asdict(voice),
        "text": speech.text,
    }
    offset = start / FPS
    phonemes = [
        (max(a, offset) - offset, min(b, stop / FPS) - offset, k)
        for a, b, k in speech.phonemes
        if b > offset and a < stop / FPS
    ]
    samples = SAMPLE_RATE // FPS
    return Clip(
        video=video, audio=speech.audio[start * samples : stop * samples], prompt=prompt, attributes=attributes,
        mouth=mouth_truth(look, pose), mask=(face_masks if moving_masks else face_mask)(look, pose, size),
        phonemes=phonemes,
    )  # fmt: skip


def draw_portrait(
    index: int, *, seed: int = 0, split: str = "train", size: int = 96
) -> tuple[UInt8[np.ndarray, "h w 3"], str, dict]:
    """Picture, prompt and attributes of clip `index` before it speaks, in milliseconds: no voice is synthesised.

    The picture is frame 0 of `draw` with the mouth at rest; the attributes are those of its attributes that do not
    depend on speech.
    """
    look_rng, _, motion_rng, background_rng, prompt_rng = generators(index, seed, split)
    look = sample_look(look_rng)
    direction = sample_direction(motion_rng)
    pose = move(motion_rng, direction, (np.zeros(1), np.ones(1), np.zeros(1)))
    background = sample_background(background_rng, look.style == "line drawing")
    prompt = write_prompt(prompt_rng, look, direction, background.kind, background.motion)
    attributes = describe(index, seed, split, size, look, direction, background, pose)
    return render([(look, pose)], background, np.zeros(1), size)[0], prompt, attributes


def describe(index, seed, split, size, look, direction, background, pose) -> dict:
    """What is drawn and directed, json-able; `face_box` is left, top, right, bottom as fractions of the picture."""
    face = face_polygon(look, pose)
    return {
        "index": index,
        "seed": seed,
        "split": split,
        "size": size,
        "expression": direction.expression,
        "head_motion": direction.head_motion,
        "background_motion": background.motion,
        "direction": dataclasses.asdict(direction),
        "look": dataclasses.asdict(look),
        "background": dataclasses.asdict(background),
        "face_box": [float(v) for v in (*face.min((0, 1)), *face.max((0, 1)))],
    }


def face_mask(look: Look, pose: Pose, size: int) -> Bool[np.ndarray, "h w"]:
    """The face's region, over all frames of a pose."""
    return _painted(_outlines(look, pose, size), size)


def face_masks(look: Look, pose: Pose, size: int) -> Bool[np.ndarray, "f h w"]:
    """The face's region in each frame of a pose; what stands still is painted once."""
    outlines, places = np.unique(_outlines(look, pose, size), axis=0, return_inverse=True)
    return np.stack([_painted(outline[None], size) for outline in outlines])[places.reshape(-1)]


def _outlines(look: Look, pose: Pose, size: int) -> Int[np.ndarray, "f m"]:
    """The face's outline in every frame, in pixels: x and y of each corner in turn."""
    face = face_polygon(look, pose)
    return np.rint(face * size).astype(int).reshape(len(face), -1)


def _painted(outlines: Int[np.ndarray, "n m"], size: int) -> Bool[np.ndarray, "h w"]:
    """Where any of these polygons is."""
    picture = Image.new("1", (size, size))
    paint = ImageDraw.Draw(picture).polygon
    for polygon in outlines.tolist():
        paint(polygon, 1)
    return np.asarray(picture, bool)


def generators(index: int, seed: int, split: str, kind: str = "clip") -> tuple[np.random.Generator, ...]:
    """One generator per concern (look, speech, motion, background, prompt): new hair changes nothing that is said.

    kind: "clip", "duet" or "trio", which share nothing.
    """
    if split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    entropy = [seed, SPLITS.index(split), index] + {"clip": [], "duet": [1], "trio": [2]}[kind]
    seeds = np.random.SeedSequence(entropy).spawn(5)
    return tuple(np.random.default_rng(s) for s in seeds)


def render(
    puppets: list[tuple[Look, Pose]],
    background: Background,
    time: np.ndarray,
    size: int,
) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames at `time` (seconds) of puppets that share one style; later ones stand before earlier ones."""
    paper = puppets[0][0].style == "line drawing"
    scene = Scene(len(time))
    add_movers(scene, background, time, paper)
    for look, pose in puppets:
        add_puppet(scene, look, pose)
    return scene.render(base_picture(background, size, paper), size)


def check_clip(seconds: float, size: int) -> None:
    """Raises InputError for a length that no clip is drawn at, or a clip that is more than memory holds."""
    fault = fault_of(ClipSeconds, seconds, "--seconds")
    if fault:
        raise InputError(fault)
    check_host_memory(num_frames(seconds) * size**2 * 3, f"a clip of {seconds:g} s and {size}x{size} pixels")


def write_puppets(
    out_dir: str | Path,
    count: int,
    seed: int,
    seconds: float,
    *,
    split: str = "train",
    size: int = 96,
    duets: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write clips (or duets) 0..count-1 to `out_dir`/00000, ...: see `write_clip`.

    Each folder is written beside and renamed when complete; one that is there already is replaced.

    Raises:
        InputError: the output folder cannot be written, or a number is out of range.
    """
    from tqdm import tqdm

    from mi_jax.puppets.groups import draw_duet

    if count < 1:
        raise InputError(f"--count: expected at least 1, got {count}")
    check_clip(seconds, size)
    out_dir = Path(out_dir)
    try:  # before there is a progress bar, so that the fault is said alone
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"{out_dir}: cannot be written ({reason(fault)})") from fault
    folders = [out_dir / f"{index:05d}" for index in range(count)]
    for index, folder in enumerate(tqdm(folders, desc="puppets", unit="clip", disable=not progress)):
        with new_folder(folder, overwrite=True) as beside:
            write_clip(
                beside, (draw_duet if duets else draw)(index, seed=seed, split=split, seconds=seconds, size=size)
            )
    return folders


def write_clip(folder: Path, clip) -> None:
    """The files of one clip, or of a duet, into an existing folder.

    portrait.png, prompt.txt, video.mp4, attributes.json, and of the speaker mask.png, speech.wav, mouth.csv; of a
    duet's two speakers mask_1.png, mask_2.png and so on, from left to right.
    """
    from mi_jax.data.pictures import write_image
    from mi_jax.data.sound_files import write_audio
    from mi_jax.data.video_files import write_video

    write_image(folder / "portrait.png", clip.video[0])
    single = clip.audio.ndim == 1
    speakers = [(clip.mask, clip.audio, clip.mouth)] if single else list(zip(clip.mask, clip.audio, clip.mouth))
    for number, (mask, audio, mouth) in enumerate(speakers, 1):
        suffix = "" if single else f"_{number}"
        write_image(folder / f"mask{suffix}.png", mask.astype(np.uint8) * 255)
        write_audio(folder / f"speech{suffix}.wav", audio)
        rows = [f"{f},{o:.5f},{w:.5f},{x:.5f},{y:.5f}" for f, (o, w, x, y) in enumerate(mouth)]
        text = "\n".join(["frame,opening,width,x,y", *rows]) + "\n"
        (folder / f"mouth{suffix}.csv").write_text(text, encoding="utf-8")
    (folder / "prompt.txt").write_text(clip.prompt + "\n", encoding="utf-8")
    (folder / "attributes.json").write_text(
        json.dumps(clip.attributes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    mixed = np.clip(sum(audio for _, audio, _ in speakers), -1, 1)
    write_video(folder / "video.mp4", clip.video, mixed)
