"""The two stages: windows of records, losses, the warm start, and the step at 13B without an array."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_avatar import draw_weights
from tiny_dit import velocity
from tiny_records import TINY, record

from mi_jax.avatar.folders import load_part
from mi_jax.data.records import write_records
from mi_jax.diffusion import sigma_schedule
from mi_jax.errors import InputError
from mi_jax.models.audio_encoder import cut_audio
from mi_jax.models.dit import DiT
from mi_jax.train.checkpoints import at_start
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.denoiser import euler
from mi_jax.train.loop import train
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig
from mi_jax.train.windows import cut_window

CONFIGS = Path(__file__).parents[2] / "configs"


def batch(b: int, t: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    cut = [cut_window(record(rng), rng, length=t, mid_clip=0.5, speakers=1) for _ in range(b)]
    return {name: np.stack([window[name] for window in cut]) for name in cut[0]}


def test_windows_cut_latents_and_sound_together():
    rng = np.random.default_rng(1)
    clip = record(rng)
    starts = set()
    for _ in range(60):
        window = cut_window(clip, rng, length=4, mid_clip=0.5, speakers=1)
        start = next(s for s in range(6) if np.array_equal(window["latents"], clip["latents"][s : s + 4]))
        starts.add(start)
        assert window["is_start"] == (start == 0)
        np.testing.assert_array_equal(window["audio_steps"][0], cut_audio(clip["audio_hidden"][0], start, 4))
        np.testing.assert_array_equal(window["portrait"], clip["portrait"].astype(np.float32))
        np.testing.assert_array_equal(window["audio_mask"], clip["face_mask"])
    assert starts == set(range(6))
    assert cut_window(clip, rng, length=4, mid_clip=0.5, speakers=1, whole_mask=1.0)["audio_mask"].min() == 1
    whole = cut_window(clip, rng, length=9, mid_clip=1.0, speakers=0)
    assert whole["is_start"] == 1
    assert "audio_steps" not in whole


def test_speakers_keep_their_own_sound_and_place():
    rng = np.random.default_rng(1)
    one, two = record(rng), record(rng, speakers=2)
    window = cut_window(two, rng, length=9, mid_clip=0.0, speakers=3, whole_mask=1.0)  # whole_mask is for one alone
    np.testing.assert_array_equal(window["audio_mask"][:2], two["face_mask"])
    np.testing.assert_array_equal(window["face_mask"], two["face_mask"].max(0))
    for k in range(2):
        np.testing.assert_array_equal(window["audio_steps"][k], cut_audio(two["audio_hidden"][k], 0, 9))
    assert not window["audio_mask"][2].any()
    assert not window["audio_steps"][2].any()
    # A speaker who is nowhere changes nothing.
    objective = CurriculumObjective(dit=TINY, records="")
    model = draw_weights(DiT, TINY, 0)
    told = [
        {name: jnp.asarray(x)[None] for name, x in cut_window(one, rng, length=9, mid_clip=0.0, speakers=s).items()}
        for s in (1, 2)
    ]
    losses = [jax.jit(objective.loss)(model, batch, jax.random.key(1))[0] for batch in told]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    unmasked = cut_window(two, rng, length=9, mid_clip=0.0, speakers=3, face_masked=False)["audio_mask"]
    np.testing.assert_array_equal(unmasked.min((1, 2)), [1, 1, 0])  # everywhere, of those who are there
    np.testing.assert_array_equal(unmasked.max((1, 2)), [1, 1, 0])
    with pytest.raises(InputError, match="a record has 2 speakers"):
        cut_window(two, rng, length=9, mid_clip=0.0, speakers=1)


def test_the_loss_takes_masks_that_move():
    """Repeated for every frame, masks are those of the whole clip; elsewhere in another frame, they are not: neither
    where audio acts nor where the error weighs."""
    objective = CurriculumObjective(dit=TINY, records="", adaptive_weight=10.0, drop_each=0.0, drop_all=0.0)
    model, loss = draw_weights(DiT, TINY, 0), jax.jit(objective.loss)
    left = np.arange(4) < 2
    halves = np.stack([np.broadcast_to(left if frame % 2 else ~left, (4, 4)) for frame in range(9)])
    clip = record(np.random.default_rng(0)) | {"face_mask": halves[None].astype(np.float32)}
    still = clip | {"face_mask": clip["face_mask"][:, 0]}

    def parts(clip, moving):
        window = cut_window(clip, np.random.default_rng(0), length=3, mid_clip=0.0, speakers=1, moving=moving)
        total, parts = loss(model, {name: jnp.asarray(x)[None] for name, x in window.items()}, jax.random.key(1))
        return np.asarray([total[0], parts["base"], parts["face"]])

    np.testing.assert_allclose(parts(still, True), parts(still, False), rtol=1e-5)
    moved = parts(clip, True)
    assert np.isfinite(moved).all()
    assert (np.abs(moved / parts(still, False) - 1) > 1e-4).all()


def test_dataset_mixes_window_lengths_and_is_the_same_again(tmp_path):
    rng = np.random.default_rng(0)
    write_records(tmp_path / "records", [record(rng) for _ in range(8)])
    objective = CurriculumObjective(
        dit=TINY, records=str(tmp_path / "records"), windows=((3, 4), (5, 2)), window_weights=(0.5, 0.5)
    )
    shapes = [objective.dataset(0)[i]["latents"].shape[:2] for i in range(12)]
    assert set(shapes) == {(4, 3), (2, 5)}
    np.testing.assert_array_equal(objective.dataset(0)[7]["latents"], objective.dataset(0)[7]["latents"])
    assert not np.array_equal(objective.dataset(0)[0]["latents"], objective.dataset(1)[0]["latents"])


def test_several_folders_are_one(tmp_path):
    rng = np.random.default_rng(0)
    folders = [str(tmp_path / name) for name in "ab"]
    parts = [[record(rng) for _ in range(count)] for count in (3, 5)]
    for folder, part in zip(folders, parts):
        write_records(folder, part)
    objective = CurriculumObjective(
        dit=TINY, records=tuple(folders), windows=((3, 4),), window_weights=(1.0,), mid_clip=0.0
    )
    seen = np.concatenate([objective.dataset(0)[i]["portrait"] for i in range(2)])  # one pass: every clip once
    given = np.stack([clip["portrait"] for part in parts for clip in part]).astype(np.float32)
    order = lambda x: x[np.argsort(x.reshape(len(x), -1)[:, 0])]  # noqa: E731
    np.testing.assert_array_equal(order(seen), order(given))
    odd = {
        "c": [record(rng) | {"portrait": np.zeros((4, 4, 5), np.float16)}],
        "d": [record(rng) | {"latents": np.zeros((12, 6, 4, 4), np.float16)}],
        "e": [record(rng), record(rng) | {"latents": np.zeros((12, 6, 4, 4), np.float16)}],
        "f": [record(rng) | {"latents": record(rng)["latents"][:2]}],
    }
    for name, clips in odd.items():
        write_records(tmp_path / name, clips)
    for records, message in (
        ((folders[0], str(tmp_path / "c")), "c: of another size, or made by other encoders, than .*a: portrait is"),
        ((folders[0], str(tmp_path / "d")), "d: of another size, or made by other encoders, than .*a: latents is"),
        ((folders[0], str(tmp_path / "e")), "e: its records differ in the size of latents"),
        ((folders[0], str(tmp_path / "f")), "f: its clips have 2 latent frames, a window 3"),
        ((), "no folder"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(objective, records=records).dataset(0)


def test_a_clip_shorter_than_the_window_is_refused():
    """Cut short in silence, one process would run another program than the others."""
    rng = np.random.default_rng(0)
    clip = record(rng)
    frames = len(clip["latents"])
    with pytest.raises(InputError, match=f"a record has {frames} latent frames, a window {frames + 1}"):
        cut_window(clip, rng, length=frames + 1, mid_clip=0.5, speakers=1)


def test_total_loss_is_the_weighted_sum_of_its_parts():
    told = {name: jnp.asarray(x) for name, x in batch(2).items()}
    model, parts = draw_weights(DiT, TINY, 0), []
    for adaptive, motion in ((0.0, 0.0), (10.0, 0.0), (10.0, 2.0)):
        objective = CurriculumObjective(dit=TINY, records="", adaptive_weight=adaptive, motion_weight=motion)
        loss, scalars = jax.jit(objective.loss)(model, told, jax.random.key(1))
        parts.append((jnp.mean(loss), scalars))
    (base, _), (total, scalars), (moving, more) = parts
    assert scalars.keys() == {"base", "face"}
    assert more.keys() == {"base", "face", "motion"}
    np.testing.assert_allclose(base, scalars["base"], rtol=1e-5)
    np.testing.assert_allclose(total, scalars["base"] + 10 * scalars["face"], rtol=1e-5)
    np.testing.assert_allclose(moving, total + 2 * more["motion"], rtol=1e-5)


class Probe(DiT, pytree=False):
    """A denoiser that finds nothing and keeps what the loss hands it."""

    def __init__(self):
        self.config = TINY

    def encode_audio(self, steps, is_start):
        return jnp.zeros((*steps.shape[:2], 1, 1, 1))

    def __call__(self, latents, sigma, conditions):
        self.seen = latents, sigma, conditions
        return jnp.zeros_like(latents)


def test_the_loss_draws_noise_levels_and_drops_conditions_as_it_is_told():
    """logit(sigma) is N(log shift, sigma_scale^2); each condition is dropped by 1 - (1 - each)(1 - all)."""
    b, rng = 40_000, np.random.default_rng(0)
    told = {
        "latents": np.zeros((b, 1, 2, 2, 1)), "portrait": np.ones((b, 2, 2, 1)), "is_start": np.ones(b),
        "face_mask": np.ones((b, 2, 2)), "audio_mask": np.ones((b, 1, 2, 2)), "audio_steps": np.zeros((b, 1, 1, 1, 1)),
        "text_tokens": rng.normal(size=(b, 1, 1)), "text_pooled": np.ones((b, 1)), "image_tokens": np.zeros((b, 1, 1)),
    }  # fmt: skip
    told = {name: jnp.asarray(x, jnp.float32) for name, x in told.items()} | {"text_mask": jnp.ones((b, 1), bool)}
    objective = CurriculumObjective(dit=TINY, records="", shift=5.0, sigma_scale=1.5, drop_each=0.2, drop_all=0.1)
    probe = Probe()
    loss, _ = objective.loss(probe, told, jax.random.key(0))
    latents, sigma, conditions = probe.seen
    logit = np.log(sigma / (1 - sigma))
    np.testing.assert_allclose([logit.mean(), logit.std()], [np.log(5.0), 1.5], atol=0.03)
    # The latents are zero: what the network sees is sigma eps, and with a velocity of 0 the loss is |eps|^2.
    np.testing.assert_allclose(jnp.mean(jnp.square(latents), (1, 2, 3, 4)), jnp.square(sigma) * loss, rtol=1e-3)
    present = {
        "text": conditions.text_mask[:, 0], "pooled text": conditions.text_pooled[:, 0] > 0,
        "image": conditions.image_mask[:, 0], "portrait": conditions.portrait[:, 0, 0, 0] > 0,
        "start": conditions.is_start > 0, "audio": conditions.face_mask[:, 0, 0, 0] > 0,
    }  # fmt: skip
    dropped = {name: 1 - np.asarray(x, float).mean() for name, x in present.items()}
    np.testing.assert_allclose(list(dropped.values()), 1 - 0.8 * 0.9, atol=0.01)
    np.testing.assert_array_equal(present["text"], present["pooled text"])
    np.testing.assert_array_equal(present["image"], present["portrait"])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_13b_run_trains_windows_that_start_later(stage, tmp_path):
    """Half of them, as all but the first of a long video; clips without room for that are refused."""
    config = runpy.run_path(str(CONFIGS / f"magic_infinite_stage{stage}.py"))["config"]
    (window, _), rng = config.objective.windows[0], np.random.default_rng(0)
    for length in (window, window + 8):
        write_records(tmp_path / str(length), [record(rng, t=length) for _ in range(2)])
    objective = dataclasses.replace(config.objective, dit=TINY, windows=((window, 4),))
    with pytest.raises(InputError, match=f"{window} latent frames, as many as a window: none could start later"):
        dataclasses.replace(objective, records=str(tmp_path / str(window))).dataset(0)
    dataset = dataclasses.replace(objective, records=str(tmp_path / str(window + 8))).dataset(0)
    starts = np.concatenate([dataset[i]["is_start"] for i in range(100)])
    assert abs(starts.mean() - 0.5) < 0.1
    everywhere = np.concatenate([dataset[i]["audio_mask"].min((1, 2, 3)) for i in range(100)])
    assert config.objective.whole_mask == (0.0 if stage == 1 else 0.1)
    assert abs(everywhere.mean() - config.objective.whole_mask) < 0.05


def test_warm_start_keeps_stage_1_and_adds_audio(tmp_path, monkeypatch):
    stage1 = draw_weights(DiT, dataclasses.replace(TINY, audio=None), 5)
    old = nnx.state(stage1)
    monkeypatch.setattr("mi_jax.train.checkpoints._averages_of", lambda run: old)
    stage2 = at_start(CurriculumObjective(dit=TINY, records="", init_from="stage1"), jax.random.key(6))
    told = {name: jnp.asarray(x) for name, x in batch(2).items()}
    objective = CurriculumObjective(dit=TINY, records="")
    x, sigma = told["latents"].astype(jnp.float32), jnp.asarray([0.3, 0.8])
    conditions = objective.conditions(stage2, told)
    np.testing.assert_allclose(
        velocity(stage2, x, sigma, conditions),
        velocity(stage1, x, sigma, dataclasses.replace(conditions, audio=None)),
        atol=1e-6,
    )
    wider = dataclasses.replace(TINY, width=48, rope_axes=(8, 8, 8))
    with pytest.raises(InputError, match="the model wants"):
        at_start(CurriculumObjective(dit=wider, records="", init_from="stage1"), jax.random.key(6))


def test_a_shipped_model_is_started_from_by_its_name():
    shipped = load_part("puppet", "dit")
    started = at_start(CurriculumObjective(dit=shipped.config, records="", init_from="puppet"), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(started), nnx.state(shipped))


def test_stage_2_at_13b_and_720p_is_traced_without_an_array():
    """configs/magic_infinite_stage2.py at 720x1280x129: 33 x 90 x 160 latents, 118,800 video tokens."""
    config = runpy.run_path(str(CONFIGS / "magic_infinite_stage2.py"))["config"]
    objective = config.objective
    assert (config.steps, config.optimizer.learning_rate, objective.adaptive_weight) == (30_000, 1e-5, 10.0)
    shape = lambda *s, dtype=jnp.float16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    told = {
        "latents": shape(1, 33, 90, 160, 16),
        "portrait": shape(1, 90, 160, 16, dtype=jnp.float32),
        "is_start": shape(1, dtype=jnp.float32),
        "face_mask": shape(1, 90, 160, dtype=jnp.float32),
        "audio_mask": shape(1, 1, 90, 160, dtype=jnp.float32),
        "audio_steps": shape(1, 1, 8 * 33 + 8, 13, 768),
        "image_tokens": shape(1, 144, 4096),
        "text_tokens": shape(1, 256, 4096),
        "text_mask": shape(1, 256, dtype=bool),
        "text_pooled": shape(1, 768),
    }

    def step(key, told):
        graph, params = nnx.split(objective.init(key))
        halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        loss = lambda p: jnp.mean(objective.loss(nnx.merge(graph, p), told, key)[0])  # noqa: E731
        return jax.value_and_grad(loss)(halves)

    loss, grads = jax.eval_shape(step, jax.random.key(0), told)
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    sizes = [leaf.size for leaf in jax.tree.leaves(grads)]
    assert 12_810_991_680 < sum(sizes) < 14_500_000_000
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_samples_follow_the_velocity():
    """Twenty Euler steps along u = eps - x for a fixed x end at x."""
    goal = jax.random.normal(jax.random.key(0), (1, 2, 4, 4, 4))
    noise = jax.random.normal(jax.random.key(1), goal.shape)

    class Straight(nnx.Module):
        def __init__(self):
            self.goal = nnx.Param(goal)

        def __call__(self, x, sigma, conditions):
            return (x - self.goal[...]) / sigma.reshape(-1, 1, 1, 1, 1)

    np.testing.assert_allclose(euler(Straight(), noise, sigma_schedule(20, 3.0), None), goal, atol=1e-4)


def test_what_samples_need_is_looked_for_before_the_first_step(tmp_path):
    objective = CurriculumObjective(dit=TINY, records=str(tmp_path), sample_vae=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere: no such model"):
        train(
            TrainConfig(name="test", objective=objective, steps=1, optimizer=OptimizerConfig(learning_rate=0.1)),
            tmp_path / "run",
        )
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{}")
    objective = dataclasses.replace(objective, sample_vae=str(tmp_path / "part"))
    with pytest.raises(InputError, match="says nothing of 'vae'"):
        train(
            TrainConfig(name="test", objective=objective, steps=1, optimizer=OptimizerConfig(learning_rate=0.1)),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
