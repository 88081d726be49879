"""Plans: what programs move is counted exactly, memory is that of the shards, and bad requests are one line."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_dit import TALKING

from mi_jax import cli
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh, on_mesh
from mi_jax.models.flops import dit_flops
from mi_jax.plan import links, plan_sampling, plan_training, sampled_model
from mi_jax.plan.hlo import Collective, _group, _instruction, read_traffic
from mi_jax.plan.programs import training_batch, training_step
from mi_jax.plan.report import _refused
from mi_jax.plan.topologies import DEVICES, Topology, _installed, find_topology
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.dmd2 import DMD2Objective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

# Sizes of the puppets' encoders, little depth.
SHALLOW = dataclasses.replace(
    TALKING, text_dim=128, pooled_dim=96, double_depth=1, single_depth=2, heads=2, remat="none",
    audio=dataclasses.replace(TALKING.audio, input_dim=128, layers=5),
)  # fmt: skip
STAGE2 = TrainConfig(
    name="tiny",
    objective=CurriculumObjective(
        dit=SHALLOW, records="nowhere", windows=((3, 4), (5, 2)), window_weights=(0.5, 0.5), speakers=2
    ),
    steps=3,
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
SIZE = (32, 48)


# --- collectives of hand-made programs ------------------------------------------------------------------------------


def compiled(f, *shapes_and_specs, mesh):
    with jax.set_mesh(mesh):
        given = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in shapes_and_specs
        ]
        return jax.jit(f).lower(*given).compile().as_text()


def totals(text: str, devices: int) -> dict[str, tuple[int, float]]:
    traffic = read_traffic(text, devices)
    assert traffic.unknown_loops == 0
    found: dict[str, tuple[int, float]] = {}
    for c in traffic.collectives:
        times, received = found.get(c.kind, (0, 0.0))
        found[c.kind] = (times + c.times, received + c.received)
    return found


def test_every_kind_is_counted_as_often_as_its_loops_run():
    """5 x 3 turns around a ring of 4, 5 all-to-alls, and sums over another axis of 2 after the loop."""

    def program(x):
        def local(x):
            def inner(x, _):
                return jax.lax.ppermute(x, "seq", [(i, (i + 1) % 4) for i in range(4)]) * 1.5, None

            def outer(x, _):
                x = jax.lax.scan(inner, x, None, length=3)[0]
                return jax.lax.all_to_all(x, "seq", 1, 0, tiled=True).reshape(x.shape), None

            x = jax.lax.scan(outer, x, None, length=5)[0]
            whole = jax.lax.all_gather(x, "seq", tiled=True)
            part = jax.lax.psum_scatter(jnp.sin(whole), "data", tiled=True)
            return part, jax.lax.psum(x[:2], "data")

        return jax.shard_map(local, out_specs=(P("data", None), P("seq")), check_vma=False)(x)

    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)
    share = 16 * 32 * 4  # bytes of a device's own rows
    text = compiled(program, ((64, 32), P("seq", None)), mesh=mesh)
    assert totals(text, 8) == {
        "collective-permute": (15, 15 * share),
        "all-to-all": (5, 5 * share * 3 / 4),
        "all-gather": (1, 4 * share * 3 / 4),
        "reduce-scatter": (1, 4 * share / 2),
        "all-reduce": (1, 2 * (share / 8) / 2),
    }


def test_gathers_inside_a_scan_over_depth_count_for_every_layer():
    """Fully sharded parameters: 7 layers are gathered one by one, and nothing moves twice."""
    mesh = make_mesh(data=8)
    body = lambda x, w: (jnp.sin(x @ jax.reshard(w, P())), None)  # noqa: E731
    program = lambda ws, x: jax.lax.scan(body, x, ws)[0]  # noqa: E731
    text = compiled(program, ((7, 64, 64), P(None, "data", None)), ((8, 64), P("data")), mesh=mesh)
    assert totals(text, 8) == {"all-gather": (7, 7 * 64 * 64 * 4 * 7 / 8)}


def test_what_another_core_of_a_chip_does_is_counted():
    """A gather handed to a v7x chip's SparseCore, as libtpu writes it, and the computation that comes after it."""
    text = """\
%called_computation.1 (param_0: bf16[1,4]) -> bf16[8,4] {
  %param_0 = bf16[1,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,4]{1,0} all-gather(%param_0), replica_groups=[1,8]<=[8], dimensions={0}
}, execution_thread="sparsecore"

%fused_computation.1 (param_0: bf16[8,4]) -> bf16[8,4] {
  %param_0 = bf16[8,4]{1,0} parameter(0)
  ROOT %sine.1 = bf16[8,4]{1,0} sine(%param_0)
}

ENTRY %main.1 (x: bf16[1,4]) -> bf16[8,4] {
  %x = bf16[1,4]{1,0} parameter(0)
  %gather.start = ((bf16[1,4]{1,0}), bf16[8,4]{1,0}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called_computation.1
  %gather.done = bf16[8,4]{1,0} call-done(%gather.start)
  ROOT %sine = bf16[8,4]{1,0} fusion(%gather.done), kind=kLoop, calls=%fused_computation.1
}
"""  # noqa: E501
    assert totals(text, 8) == {"all-gather": (1, 8 * 4 * 2 * 7 / 8)}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=8,'b'=25], device_ids=([25,8]T(1,0)) {'a'}", tuple(range(8))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("source_target_pairs={{0,0},{1,3},{3,1}}", (1, 3)),
        ("replica_groups={}", tuple(range(8))),
    ],
)
def test_groups_in_every_spelling(groups, expected):
    op = _instruction(f"  ROOT %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {groups}, to_apply=%add")
    assert _group(op, 8) == expected


