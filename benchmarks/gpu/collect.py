"""A model folder from what benchmarks/gpu/puppets.py left in a folder: the base's encoders with the trained modules.

cat OUT/dit.npz.* > OUT/dit.npz; cat OUT/vae.npz.* > OUT/vae.npz       # where they came back in pieces
python benchmarks/gpu/collect.py OUT FOLDER [--base puppet-teacher]
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np
from flax import nnx

from mi_jax.avatar.folders import load_encoders, load_part, save_avatar


def filled(module: nnx.Module, file: pathlib.Path) -> nnx.Module:
    """The module with the file's leaves, which lie there by their number, in f32."""
    with np.load(file) as stored:
        graph, params = nnx.split(module)
        leaves, tree = jax.tree.flatten(params)
        numbers = [name for name in stored.files if name.isdecimal()]
        if len(numbers) != len(leaves):
            raise SystemExit(f"{file}: {len(numbers)} leaves, the base's module has {len(leaves)}")
        new = [stored[str(k)].astype(np.float32) for k in range(len(leaves))]
    for k, (old, leaf) in enumerate(zip(leaves, new)):
        if old.shape != leaf.shape:
            raise SystemExit(f"{file}: leaf {k} is {leaf.shape}, the base's {old.shape}")
    return nnx.merge(graph, tree.unflatten(new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--base", default="puppet-teacher")
    given = parser.parse_args()
    config, encoders = load_encoders(given.base)
    dit = load_part(given.base, "dit")
    if (file := given.out / "vae.npz").exists():
        encoders = dataclasses.replace(encoders, vae=filled(encoders.vae, file))
        with np.load(file) as stored:
            vae = dataclasses.replace(config.vae, scaling_factor=float(stored["scaling"]))
        config = dataclasses.replace(config, vae=vae)
    if (file := given.out / "dit.npz").exists():
        dit = filled(dit, file)
    save_avatar(given.folder, config, encoders, dit, dtype=np.float16, overwrite=given.folder.exists())
    print(f"{given.folder}: scaling factor {config.vae.scaling_factor}")


if __name__ == "__main__":
    main()
