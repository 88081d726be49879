"""Benches: what they refuse, what they write, and that what they time is the model. Never a timing."""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mi_jax import cli
from mi_jax.bench import measure, rival, run, workloads
from mi_jax.errors import InputError
from mi_jax.models import tiling
from mi_jax.models.dit import DiT
from mi_jax.models.vae import VAE, VAEConfig

SMALL = ["--height", "32", "--width", "48", "--latent-frames", "2", "--repeats", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A small matrix product, and programs cached in a folder of this test's own."""
    monkeypatch.setattr(measure, "CEILING_SIZE", {"cpu": 256})
    told = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    yield
    jax.config.update("jax_compilation_cache_dir", told)


def refused(capsys, *argv: str) -> str:
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dit", "--preset", "pupet"], "no preset 'pupet'; there are puppet, "),
        (["nothing"], "invalid choice"),
        (["dit", "--height", "100"], "height is 100 pixels, must be a multiple of 16"),
        (["vae", "--width", "100"], "width is 100 pixels, must be a multiple of 8"),
        (["step", "--latent-frames", "0"], "--latent-frames is 0"),
        (["step", "--batch", "0"], "batch is 0"),
        (["dit", "--repeats", "0"], "repeats is 0"),
        (["dit", "--attention", "cudnn"], "attention cudnn needs an NVIDIA GPU"),
        (["sampler", "--steps", "0"], "--steps is 0, must lie in"),
        (["sampler", "--overlap", "2"], "overlap of 2"),
        (["vae", "--against", "diffusers"], "runs dit and step, not vae"),
        (["dit", "--against", "diffusers"], "diffusers has no audio attention"),
    ],
)
def test_bad_input_is_one_line(capsys, argv, said):
    assert said in refused(capsys, *argv)


def test_a_folder_that_cannot_be_written_is_found_first(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "bench", lambda *_: pytest.fail("the long work began"))
    (tmp_path / "file").write_text("")
    assert "file: cannot be written" in refused(capsys, "dit", "--out", str(tmp_path / "file"))


def test_a_missing_rival_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, "dit", "--preset", "puppet-stage1", "--against", "diffusers")
    assert "needs torch and diffusers: pip install 'mi-jax[test]'" in line


def check(result: dict, flops: float) -> None:
    assert result["tflop"] == pytest.approx(flops / 1e12)
    assert len(result["seconds"]) == result["repeats"] == 2
    numbers = [*result["seconds"], result["median_seconds"], result["tflop_per_second"], result["mfu"]]
    numbers += [result["compile"]["seconds"], result["compile"]["warm_seconds"], *result["memory"].values()]
    assert all(math.isfinite(number) and number > 0 for number in numbers)