TEXT = """HloModule started, is_scheduled=true

%limit (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %start = ((f32[4,8]{1,0}, bf16[2]{0}), (f32[16,8]{1,0}, /*index=1*/bf16[8]{0})) all-gather-start(%x, %b), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = (f32[16,8]{1,0}, bf16[8]{0}) all-gather-done(%start)
  %kernel = f32[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={{
"of a kernel": "{ several lines }"
}}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %kernel)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %t = (s32[], f32[4,8]) tuple(%zero, %a)
  %while = (s32[], f32[4,8]) while(%t), condition=%limit, body=%body
  ROOT %r = f32[4,8]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_compilers_that_write_no_trip_count_and_start_collectives_early():
    """As TPU's: the count is in the condition, results follow operands in a start's tuple, kernels bring texts along.
    The kernel writes 128 bytes; what it reads is on the chip (S(1)). The gather writes its results."""
    traffic = read_traffic(TEXT, 4)
    assert traffic.collectives == [Collective("all-gather", 16 * 8 * 4 + 8 * 2, (0, 1, 2, 3), 6)]
    assert traffic.hbm == 6 * (128 + 16 * 8 * 4 + 8 * 2)
    assert read_traffic(TEXT.replace("direction=LT", "direction=NE"), 4).unknown_loops == 1


def test_memory_traffic_of_slices_is_that_of_the_slices():
    """A scan reads its stacked input once in all, not once in every turn."""
    program = lambda ws: jax.lax.scan(lambda x, w: (x * w, x + w), jnp.zeros((256,)), ws)  # noqa: E731
    text = jax.jit(program).lower(jax.ShapeDtypeStruct((64, 256), jnp.float32)).compile().as_text()
    stacked = 64 * 256 * 4
    traffic = read_traffic(text, 1).hbm
    assert 4 * stacked <= traffic <= 10 * stacked  # 64 times as much, were all of it counted in every turn


# --- links ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    process_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)


def test_seconds_on_gpus():
    kind = DEVICES["h100"]
    place = Topology(name="h100:2x8", kind=kind, devices=[Chip(i // 8) for i in range(16)], platform="cuda")
    size = 8 * 10**9
    gather = Collective("all-gather", size, tuple(range(8)), 2)
    assert links.span(gather, place) == "in host"
    assert links.seconds(gather, place) == pytest.approx(2 * size * 7 / 8 / 450e9)
    across = Collective("all-gather", size, (0, 1, 8, 9), 1)
    assert links.span(across, place) == "2 hosts"
    assert links.seconds(across, place) == pytest.approx(size / 2 / 2 / 50e9)  # half comes from outside, by two ports
    everyone = Collective("all-gather", size, tuple(range(16)), 1)
    assert links.seconds(everyone, place) == pytest.approx(size * 15 / 16 / 450e9)  # by eight: NVLink takes longer
    pair = Collective("all-reduce", size, (0, 8), 1)
    assert links.seconds(pair, place) == pytest.approx(2 * size / 2 / 50e9)
    swap = Collective("all-to-all", size, tuple(range(16)), 1)
    assert links.seconds(swap, place) == pytest.approx(size / 2 / 50e9)


def test_seconds_on_a_torus():
    """How to Scale Your Model: an all-gather over a ring takes its bytes / (2 links), an all-to-all a quarter."""
    chips = [Chip(coords=(x, y, z)) for x in range(4) for y in range(2) for z in range(4)]
    place = Topology(name="v5p:4x2x4", kind=DEVICES["v5p"], devices=chips, platform="tpu")
    ring = tuple(i for i, chip in enumerate(chips) if chip.coords[:2] == (0, 0))
    size = 10**9
    gather = Collective("all-gather", size, ring, 1)
    assert links.span(gather, place) == "torus 4"
    assert links.seconds(gather, place) == pytest.approx(size * 3 / 4 / 180e9)
    assert links.seconds(Collective("all-to-all", size // 4, ring, 1), place) == pytest.approx(size / 4 / 180e9)
    everything = Collective("all-gather", size, tuple(range(32)), 1)
    assert links.span(everything, place) == "torus 4x2x4"
    assert links.seconds(everything, place) == pytest.approx(size * 31 / 32 / (90e9 * 5))  # two rings and a line


# --- plans ----------------------------------------------------------------------------------------------------------


def test_the_batch_is_the_dataset_s_own_and_the_largest():
    batch = training_batch(STAGE2, SIZE)
    assert batch["latents"].shape == (4, 3, 4, 6, 16)
    assert batch["audio_mask"].shape == (4, 2, 4, 6)
    assert batch["text_tokens"].shape == (4, 32, 128)
    with pytest.raises(InputError, match=r"nowhere: no such records; --size"):
        training_batch(STAGE2)


@pytest.mark.long
def test_a_training_step_takes_what_its_shards_are():
    made = plan_training(STAGE2, "cpu:8", data=4, seq=2, size=SIZE)
    mesh = make_mesh(data=4, seq=2)
    batch = training_batch(STAGE2, SIZE)
    with training_step(STAGE2, batch, mesh) as (_, arguments):
        leaves = jax.tree.leaves(arguments)
    shards = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
    whole = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    assert made.memory.arguments == sum(shards)
    assert sum(shards) < 0.2 * sum(whole)  # nearly everything is spread over all eight
    # The state is donated; beside it come five numbers to log, and where each of the outputs is.
    new = made.memory.outputs - made.memory.aliased
    assert 0 <= new < 100 + 8 * len(leaves)
    assert made.memory.peak == made.memory.arguments + made.memory.temporaries + new
    assert made.memory.fits
    flops = dit_flops(SHALLOW, 3, 4, 6, 32 + 9, speakers=2, encode=True)
    assert made.model_flops == 4 * flops.training
    assert {m.kind for m in made.moved} >= {"all-gather", "all-reduce", "all-to-all"}
    assert made.as_json()["mfu_ceiling"] <= 1


@pytest.mark.parametrize(("windows", "data", "seq", "told"), [(6, 1, 1, True), (6, 2, 2, True), (1, 2, 2, False)])
def test_a_sampler_s_step(windows, data, seq, told):
    """Two branches of guidance of one window; one device needs no mesh, and four find the one for a single window. As
    often as there are windows and levels."""
    model = dataclasses.replace(sampled_model(STAGE2.objective), height=32, width=48, guidance_text=0.0)
    lengths = {"latent_frames": 3 + 2 * windows, "window": 5, "overlap": 3}
    mesh = {"data": data, "seq": seq} if told else {}
    made = plan_sampling(model, f"cpu:{data * seq}", **mesh, **lengths)
    assert (made.data, made.seq) == (data, seq)
    flops = dit_flops(SHALLOW, 5, 4, 6, 32 + 9)
    assert made.model_flops == 2 * flops.forward
    assert made.executed_flops == 2 * flops.forward / (data * seq)
    assert (made.calls, made.video_seconds) == (windows * model.steps, (4 * (2 + 2 * windows) + 1) / 25)
    assert ("all-to-all" in {m.kind for m in made.moved}) == (seq > 1)


def test_a_mesh_of_one_device_is_none_to_a_program():
    with on_mesh(make_mesh(devices=jax.devices()[:1])):
        x = jax.jit(lambda: jnp.concatenate([jnp.ones(2), jnp.zeros(1)]))()
        assert jax.typeof(x).sharding.spec == P(None)


# --- the command ----------------------------------------------------------------------------------------------------

CONFIG = """
import dataclasses
from mi_jax.models.dit import DiTConfig
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig

