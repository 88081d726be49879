"""A model folder made of runs and, for what was not trained, of another model folder."""

import jax
import numpy as np
import pytest
from flax import nnx

from mi_jax.avatar.folders import find_model, load_encoders
from mi_jax.errors import InputError
from mi_jax.puppets.export import export_puppet
from mi_jax.sample.avatar import load


def test_without_a_run_the_encoders_are_those_of_the_base(tmp_path):
    base = find_model("puppet-teacher")
    (tmp_path / "runs").mkdir()
    assert export_puppet(tmp_path / "runs", tmp_path / "out", base=base) is False  # no denoiser
    (config, ours), (expected, theirs) = load_encoders(tmp_path / "out"), load_encoders(base)
    assert (config.vae, config.wav2vec2, config.mllm) == (expected.vae, expected.wav2vec2, expected.mllm)
    for part in ("vae", "wav2vec2", "mllm"):
        leaves = (jax.tree.leaves(nnx.state(getattr(encoders, part))) for encoders in (ours, theirs))
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="dit"):
        load(tmp_path / "out", devices=1)


def test_runs_that_are_not_there_and_runs_that_would_be_lost(tmp_path):
    base, runs = find_model("puppet-teacher"), tmp_path / "runs"
    with pytest.raises(InputError, match="runs: no such folder of runs"):
        export_puppet(runs, tmp_path / "out", base=base)
    (runs / "stage1").mkdir(parents=True)
    for out in (runs, tmp_path):
        with pytest.raises(InputError, match="the source lies there"):
            export_puppet(runs, out, base=base, overwrite=True)
    assert (runs / "stage1").is_dir()
    with pytest.raises(InputError, match="vae: no such run"):
        export_puppet(runs, tmp_path / "out")
