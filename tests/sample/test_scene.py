"""Scene files: what they say, and what cannot be meant."""

import json

import pytest
from tiny_media import one_line

from mi_jax.errors import InputError
from mi_jax.sample.inputs import Speaker
from mi_jax.sample.scene import read_scene

WHOLE = """
portrait: three.png
prompt:
  - {from: 0, text: They are happy.}
  - {from: 12.5, text: They are sad.}
speakers:
  - {audio: anna.wav, mask: anna.png}
  - audio:
      - {from: 2.0, file: bela.wav}
      - {from: 9.5, file: again.wav}
    mask: [40, 30, 120, 140]
seconds: 30
"""


def test_a_scene_says_who_speaks_when(tmp_path):
    path = tmp_path / "scene.yaml"
    path.write_text(WHOLE)
    scene = read_scene(path)
    here = lambda name: str(tmp_path / name)  # noqa: E731
    assert scene.arguments() == {
        "portrait": here("three.png"),
        "speakers": [
            Speaker(here("anna.wav"), here("anna.png")),
            Speaker([(2.0, here("bela.wav")), (9.5, here("again.wav"))], [40, 30, 120, 140]),
        ],
        "prompt": [(0.0, "They are happy."), (12.5, "They are sad.")],
        "seconds": 30.0,
    }
    assert scene.files == [here(f) for f in ("three.png", "anna.png", "anna.wav", "bela.wav", "again.wav")]


def test_json_and_the_least(tmp_path):
    path = tmp_path / "scene.json"
    path.write_text(json.dumps({"portrait": "a.png", "prompt": "She nods.", "speakers": [{"audio": "/x/a.wav"}]}))
    scene = read_scene(path)
    assert scene.speakers == [Speaker("/x/a.wav", None)]
    assert (scene.prompt, scene.seconds) == ([(0.0, "She nods.")], None)
    path.write_text("{portrait: a.png, seconds: 2}")
    assert (read_scene(path).speakers, read_scene(path).prompt) == ([], [(0.0, "")])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("portrait: [", "line 1: no YAML"),
        ("just words", "the scene is 'just words', must say some of portrait"),
        ("potrait: a.png", "the scene says 'potrait': did you mean portrait?"),
        ("speakers: [{audio: a.wav, sound: 1}]", "speaker 1 says 'sound': known are audio, mask"),
        ("speakers: [{mask: a.png}]", "speaker 1 has no audio"),
        ("speakers: a.wav", "speakers is 'a.wav', a list is needed"),
        ("speakers: [{audio: 3}]", "speaker 1 is 3, the name of a file is needed"),
        ("speakers: [{audio: []}]", "speaker 1 says nothing"),
        ("speakers: [{audio: [{from: 1}]}]", "speaker 1, sound 1 has no file"),
        ("speakers: [{audio: [{from: -1, file: a}]}]", "speaker 1, sound 1: from is -1, before the start"),
        ("speakers: [{audio: [{from: x, file: a}]}]", "speaker 1, sound 1: from is 'x', must be a number"),
        (
            "speakers: [{audio: [{from: 5, file: a}, {from: 2, file: b}]}]",
            "speaker 1, sound 2 is from 2 s on, after one from 5 s on",
        ),
        ("prompt: [{from: 3, text: x}]", "prompt: the first holds from 3 s on"),
        ("prompt: [{from: 0, text: x}, {from: 0, text: y}]", "times run backwards"),
        ("prompt: [{form: 0, text: x}]", "prompt 1 says 'form': did you mean from?"),
        ("prompt: 3", "prompt: a sentence is needed, this is int"),
        ("seconds: -3", "seconds is -3"),
        ("seconds: .nan", "seconds is nan"),
        ("seconds: 2026-99-99", "no YAML (month must be in 1..12"),
        ('portrait: !!int "abc"', "no YAML (invalid literal"),
        ("speakers: [{audio: [{from: 1.0e+15, file: a}]}]", "speaker 1, sound 1: from is 1000000000000000.0, must"),
        ("speakers: [{audio: a.wav, mask: [1, 2, 3]}]", "speaker 1: its mask is [1, 2, 3], the name of a file"),
        ("!!python/object/apply:os.system [ls]", "no YAML"),
        ("a: &a [*a]", "the scene says 'a'"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, text, fault):
    path = tmp_path / "scene.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_scene(path)
    assert one_line(caught, path)
    assert fault in str(caught.value)


def test_a_scene_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(InputError, match="scene not found"):
        read_scene(tmp_path / "none.yaml")
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"s\.yaml: cannot be read"):
        read_scene(tmp_path / "s.yaml")