sizes = {"width": 48, "heads": 2, "rope_axes": (4, 10, 10), "double_depth": 1, "single_depth": 2}
dit = dataclasses.replace(DiTConfig.puppet(), **sizes)
objective = CurriculumObjective(dit=dit, records="nowhere", windows=((3, 2),), window_weights=(1.0,))
config = TrainConfig(name="trial", objective=objective, steps=1, optimizer=OptimizerConfig(learning_rate=1e-3))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("trial.py").write_text(CONFIG)
    return "trial.py"


def test_what_does_not_fit_is_said_by_how_much(config, capsys, monkeypatch):
    monkeypatch.setitem(DEVICES, "cpu", dataclasses.replace(DEVICES["cpu"], memory=2**20))
    where = ["--topology", "cpu:1", "--sample", "32x48", "--latent-frames", "3"]
    assert cli.main(["plan", config, *where, "--guidance-audio", "0", "--guidance-text", "0"]) == 2
    table = capsys.readouterr().out
    assert table.startswith("1 pass of 32x48, windows of 3 latent frames, 1 branches on cpu:1: 1 x simulated")
    assert re.search(r"all at the same time +[0-9.]+   MFU [0-9.]+%: the ceiling", table)
    peak = float(re.search(r"peak +([0-9.]+) GiB", table)[1])
    short = float(re.search(r"DOES NOT FIT: ([0-9.]+) GiB too many", table)[1])
    assert short == pytest.approx(peak - 2**-10, abs=0.011)


