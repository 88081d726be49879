"""Bounds in the types of fields: their arithmetic, and that every config of the project is held against them."""

import copy
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from mi_jax.avatar.config import AvatarConfig
from mi_jax.bench.run import Options
from mi_jax.bounds import Share, Within, check_fields, fault_of, hints_of
from mi_jax.errors import InputError
from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.clip import CLIPTextConfig, CLIPVisionConfig
from mi_jax.models.dit import DiTConfig
from mi_jax.models.llama import LlamaConfig
from mi_jax.models.mllm import MLLMConfig
from mi_jax.models.prompts import PromptConfig, PromptTemplate
from mi_jax.models.vae import VAEConfig
from mi_jax.models.wav2vec2 import Wav2Vec2Config
from mi_jax.puppets.attributes import AttributeObjective
from mi_jax.puppets.phonemes import PhonemeObjective
from mi_jax.puppets.vae import VAEObjective
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig
from mi_jax.weights.configs import config_from_json, config_to_json

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)
CURRICULUM = CurriculumObjective(dit=DiTConfig.puppet(), records="records")
CONFIGS = [
    AvatarConfig.puppet(),
    AvatarConfig.magic_infinite_13b(),
    DiTConfig.puppet(),
    VAEConfig.hunyuan_video(),
    Wav2Vec2Config.base(),
    MLLMConfig.puppet(),
    CLIPVisionConfig.vit_l_14_336(),
    CLIPTextConfig.vit_l_14(),
    LlamaConfig.llama3_8b(),
    PromptConfig.hunyuan_video(),
    PromptConfig.hunyuan_video().image,
    AudioEncoderConfig.base(),
    OPTIMIZER,
    TrainConfig(name="test", objective=CURRICULUM, steps=1, optimizer=OPTIMIZER),
    CURRICULUM,
    VAEObjective(),
    PhonemeObjective(),
    AttributeObjective(),
    Options(what="dit"),
]
NO_NUMBER = [float("nan"), float("inf"), 10**400, -(10**400), [[1]], True, {}]


@pytest.mark.parametrize(
    ("bound", "inside", "outside", "text"),
    [
        (Within(1, 3), (1, 2.5, 3), (0, 0.999, 4), "must lie in [1, 3]"),
        (Within(0, below=1), (0, 0.999), (-1e-9, 1), "must lie in [0, 1)"),
        (Within(above=0, most=1e6), (1e-30, 1e6), (0, -1, 1e7), "must lie in (0, 1000000]"),
        (Within(above=-1, below=1), (0,), (-1, 1, 2), "must lie in (-1, 1)"),
    ],
)
def test_ends_belong_to_bounds_or_do_not(bound, inside, outside, text):
    assert all(map(bound.holds, inside))
    assert not any(map(bound.holds, outside))
    assert str(bound) == text


@pytest.mark.parametrize("ends", [{}, {"least": 0}, {"least": 0, "above": 0, "most": 1}, {"most": 1, "below": 1}])
def test_a_bound_has_two_ends(ends):
    with pytest.raises(ValueError, match="one lower and one upper"):
        Within(**ends)


@pytest.mark.parametrize(
    ("hint", "value", "fault"),
    [
        (int, 3, None),
        (int, True, "x is True, must be a whole number"),
        (int, 3.0, "x is 3.0, must be a whole number"),
        (float, 3, None),
        (float, float("nan"), "x is nan, must be a finite number"),
        (float | None, None, None),
        (float, None, "x is None, must be a number"),
        (Share | None, 1.5, "x is 1.5, must lie in [0, 1]"),
        (bool, 1, "x is 1, must be true or false"),
        (str | tuple[str, ...], ("a", "b"), None),
        (str | tuple[str, ...], ("a", 1), "x is ('a', 1), must be text"),
        (tuple[Share, ...], (0.5, 2.0), "x[1] is 2.0, must lie in [0, 1]"),
        (tuple[Share, ...], 0.5, "x is 0.5, must be a list"),
        (tuple[int, int], (1, 2, 3), "x has 3 entries, must have 2"),
        (tuple[tuple[int, Share], ...], ((1, 0.5), (1, -1)), "x[1][1] is -1, must lie in [0, 1]"),
        (typing.Literal["a", 1], 1, None),
        (typing.Literal["a", 1], True, "x is True, none of a, 1"),
        (VAEConfig, 3, "x is 3, must be a VAEConfig"),
        (typing.TypeVar("T"), object(), None),
    ],
)
def test_what_is_wrong_with_a_value(hint, value, fault):
    assert fault_of(hint, value, "x") == fault


