"""PyTorch's files, the zip of today and the older pickle, damaged anywhere: read, or refused in a line."""

import numpy as np
import pytest
import torch

from mi_jax.errors import InputError
from mi_jax.weights.sources import open_checkpoint


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_is_a_line(tmp_path, zipped):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=zipped)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    said = []
    for _ in range(150):
        bad = bytearray(whole)
        if rng.random() < 0.2:
            bad = bad[: rng.integers(len(bad))]
        else:
            for place in rng.integers(2, len(bad), rng.integers(1, 6)):
                bad[place] = rng.integers(256)
        path.write_bytes(bytes(bad))
        try:
            open_checkpoint(path)
        except InputError as error:
            said.append(str(error))
    assert len(said) > 30
    assert all(line.startswith(str(path)) and "\n" not in line for line in said)


def test_tensors_that_are_no_arrays_are_named(tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
        torch.save({"a": tensor}, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: a is stored as"):
            open_checkpoint(tmp_path / "a.pt")
