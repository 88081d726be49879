"""Windows cut on the device out of a pool are those that the host cuts out of the records."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_records import TINY, record

from mi_jax.data.records import RecordSource, write_records
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh, on_mesh, shard_parameters
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.pool import pool_on
from mi_jax.train.state import init_state, make_steps, split_model
from mi_jax.train.turns import OptimizerConfig
from mi_jax.train.windows import cut_window, cut_windows, draw_windows, masks_move, stack_clips

CLIPS = [(5, 1), (9, 2), (7, 1), (5, 2)]  # latent frames, speakers
SPEAKERS = 3


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [record(rng, *size) for size in CLIPS]


@pytest.fixture(scope="module")
def sources(clips, tmp_path_factory):
    """In two folders: the clips of one differ in length and speakers, the other's are alike."""
    folder = tmp_path_factory.mktemp("records")
    write_records(folder / "a", clips[:3])
    write_records(folder / "b", clips[3:])
    return [RecordSource(folder / name) for name in "ab"]


@pytest.fixture(scope="module")
def pool(sources):
    return jax.tree.map(jnp.asarray, stack_clips(sources, longest_window=5, speakers=SPEAKERS))


def host_window(clip, start, everywhere, **given):
    """`cut_window`'s, of a generator that draws this start."""
    chances = {"mid_clip": float(start > 0), "whole_mask": float(everywhere)}
    windows = (cut_window(clip, np.random.default_rng(seed), **given, **chances) for seed in itertools.count())
    frames = clip["latents"][start : start + given["length"]]
    return next(window for window in windows if np.array_equal(window["latents"], frames))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Clips of the same sizes, of which the second and the last have masks that move, and their two folders."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("mixed")
    clips = [record(rng, *size, moving=i % 2 == 1) for i, size in enumerate(CLIPS)]
    write_records(folder / "a", clips[:3])
    write_records(folder / "b", clips[3:])
    return clips, [RecordSource(folder / name) for name in "ab"]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("speakers", [0, SPEAKERS])
@pytest.mark.parametrize("length", [3, 5])
def test_a_window_of_the_pool_is_that_of_the_record(clips, sources, mixed, length, speakers, moving):
    """Of every clip, from every start, to the bit and the dtype."""
    clips, sources = mixed if moving else (clips, sources)
    pool = jax.tree.map(jnp.asarray, stack_clips(sources, longest_window=length, speakers=speakers))
    wanted = [
        (i, start, whole)
        for i, (frames, voices) in enumerate(CLIPS)
        for start in range(frames - length + 1)
        for whole in ([False, True] if voices == 1 and speakers else [False])
    ]
    cut = jax.jit(cut_windows, static_argnames="length")(pool, *map(jnp.asarray, zip(*wanted)), length=length)
    for row, (i, start, whole) in enumerate(wanted):
        expected = host_window(clips[i], start, whole, length=length, speakers=speakers, moving=moving)
        assert cut.keys() == expected.keys()
        for name, x in expected.items():
            assert cut[name].dtype == x.dtype
            np.testing.assert_array_equal(cut[name][row], x, err_msg=f"{name} of clip {i} from {start}")


def test_masks_that_move_are_cut_as_the_latents_are_and_others_repeated(mixed):
    (still, moving, *_), sources = mixed
    assert masks_move(sources)
    for start in (0, 2):
        window = host_window(moving, start, False, length=4, speakers=SPEAKERS)
        expected = moving["face_mask"][:, start : start + 4]
        assert not np.array_equal(expected[:, 0], expected[:, 1])
        np.testing.assert_array_equal(window["face_mask"], expected.max(0))
        np.testing.assert_array_equal(window["audio_mask"][:2], expected)
        assert not window["audio_mask"][2].any()
    repeated, plain = (host_window(still, 1, False, length=4, speakers=2, moving=m) for m in (True, False))
    for name in ("face_mask", "audio_mask"):
        assert repeated[name].shape == (*plain[name].shape[:-2], 4, 4, 4)
        np.testing.assert_array_equal(repeated[name], np.stack([plain[name]] * 4, axis=-3))


def test_masks_of_another_length_than_the_latents_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    short = record(rng, moving=True)
    short["face_mask"] = short["face_mask"][:, :7]
    fault = "face_mask has 7 latent frames, its latents 9"
    with pytest.raises(InputError, match=fault):
        cut_window(short, rng, length=3, mid_clip=0.5, speakers=1)
    with pytest.raises(InputError, match="face_mask has 2 axes"):
        cut_window(short | {"face_mask": np.ones((4, 4), np.float32)}, rng, length=3, mid_clip=0.5, speakers=1)
    write_records(tmp_path / "alone", [short])
    write_records(tmp_path / "among", [record(rng), short])
    with pytest.raises(InputError, match=fault):
        stack_clips([RecordSource(tmp_path / "among")], longest_window=3, speakers=1)
    objective = CurriculumObjective(dit=TINY, records=str(tmp_path / "alone"), windows=((3, 2),))
    with pytest.raises(InputError, match="alone: its face masks have 7 latent frames, its latents 9"):
        objective.dataset(0)


def test_a_pool_keeps_the_records_dtypes_and_each_clips_length(clips, pool):
    assert pool["frames"].tolist() == [frames for frames, _ in CLIPS]
    assert pool["voices"].tolist() == [voices for _, voices in CLIPS]
    assert {pool[name].dtype for name in ("latents", "portrait", "audio_steps", "text_tokens")} == {np.dtype("f2")}
    assert pool["latents"].shape[:2] == (4, 9)
    assert pool["audio_steps"].shape[:3] == (4, SPEAKERS, 8 * 9 + 8)
    assert not pool["latents"][0, 5:].any()


