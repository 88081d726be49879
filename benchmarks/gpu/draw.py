"""Draws puppets into memory maps with many processes until all are there: what training on a GPU reads meanwhile.

    python benchmarks/gpu/draw.py DIR --workers 12 --count 9000

Every tenth clip is a duet. `done` is 1 once a clip is whole. Worker k draws k, k + workers, ...
"""

import argparse
import multiprocessing
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from mi_jax.puppets.clips import draw
from mi_jax.puppets.groups import draw_duet

LATENT_FRAMES = 41  # longer than a window of 33, so that windows of that length also start later
FRAMES = 4 * (LATENT_FRAMES - 1) + 1
SAMPLES, SIZE, DUET_EVERY = FRAMES * 640, 96, 10
FIELDS = {
    "video": (np.uint8, (FRAMES, SIZE, SIZE, 3)),
    "audio": (np.float32, (2, SAMPLES)),
    "mask": (np.uint8, (2, SIZE, SIZE)),
    "mouth": (np.float32, (2, FRAMES, 4)),
    "prompt": (np.uint8, (512,)),
    "done": (np.uint8, ()),
}


def is_duet(index: int) -> bool:
    return index % DUET_EVERY == DUET_EVERY - 1


def open_maps(folder: pathlib.Path, count: int, mode: str) -> dict[str, np.memmap]:
    return {
        name: np.memmap(folder / f"{name}.bin", dtype, mode, shape=(count, *shape))
        for name, (dtype, shape) in FIELDS.items()
    }


def work(folder: pathlib.Path, count: int, first: int, workers: int, seed: int) -> None:
    maps = open_maps(folder, count, "r+")
    for i in range(first, count, workers):
        clip = (draw_duet if is_duet(i) else draw)(i, seed=seed, seconds=FRAMES / 25)
        voices = 2 if is_duet(i) else 1
        maps["video"][i] = clip.video
        maps["audio"][i, :voices] = clip.audio[..., :SAMPLES].reshape(voices, -1)
        maps["mask"][i, :voices] = clip.mask.reshape(voices, SIZE, SIZE)
        maps["mouth"][i, :voices] = clip.mouth.reshape(voices, FRAMES, 4)
        text = np.frombuffer(clip.prompt.encode()[:512], np.uint8)
        maps["prompt"][i, : len(text)] = text
        maps["done"][i] = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--count", type=int, default=9000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    open_maps(given.folder, given.count, "w+")
    context = multiprocessing.get_context("spawn")
    told = [(given.folder, given.count, k, given.workers, given.seed) for k in range(given.workers)]
    processes = [context.Process(target=work, args=args) for args in told]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