@pytest.mark.long
@pytest.mark.parametrize("rank", [None, 4])
def test_each_turn_of_a_distillation_is_planned(rank):
    """All weights: a student beside the teacher, one more set. Factors: the teacher's alone. Evaluations are counted
    with and without a backward pass."""
    told = {"dit": SHALLOW, "records": "nowhere", "windows": ((3, 2),), "window_weights": (1.0,), "speakers": 2}
    distil = DMD2Objective(
        **told, teacher="nowhere", student_rank=rank, critic_rank=4, guidance_audio=1.0, guidance_text=1.0
    )
    config = dataclasses.replace(STAGE2, objective=distil)
    plain = plan_training(dataclasses.replace(config, objective=CurriculumObjective(**told)), "cpu:1", size=SIZE)
    whole = plain.parameters["model"]
    plans = {turn: plan_training(config, "cpu:1", size=SIZE, turn=turn) for turn in ("student", "critic")}
    critic = plans["critic"].parameters
    assert critic == plans["student"].parameters
    assert critic["frozen"] == whole
    assert critic["student"] == (whole if rank is None else critic["critic"])
    assert 0 < critic["critic"] < whole / 4
    forward = plain.model_flops / 3
    assert plans["critic"].model_flops == pytest.approx((1.5 + 1 + 3) * forward)
    assert plans["student"].model_flops == pytest.approx((1.5 + 1 + 3 + 2 * 3) * forward)
    assert f"frozen {whole:,}" in plans["critic"].table()
    assert "critic" in plans["critic"].program
    with pytest.raises(InputError, match="--turn is teacher, none of student, critic"):
        plan_training(config, "cpu:1", size=SIZE, turn="teacher")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--topology", "h300:8"], "no topology 'h300:8'; there are h100:1"),
        (["--topology", "cpu:0"], "no topology 'cpu:0'"),
        (["--topology", "v5p-9"], "no topology 'v5p-9'; of v5p there are v5p-8, v5p-16"),
        (["--topology", "h100:4x9"], "at most 8 GPUs a host and 256 in all"),
        (["--topology", "cpu:4", "--data", "3", "--seq", "2"], "data=3 x seq=2 needs 6 devices, there are 4"),
        (["--topology", "cpu:4", "--seq", "0"], "--seq is 0, must lie in"),
        (["--topology", "cpu:2", "--sample", "32x48", "--speakers", "-1"], "--speakers is -1"),
        (["--topology", "cpu:4"], "nowhere: no such records; --size HxW"),
        (["--topology", "cpu:4", "--size", "32x48"], "a batch of 2 clips does not divide over data=4"),
        (["--topology", "cpu:4", "--size", "32x48", "--objective.windows", "3", "7"], "a batch of 7 clips does not"),
        (["--topology", "cpu:2", "--size", "32"], "--size is '32', must be HEIGHTxWIDTH"),
        (["--topology", "cpu:2", "--size", "32x1000000000"], "--size is 1000000000, must lie in"),
        (["--topology", "cpu:2", "--nonsense", "3"], "--nonsense"),
        (["--topology", "cpu:2", "--sample", "32x48", "--overlap", "1"], "overlap"),
    ],
)
def test_bad_requests_are_one_line_and_code_2(config, capsys, argv, said):
    assert cli.main(["plan", config, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("mi-jax: error: ")
    assert said in line


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of 31.25G hbm. Exceeded by",
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.50G) exceeds "
        + "available HBM (31.25G).",
    ],
)
def test_compilers_that_refuse_what_does_not_fit(message):
    memory = _refused(message, 2**30, DEVICES["v6e"].memory)
    assert memory.peak == 40.5 * 2**30
    assert memory.available == 31.25 * 2**30
    assert not memory.fits
    with pytest.raises(InputError, match="does not compile: INTERNAL: a fault"):
        _refused("INTERNAL: a fault\nof two lines", 0, 1)