@pytest.mark.long
def test_a_bench_writes_what_it_prints(capsys, tmp_path, monkeypatch):
    vae = dataclasses.replace(VAEConfig.puppet(), widths=(12, 16, 16, 16), decoder_blocks=1)
    preset = dataclasses.replace(workloads.presets()["puppet"], vae=vae)
    monkeypatch.setattr(workloads, "presets", lambda: {"puppet": preset})
    assert cli.main(["bench", "vae", *SMALL, "--json", "--out", str(tmp_path / "results")]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = (tmp_path / "results").iterdir()
    assert json.loads(path.read_text()) == printed
    assert path.name.startswith(printed["machine"]["date"][:10])
    assert path.name.endswith("_vae_puppet_float32.json")
    encode, decode = printed["results"]
    assert (encode["work"], decode["work"], encode["sizes"]["frames"]) == ("encode", "decode", 5)
    for result, count, tile in (
        (encode, workloads.vae_encode_flops, (5, 32, 48)),
        (decode, workloads.vae_decode_flops, (2, 4, 6)),
    ):
        check(result, count(preset.vae, tile))
    # Both programs are in the cache now: the same bench again finds them there.
    jax.clear_caches()
    assert cli.main(["bench", "vae", *SMALL, "--json"]) == 0
    assert all(result["compile"]["from_cache"] for result in json.loads(capsys.readouterr().out)["results"])


@pytest.mark.long
def test_a_step_against_diffusers(capsys, monkeypatch):
    """Both have the same parameters to train: the child process runs the same model."""
    sizes = {"width": 48, "heads": 2, "rope_axes": (4, 10, 10), "double_depth": 1, "single_depth": 2, "unroll": 1}
    shallow = dataclasses.replace(workloads.presets()["puppet-stage1"].dit, **sizes)
    tiny = dataclasses.replace(workloads.presets()["puppet-stage1"], dit=shallow)
    monkeypatch.setattr(workloads, "presets", lambda: {"tiny": tiny})
    assert cli.main(["bench", "step", "--preset", "tiny", "--against", "diffusers", *SMALL, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (result,) = record["results"]
    check(result, 3 * workloads.dit_flops(shallow, 2, 4, 6, text_tokens=41).forward)
    theirs = result["against"]
    state = nnx.state(nnx.eval_shape(lambda: DiT(shallow, rngs=nnx.Rngs(0))))
    assert theirs["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state))
    assert theirs["threads"] == rival.cores()
    assert len(theirs["seconds"]) == 2
    assert theirs["times_as_long"] > 0


def test_a_rival_that_fails_says_why():
    told = rival.spec("dit", workloads.presets()["puppet-stage1"], batch=1, dtype=jnp.dtype("float32"), compile=False)
    told["model"] = told["model"] | {"num_layers": "two"}
    with pytest.raises(ChildProcessError, match="diffusers' process ended: "):
        rival.Rival(told)


def test_the_sampler_counts_its_windows_and_branches():
    preset = dataclasses.replace(workloads.presets()["puppet"], height=32, width=32, latent_frames=9, steps=2)
    work = workloads.sampler_work(preset, batch=1, dtype=jnp.dtype("float32"), window=5, overlap=3, group=2)
    assert (work.sizes["windows"], work.sizes["branches"]) == (3, 3)
    # The second group of two holds one window twice, which is no work done.
    assert work.flops == 2 * 3 * 3 * workloads.dit_flops(preset.dit, 5, 4, 4, text_tokens=41).forward


@pytest.mark.parametrize("video", [(5, 32, 32), (33, 32, 32), (49, 300, 264), (81, 256, 500)])
def test_tiles_are_those_that_are_run(monkeypatch, video):
    config = VAEConfig(tile_frames=16)
    seen = []

    def encode(_, x):
        seen.append(x.shape[1:4])
        t, h, w = (x.shape[1] - 1) // 4 + 1, x.shape[2] // 8, x.shape[3] // 8
        return np.zeros((1, t, h, w, 32), np.float32)

    monkeypatch.setattr(tiling, "_encode", encode)
    vae = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    video = (video[0], video[1] // 8 * 8, video[2] // 8 * 8)
    tiling.encode_tiled(vae, np.zeros((1, *video, 3), np.float32))
    assert sorted(seen) == sorted(tiling.tile_shapes(config, video))


def test_weights_are_drawn_in_their_dtype_and_none_is_zero():
    config = workloads.presets()["puppet"].dit
    graph, weights = workloads.draw_state(lambda: DiT(config, rngs=nnx.Rngs(0)), jnp.dtype("bfloat16"))
    for leaf in jax.tree.leaves(weights):
        assert leaf.dtype == jnp.bfloat16
        assert (np.asarray(leaf, np.float32) != 0).mean() > 0.99
    kernel = np.asarray(nnx.merge(graph, weights).single.blocks.mlp_in.kernel[:, 0], np.float32)
    assert kernel.std() == pytest.approx(config.width**-0.5, rel=0.01)
    assert abs(kernel.mean()) < 1e-3
    assert abs(np.corrcoef(kernel[:, :-1].ravel(), kernel[:, 1:].ravel())[0, 1]) < 0.01
    assert np.unique(np.asarray(kernel[0])).size > 1000


def test_options_refuse_what_no_preset_has():
    with pytest.raises(InputError, match="no preset"):
        run.Options(what="dit", preset="13b").sized_preset()