def test_draws_have_the_shares_of_the_config_and_stay_within_the_clip(clips, pool):
    """Of 4,000 windows, each share to four standard deviations."""
    draw = jax.jit(draw_windows, static_argnames=("length", "batch", "mid_clip", "face_masked", "whole_mask"))
    drawn = draw(pool, jax.random.key(0), length=5, batch=4000, mid_clip=0.3, whole_mask=0.2)
    within = lambda share, n: pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)  # noqa: E731
    first = np.stack([clip["portrait"].ravel()[0] for clip in clips]).astype(np.float32)
    clip = np.argmin(np.abs(np.asarray(drawn["portrait"])[:, 0, 0, :1] - first), axis=1)
    starts = np.asarray([
        next(s for s in range(5) if np.array_equal(x, clips[i]["latents"][s : s + 5]))
        for i, x in zip(clip, np.asarray(drawn["latents"]))
    ])  # fmt: skip
    whole = np.asarray(drawn["audio_mask"])[:, 0].min((1, 2)) == 1
    for i, (frames, voices) in enumerate(CLIPS):
        own = clip == i
        assert own.mean() == within(0.25, 4000)
        room = frames - 5
        assert (starts[own] > 0).mean() == within(0.3 if room else 0.0, own.sum())
        for start in range(1, room + 1):
            assert (starts[own] == start).mean() == within(0.3 / room, own.sum())
        assert whole[own].mean() == within(0.2 if voices == 1 else 0.0, own.sum())
    np.testing.assert_array_equal(np.asarray(drawn["is_start"]), starts == 0)
    unmasked = draw(pool, jax.random.key(0), length=5, batch=64, mid_clip=0.3, face_masked=False)
    told = np.asarray(unmasked["audio_mask"])
    assert set(told.min((2, 3)).sum(1)) == {1, 2}  # everywhere, of those who are there
    np.testing.assert_array_equal(told.min((2, 3)), told.max((2, 3)))


@pytest.mark.parametrize(("data", "seq"), [(4, 2), (1, 8)])
def test_each_device_draws_its_own_rows_of_one_batch(pool, data, seq):
    draw = lambda pool, key: draw_windows(pool, key, length=3, batch=8, mid_clip=0.5, whole_mask=0.5)  # noqa: E731
    alone = jax.jit(draw)(pool, jax.random.key(3))
    mesh = make_mesh(data=data, seq=seq)
    with jax.set_mesh(mesh), jax.remove_size_one_mesh_axis_from_type(True):
        spread = jax.jit(draw)(jax.device_put(pool, P()), jax.random.key(3))
        for name, x in spread.items():
            assert {shard.data.shape[0] for shard in x.addressable_shards} == {8 // data}
            np.testing.assert_array_equal(x, alone[name], err_msg=name)
        if data > 1:
            with pytest.raises(InputError, match=f"a batch of 6 does not divide over data={data}"):
                draw_windows(pool, jax.random.key(3), length=3, batch=6, mid_clip=0.5)


def test_what_does_not_fit_a_window_or_the_speakers_is_refused(sources):
    with pytest.raises(InputError, match="a: record 0 has 5 latent frames, a window 7"):
        stack_clips(sources, longest_window=7, speakers=2)
    with pytest.raises(InputError, match="a record has 2 speakers, the objective takes 1"):
        stack_clips(sources, longest_window=5, speakers=1)


@pytest.mark.parametrize("moving", [False, True])
def test_the_objective_draws_each_of_its_kinds_as_its_dataset_gives_them(sources, mixed, moving):
    sources = mixed[1] if moving else sources
    objective = CurriculumObjective(
        dit=TINY, records=tuple(str(source.directory) for source in sources), speakers=2, windows=((3, 4), (4, 2)),
        window_weights=(0.7, 0.3),
    )  # fmt: skip
    assert objective.kinds() == (0.7, 0.3)
    assert dataclasses.replace(objective, windows=((3, 4),)).kinds() == (1.0,)
    pool = jax.tree.map(jnp.asarray, objective.pool())
    kinds = [jax.eval_shape(lambda kind=kind: objective.draw(pool, jax.random.key(0), kind)) for kind in range(2)]
    read = {len(batch["latents"]): batch for batch in map(objective.dataset(0).__getitem__, range(12))}
    for kind in kinds:
        batch = read[len(kind["latents"])]
        assert batch["audio_mask"].ndim == (5 if moving else 4)
        assert {name: (x.shape, x.dtype) for name, x in kind.items()} == {
            name: (x.shape, x.dtype) for name, x in batch.items()
        }


@pytest.mark.long
def test_calls_of_several_steps_are_traced_on_a_mesh(sources):
    """What is drawn there, and the step, are compared with one device's elsewhere."""
    objective = CurriculumObjective(
        dit=dataclasses.replace(TINY, double_depth=1, single_depth=2), windows=((3, 4),), adaptive_weight=10.0,
        records=tuple(str(source.directory) for source in sources), speakers=2,
    )  # fmt: skip
    config = TrainConfig(
        name="test", objective=objective, steps=3, optimizer=OptimizerConfig(learning_rate=1e-3), on_device=3
    )
    graph, params, _ = split_model(nnx.eval_shape(objective.init, jax.random.key(0)), objective)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    mesh = make_mesh(data=4, seq=2)
    with on_mesh(mesh):
        start = jax.jit(lambda params: init_state(config, params, jax.random.key(1)))
        state = start(shard_parameters(params, mesh))
        after, metrics = make_steps(config, graph).lower(state, {}, pool_on(mesh, objective), 0, 3).out_info
    assert metrics["face"].shape == (3,)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
