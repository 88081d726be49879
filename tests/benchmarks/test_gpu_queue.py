"""The GPU queue's scripts at toy size on a CPU: what is rehearsed here needs no minute of a GPU to find its typos."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_avatar import draw_weights

from mi_jax.avatar.folders import load_encoders, load_part, save_avatar
from mi_jax.models.dit import DiT
from mi_jax.models.vae import VAE
from mi_jax.sample.avatar import load

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
QUEUE = REPOSITORY / "benchmarks" / "gpu"


def run(script: str, *arguments, **environment) -> str:
    command = ["bash" if script.endswith(".sh") else sys.executable, str(QUEUE / script), *map(str, arguments)]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    path = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}  # scripts call python3
    env = os.environ | quick | path | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    """The shipped puppets with a VAE and a denoiser of a few channels."""
    folder = tmp_path_factory.mktemp("base") / "puppet"
    config, encoders = load_encoders("puppet")
    vae = dataclasses.replace(config.vae, widths=(16, 16, 16, 16), encoder_blocks=1, decoder_blocks=1)
    dit = dataclasses.replace(
        config.dit, width=32, heads=2, double_depth=1, single_depth=2, rope_axes=(4, 6, 6), unroll=1
    )
    config = dataclasses.replace(config, vae=vae, dit=dit)
    encoders = dataclasses.replace(encoders, vae=draw_weights(VAE, vae, 0))
    save_avatar(folder, config, encoders, draw_weights(DiT, dit, 1), dtype=np.float16)
    return folder


@pytest.mark.long
def test_puppets_are_drawn_trained_and_collected(base, tmp_path):
    """Both modules move, what does not is the base's, and the folder that comes out loads."""
    run("draw.py", tmp_path / "clips", "--workers", 2, "--count", 4)
    (tmp_path / "out").mkdir()
    asked = tmp_path / "out" / "save"  # as puppets.sh asks for the newest weights
    asked.touch()
    run("puppets.py", "--toy", "--base", base, "--clips", tmp_path / "clips", "--out", tmp_path / "out")
    assert not asked.exists()
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert [steps for _, steps, _ in log["vae"]] == [1, 2]
    assert [steps for _, steps, _ in log["dit"]] == [1, 2]
    assert all(scalars["skipped"] == 0 and scalars["lpips"] > 0 for _, _, scalars in log["vae"])
    run("collect.py", tmp_path / "out", tmp_path / "made", "--base", base)
    for name, moved in (("vae", True), ("dit", True), ("wav2vec2", False), ("mllm", False)):
        before, after = (jax.tree.leaves(nnx.state(load_part(folder, name))) for folder in (base, tmp_path / "made"))
        change = max(float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True))
        assert (change > 0) == moved, name
        assert change < 0.1, name


@pytest.mark.long
def test_a_student_is_distilled_and_its_factors_load(base, tmp_path):
    """Records, both turns, export: the file changes the teacher when it is loaded. A second call goes on, and ends by
    the clock, whole."""
    config = tmp_path / "config.py"
    config.write_text(
        "import dataclasses, runpy\nfrom mi_jax.avatar.folders import part_config\n"
        f"c = runpy.run_path({str(REPOSITORY / 'configs' / 'puppet_dmd2.py')!r})['config']\n"
        f"o = dataclasses.replace(c.objective, dit=part_config({str(base)!r}, 'dit'), windows=((3, 2),), "
        "window_weights=(1.0,), student_rank=2, critic_rank=2, gan_taps=(('double', 0),))\n"
        "config = dataclasses.replace(c, objective=o)\n"
    )
    told = {"BASE": base, "CONFIG": config, "RUN": tmp_path / "run", "CLIPS": 2, "DUETS": 1, "LIMIT": 3600}
    run("student.sh", tmp_path / "out", "--steps", 5, "--on-device", 2, **told)
    dit, changed = load_part(base, "dit"), load(base, lora=[tmp_path / "out" / "four-steps.safetensors"], devices=1).dit
    before, after = (jax.tree.leaves(nnx.state(x)) for x in (dit, changed))
    assert max(float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True)) > 0
    run("student.sh", tmp_path / "out", "--steps", 10**6, "--on-device", 2, **told | {"LIMIT": 90})
    kept = [int(path.name) for path in (tmp_path / "run" / "student" / "checkpoints").iterdir() if path.name.isdigit()]
    assert 5 < max(kept) < 10**6


def test_attention_is_held_against_the_formula(tmp_path):
    cases = ("padded", "no key in some")
    run("attention.py", tmp_path / "out.json", "--kernels", "xla", "--cases", *cases)
    report = json.loads((tmp_path / "out.json").read_text())
    for case in cases:
        told = report[f"xla: {case}"]
        assert told["finite"]
        assert max(told["values"], told["denominators"], *told["gradients"]) < 1e-5
