"""`mi-jax check`."""

from pathlib import Path
from typing import Annotated

import tyro

from mi_jax.errors import InputError


def check(run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]) -> None:
    """Reads every checkpoint of a training run and says which are whole.

    Each leaf is held against the fingerprint that was saved beside it. Exit code 2 if one is damaged; a run that goes
    on takes the newest that is whole.

    Args:
      run: what `mi-jax train --out` wrote.
    """
    from mi_jax.train.checkpoints import check as checked

    damaged = []
    for path, leaves, fault in checked(run):
        print(f"{path}: " + (f"damaged ({fault})" if fault else f"whole, {leaves} leaves"))
        damaged += [path] if fault else []
    if damaged:
        raise InputError(f"{run}: {len(damaged)} damaged checkpoint{'s' * (len(damaged) > 1)}")