def test_other_models_take_no_overrides(capsys):
    assert cli.main(["plan", "puppet", "--topology", "cpu:1", "--steps", "3"]) == 2
    assert "--steps 3: no such option" in capsys.readouterr().err
    assert cli.main(["plan", "nobody", "--topology", "cpu:1"]) == 2
    assert "nobody: no such model" in capsys.readouterr().err


# --- real machines, where what compiles for them is installed --------------------------------------------------------


PROGRAM = """
import dataclasses, json, sys
from mi_jax.mesh import make_mesh
from mi_jax.plan import plan_sampling, sampled_model
from mi_jax.plan.programs import training_batch, training_step
from mi_jax.plan.topologies import find_topology
from mi_jax.train.objective import load_config

topology, file = sys.argv[1:]
config = load_config(file, ["--objective.windows", "3", "1", "--compute-dtype", "bfloat16"])
wide = dataclasses.replace(config.objective.dit, width=512, heads=4, rope_axes=(32, 48, 48), unroll=1)
config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, dit=wide))
place = find_topology(topology)
mesh = make_mesh(1, len(place.devices), place.devices)
with training_step(config, training_batch(config, (32, 48)), mesh) as (lowered, _):
    print(lowered.as_text())
if topology.startswith("h100"):
    model = dataclasses.replace(sampled_model(config.objective), dtype="bfloat16", guidance_audio=0.0)
    print(json.dumps(plan_sampling(model, topology, seq=2, latent_frames=3).as_json()))
"""


@pytest.mark.parametrize(
    ("topology", "kernels"),
    [
        pytest.param(
            name, kernels, marks=pytest.mark.skipif(not _installed(module), reason=f"{module} is not installed")
        )
        for name, module, kernels in (
            ("h100:2", "jax_plugins.xla_cuda12", ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]),
            ("v5p-8", "libtpu", ["splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]),
        )
    ],
)
def test_real_machines_get_their_kernels(config, topology, kernels):
    """A stage-2 step in bf16, and on GPUs the plan of a sampler; in a process where plug-ins print what they like."""
    argv = [sys.executable, "-c", PROGRAM, topology, config]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert [kernel for kernel in kernels if kernel not in run.stdout] == []
    if topology == "h100:2":
        made = json.loads(run.stdout.splitlines()[-1])
        assert (made["device"], made["devices"], made["fits"]) == ("H100 SXM", 2, True)
        assert made["memory"]["available"] == DEVICES["h100"].usable
        assert {row["kind"] for row in made["moved"]} >= {"all-gather", "all-to-all"}
        assert {row["span"] for row in made["moved"]} == {"in host"}


def test_what_compiles_for_a_machine_must_be_there(monkeypatch):
    monkeypatch.setattr("mi_jax.plan.topologies._installed", lambda module: False)
    with pytest.raises(InputError, match=r"needs libtpu \(pip install 'mi-jax\[plan\]'\)"):
        find_topology("v5p-8")