def test_a_message_is_short_whatever_the_value():
    assert len(fault_of(Share, 10**5000, "x")) < 120
    assert len(fault_of(int, "a" * 10**6, "x")) < 120


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_field_of_every_config_is_checked(config):
    """Made in Python: nothing is taken for a number that is none, or out of all reason."""
    check_fields(config)
    for name, hint in hints_of(type(config)).items():
        if isinstance(hint, typing.TypeVar) or name == "name":
            continue
        where = re.escape(f"{type(config).__name__}.{name}")
        bad = [value for value in (*NO_NUMBER, object()) if not (value is True and hint is bool)]
        entries = getattr(config, name)
        if isinstance(entries, tuple):
            bad += [(*entries[:-1], value) for value in NO_NUMBER]
        for value in bad:
            broken = copy.copy(config)
            object.__setattr__(broken, name, value)  # as the constructor does, which tests hold against types alone
            with pytest.raises(InputError, match=where):
                broken.__post_init__()


def paths(value, place=()):
    """Every place in JSON that holds no object."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from paths(entry, (*place, key))
    else:
        yield place


@pytest.mark.parametrize("part", ["dit", "vae", "wav2vec2", "mllm", ""])
def test_every_field_of_a_config_file_is_checked(part):
    """Read from config.json: one line, which names file and field."""
    stored = config_to_json(AvatarConfig.puppet())
    whole = hints_of(AvatarConfig)[part] if part else AvatarConfig
    kind = next(option for option in (whole, *typing.get_args(whole)) if dataclasses.is_dataclass(option))
    whole_file = stored
    stored = stored[part] if part else {name: x for name, x in stored.items() if not isinstance(x, dict)}
    for number, (*place, last) in enumerate(paths(stored)):
        for value in ({"a": 1}, NO_NUMBER[number % len(NO_NUMBER)]):
            changed = inside = copy.deepcopy(stored if part else whole_file)
            for key in place:
                inside = inside[key]
            if value is True and isinstance(inside[last], bool):
                continue
            inside[last] = value
            with pytest.raises(InputError) as caught:
                config_from_json(kind, changed, "m/config.json", part)
            said = str(caught.value)
            assert said.startswith(f"m/config.json: {'.'.join((part, *place, last)).removeprefix('.')}")
            assert "\n" not in said


def test_unknown_and_missing_fields_are_named():
    stored = config_to_json(AvatarConfig.puppet())
    del stored["vae"], stored["height"]
    with pytest.raises(InputError, match=r"^m/config\.json: AvatarConfig lacks height, vae$"):
        config_from_json(AvatarConfig, stored, "m/config.json")
    stored = config_to_json(AvatarConfig.puppet())
    stored["dit"]["audio"] |= {"depths": 3}
    with pytest.raises(InputError, match=r"^m/config\.json: dit\.audio: AudioEncoderConfig has no field depths$"):
        config_from_json(AvatarConfig, stored, "m/config.json")
    for kind in (AvatarConfig.puppet(), AvatarConfig.magic_infinite_13b()):
        assert config_from_json(AvatarConfig, config_to_json(kind), "") == kind


@pytest.mark.parametrize(
    ("config", "changes", "fault"),
    [
        (DiTConfig.puppet(), {"heads": 3}, "must sum to the head dim"),
        (DiTConfig.puppet(), {"rope_axes": (15, 25, 24)}, "must be even"),
        (VAEConfig.puppet(), {"strides": ((1, 2, 2),)}, "strides has 1 entries, for 4 widths"),
        (VAEConfig.puppet(), {"time_kernels": (1,)}, "time_kernels has 1 entries"),
        (VAEConfig.puppet(), {"widths": ()}, "widths has 0 entries"),
        (VAEConfig.puppet(), {"decoder_strides": ((2, 1, 1), (2, 1, 1), (1, 4, 4))}, "not of the same size"),
        (VAEConfig.hunyuan_video(), {"norm_groups": 96}, "does not divide the widths"),
        (VAEConfig.puppet(), {"latent_channels": 15}, "shortcuts from 128 to 15"),
        (Wav2Vec2Config.base(), {"conv_strides": (5, 2, 2, 2, 2, 2, 4)}, "whose product is 320"),
        (Wav2Vec2Config.base(), {"conv_kernels": (10, 3)}, "of 2 kernels: one each"),
        (Wav2Vec2Config.base(), {"num_heads": 7}, "num_heads 7 does not divide"),
        (Wav2Vec2Config.base(), {"position_groups": 7}, "position_groups 7 does not divide"),
        (CLIPVisionConfig.vit_l_14_336(), {"patch_size": 15}, "do not divide a picture of 336"),
        (CLIPVisionConfig.vit_l_14_336(), {"heads": 7}, "do not divide a width"),
        (CLIPVisionConfig.vit_l_14_336(), {"feature_layer": 25}, "feature_layer is 25, of 25 states"),
        (CLIPTextConfig.vit_l_14(), {"eos_token_id": 49408}, "of 49408 tokens"),
        (LlamaConfig.llama3_8b(), {"key_value_heads": 5}, "do not divide 32 heads"),
        (LlamaConfig.llama3_8b(), {"width": 4128}, "no even size"),
        (MLLMConfig.puppet(), {"hidden_state_skip_layer": 3}, "of 2 layers"),
        (MLLMConfig.puppet(), {"language": LlamaConfig(vocab_size=2, width=2, mlp_width=2, depth=1, heads=1,
                                                       key_value_heads=1)}, "image_token_id is 4, of 2 tokens"),
        (PromptTemplate(text="{}", crop_start=0), {"text": "{:1000000000}"}, "no other brace"),
        (PromptTemplate(text="{}", crop_start=0), {"text": "a"}, "once"),
        (PromptTemplate(text="{}", crop_start=0), {"cut_marker": ""}, "cut_marker is empty"),
        (PhonemeObjective(), {"speed": (1.2, 0.8)}, "the lower end stands first"),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_each_other(config, changes, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": -1e-3},
        {"learning_rate": float("inf")},
        {"b1": 1.0},
        {"b2": 2.0},
        {"clip_norm": 0.0},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"ema_decay": 1.5},
    ],
)
def test_optimisers_that_cannot_be_meant(changes):
    with pytest.raises(InputError, match=f"OptimizerConfig.{next(iter(changes))} is"):
        dataclasses.replace(OPTIMIZER, **changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"window_weights": ()}, "window_weights has 0 entries, for 3 windows"),
        ({"windows": ()}, "windows is empty"),
        ({"windows": ((9, 4), (17, 2))}, "window_weights has 3 entries, for 2 windows"),
        ({"window_weights": (0.0, 0.0, 0.0)}, "one must be above 0"),
        ({"window_weights": (1.0, -1.0, 1.0)}, "window_weights[1] is -1.0"),
        ({"windows": ((9, 0), (17, 1), (33, 1))}, "windows[0][1] is 0"),
        ({"mid_clip": 1.5}, "mid_clip is 1.5, must lie in [0, 1]"),
        ({"drop_each": -0.1}, "drop_each is -0.1"),
        ({"shift": 0.0}, "shift is 0.0, must lie in (0, 1000]"),
        ({"sigma_scale": 0.0}, "sigma_scale is 0.0"),
        ({"adaptive_weight": float("nan")}, "adaptive_weight is nan"),
        ({"speakers": 0}, "speakers is 0"),
    ],
)
def test_curricula_that_cannot_be_meant(changes, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        dataclasses.replace(CURRICULUM, **changes)


def test_every_experiment_of_the_project_is_in_its_bounds():
    import runpy

    paths = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
    configs = {path.stem: runpy.run_path(str(path))["config"] for path in paths}
    assert {"magic_infinite_stage1", "magic_infinite_stage2", "puppet_stage2", "puppet_vae"} <= configs.keys()
    hints = {name: hints_of(type(config)) for name, config in configs.items()}
    faults = {
        f"{name}.{field}": fault_of(hint, getattr(configs[name], field), field)
        for name, fields in hints.items()
        for field, hint in fields.items()
    }
    assert {name: fault for name, fault in faults.items() if fault} == {}
    assert len(faults) == len(configs) * len(hints["puppet_vae"]) > 100
