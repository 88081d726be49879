"""A scene file: who is in the picture, who says what and when, and what directs them.

    portrait: three.png
    prompt:
      - {from: 0, text: "They are happy."}
      - {from: 12.5, text: "They are sad and nod."}
    speakers:
      - {audio: anna.wav, mask: anna.png}
      - audio:
          - {from: 2.0, file: bela.wav}
          - {from: 9.5, file: bela_again.wav}
        mask: [40, 30, 120, 140]
    seconds: 30

YAML, or JSON, which is YAML. Files are looked for beside the scene. `prompt` may be a sentence; `seconds` is by default
the end of the last sound. A mask is a picture, a video that moves, or a box: left, top, right, bottom in pixels of the
portrait; without masks the faces are looked for, from left to right.
"""

import dataclasses
import difflib
import itertools
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from mi_jax.bounds import Seconds, fault_of, shown
from mi_jax.data.faces import is_box
from mi_jax.errors import InputError
from mi_jax.files import PathLike, existing_file, reason
from mi_jax.sample.inputs import Speaker, read_prompts

MOST_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What `Avatar.animate` takes: `avatar.animate(**scene.arguments())`."""

    portrait: str | None
    speakers: list[Speaker]
    prompt: list[tuple[float, str]]
    seconds: float | None

    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def files(self) -> list[str]:
        """Of pictures and sounds."""
        named = [self.portrait, *(speaker.mask for speaker in self.speakers)]
        for speaker in self.speakers:
            named += [speaker.audio] if isinstance(speaker.audio, str) else [sound for _, sound in speaker.audio]
        return [name for name in named if isinstance(name, str)]


def read_scene(path: PathLike) -> Scene:
    """Reads a scene file; the files that it names are not opened.

    Raises:
      InputError: it is missing, no YAML, or says something that cannot be meant: one line that names file and place.
    """
    path = existing_file(path, "scene")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size / 1e6:.0f} MB are no scene")
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{path}: cannot be read ({reason(fault)})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as fault:  # ValueError: a date or number that is none
        mark = getattr(fault, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(fault, "problem", None) or next(iter(str(fault).splitlines()), "too deep")
        raise InputError(f"{path}{where}: no YAML ({what})") from None
    return _Reader(path).scene(said)


class _Reader:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def scene(self, said: Any) -> Scene:
        self.keys(said, "the scene", ("portrait", "prompt", "speakers", "seconds"))
        seconds = said.get("seconds")
        if seconds is not None:
            self.check(fault_of(Seconds, seconds, "seconds"))
        speakers = said.get("speakers", [])
        if not isinstance(speakers, list):
            raise self.fault(f"speakers is {shown(speakers)}, a list is needed")
        portrait = said.get("portrait")
        return Scene(
            portrait=None if portrait is None else self.file(portrait, "portrait"),
            speakers=[self.speaker(speaker, f"speaker {i}") for i, speaker in enumerate(speakers, 1)],
            prompt=self.prompts(said.get("prompt")),
            seconds=None if seconds is None else float(seconds),
        )

    def speaker(self, said: Any, where: str) -> Speaker:
        self.keys(said, where, ("audio", "mask"))
        if "audio" not in said:
            raise self.fault(f"{where} has no audio")
        audio, mask = said["audio"], said.get("mask")
        if isinstance(audio, list):
            sounds = []
            for number, sound in enumerate(audio, 1):
                place = f"{where}, sound {number}"
                self.keys(sound, place, ("from", "file"))
                if "file" not in sound:
                    raise self.fault(f"{place} has no file")
                sounds.append((self.time(sound.get("from", 0), place), self.file(sound["file"], place)))
            for number, ((before, _), (after, _)) in enumerate(itertools.pairwise(sounds), 2):
                if after <= before:
                    raise self.fault(f"{where}, sound {number} is from {after:g} s on, after one from {before:g} s on")
            if not sounds:
                raise self.fault(f"{where} says nothing")
            audio = sounds
        else:
            audio = self.file(audio, where)
        if mask is not None and not is_box(mask):
            mask = self.file(mask, f"{where}: its mask")
        return Speaker(audio, mask)

    def prompts(self, said: Any) -> list[tuple[float, str]]:
        if isinstance(said, list):
            given = []
            for number, prompt in enumerate(said, 1):
                place = f"prompt {number}"
                self.keys(prompt, place, ("from", "text"))
                text = prompt.get("text", "")
                if not isinstance(text, str):
                    raise self.fault(f"{place} is {shown(text)}, a sentence is needed")
                given.append((self.time(prompt.get("from", 0), place), text))
            said = given
        try:
            return read_prompts(said)
        except InputError as fault:
            raise self.fault(str(fault)) from None

    def keys(self, said: Any, where: str, known: Collection[str]) -> None:
        if not isinstance(said, Mapping):
            raise self.fault(f"{where} is {shown(said)}, must say some of {', '.join(known)}")
        for key in said:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise self.fault(f"{where} says {shown(key)}: {meant}")

    def file(self, said: Any, where: str) -> str:
        if not isinstance(said, str) or not said:
            raise self.fault(f"{where} is {shown(said)}, the name of a file is needed")
        return str(self.path.parent / said)

    def time(self, said: Any, where: str) -> float:
        self.check(fault_of(float, said, f"{where}: from"))
        if said < 0:
            raise self.fault(f"{where}: from is {said:g}, before the start")
        if said:
            self.check(fault_of(Seconds, said, f"{where}: from"))
        return float(said)

    def check(self, fault: str | None) -> None:
        if fault:
            raise self.fault(fault)

    def fault(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")
