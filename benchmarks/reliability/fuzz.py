"""Gives damaged files to everything that reads files, and counts what becomes of them.

    python benchmarks/reliability/fuzz.py --seed 0 --out benchmarks/results/fuzz.json          # 10,000 mutants
    python benchmarks/reliability/fuzz.py --only sounds --count 500 --keep /tmp/faults

A mutant is a small good file of which up to three pieces were cut, repeated, zeroed, overwritten or flipped, or a JSON
of which values were replaced; it is the same for the same reader, number and seed. It may be refused (`InputError`) or
accepted; anything else is a fault: another exception, a result that cannot be, a process that dies, hangs or takes
a gigabyte. `--keep` keeps the files of faults.
"""

import argparse
import json
import logging
import multiprocessing
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
COUNTS = {
    "pictures": 3400, "masks": 1000, "sounds": 2400, "videos": 1000, "configs": 600, "safetensors": 900,
    "records": 400, "folders": 200, "checkpoints": 100, "factors": 400,
}  # fmt: skip
HANGS = 60.0  # seconds
LARGE = 2**20  # KiB by which a single call may raise the peak of memory
ODD = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", "../x", "\x00", [], {}, [[]], [1, 2],
    {"a": 1}, "ключ" * 50, "/dev/zero",
]  # fmt: skip


# --- mutants -------------------------------------------------------------------------------------------------------


def mutant(data: bytes, rng: random.Random) -> bytes:
    """Up to three damages, anywhere: more of them where formats keep their headers."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        start = rng.randrange(min(len(data), 200)) if rng.random() < 0.5 else rng.randrange(len(data))
        length = min(len(data) - start, rng.choice([1, 1, 2, 4, 4, 8, 64, 1000]))
        match rng.randrange(7):
            case 0:
                del data[start:]
            case 1:
                del data[start : start + length]
            case 2:
                data[start:start] = data[start : start + length] * rng.choice([1, 2, 50])
            case 3:
                data[start : start + length] = bytes(length)
            case 4:
                data[start : start + length] = rng.randbytes(length)
            case 5:
                data[start] ^= 1 << rng.randrange(8)
            case 6:
                data[start : start + length] = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")[rng.randrange(2)][:length]
    return bytes(data)


def json_mutant(text: bytes, rng: random.Random) -> bytes:
    """A JSON of which up to three values are replaced or left out; one in three is damaged as bytes instead."""
    if rng.random() < 1 / 3:
        return mutant(text, rng)
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        inner, depth = value, rng.randint(1, 4)
        while isinstance(inner, dict | list) and inner:
            key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
            depth -= 1
            if depth <= 0 or not isinstance(inner[key], dict | list):
                if rng.random() < 0.2:
                    del inner[key]
                else:
                    number = isinstance(inner[key], int | float) and rng.random() < 0.5
                    inner[key] = inner[key] * rng.choice([-1, 2, 1000, 0.5]) if number else rng.choice(ODD)
                break
            inner = inner[key]
    return json.dumps(value).encode()


# --- good files, and what reads them ---------------------------------------------------------------------------------


def make_pictures(folder: pathlib.Path) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    rgb, grey = Image.fromarray(coarse), Image.fromarray(coarse[:, :, 0])
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "jp2", "avif"):
        rgb.save(folder / f"rgb.{suffix}")
    rgb.save(folder / "progressive.jpg", progressive=True)
    rgb.save(folder / "lzw.tif", compression="tiff_lzw")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.quantize(7).save(folder / "palette.png")
    Image.fromarray(coarse[:, :, 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(coarse[:, :, 0].astype(np.float32)).save(folder / "float.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    grey.save(folder / "grey.png")


def read_picture(path: pathlib.Path) -> None:
    import numpy as np

    from mi_jax.data.pictures import read_image

    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def make_masks(folder: pathlib.Path) -> None:
    import numpy as np
    from PIL import Image

    mask = Image.fromarray((np.mgrid[:40, :48][0] < 20).astype(np.uint8) * 255)
    for name in ("mask.png", "mask.gif", "mask.jpg"):
        mask.save(folder / name)
    mask.convert("1").save(folder / "two.png")


def read_mask(path: pathlib.Path) -> None:
    from mi_jax.data.pictures import read_mask

    mask = read_mask(path)
    assert mask.dtype == bool
    assert mask.ndim == 2


def make_sounds(folder: pathlib.Path) -> None:
    from tiny_media import encode_sound, speech_like

    for name, codec, rate, layout, sample_format in (
        ("a.wav", "pcm_s16le", 16_000, "mono", "s16"),
        ("b.wav", "pcm_f32le", 44_100, "stereo", "flt"),
        ("c.flac", "flac", 16_000, "stereo", "s16"),
        ("d.mp3", "mp3", 44_100, "mono", "s16p"),
        ("e.m4a", "aac", 44_100, "stereo", "fltp"),
        ("f.opus", "libopus", 48_000, "mono", "s16"),
        ("g.mka", "flac", 16_000, "mono", "s16"),
        ("h.wav", "pcm_s16le", 16_000, "7.1", "s16"),
    ):
        encode_sound(
            folder / name,
            codec,
            speech_like(0.6, rate, {"mono": 1, "stereo": 2}.get(layout, 8)),
            rate,
            layout,
            sample_format,
        )


def read_sound(path: pathlib.Path) -> None:
    import numpy as np

    from mi_jax.data.sound_files import read_audio

    for stereo in (False, True):
        samples = read_audio(path, stereo=stereo, seconds=60)
        assert np.isfinite(samples).all()
        assert len(samples) > 0


def make_videos(folder: pathlib.Path) -> None:
    import numpy as np
    from tiny_media import speech_like

    from mi_jax.data.video_files import write_video

    frames = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    for suffix in ("mp4", "mkv", "mov"):
        write_video(folder / f"v.{suffix}", frames, speech_like(0.32, 16_000))


def read_film(path: pathlib.Path) -> None:
    from mi_jax.data.video_files import read_video
    from mi_jax.errors import InputError

    try:
        frames, fps = read_video(path)
        assert len(frames)
        assert fps > 0
    except InputError:
        read_sound(path)
        raise
    read_sound(path)


def make_model(folder: pathlib.Path) -> None:
    from tiny_avatar import make_avatar

    make_avatar().save(folder / "model", dtype="float32")


def make_configs(folder: pathlib.Path) -> None:
    make_model(folder)
    shutil.move(folder / "model" / "config.json", folder / "config.json")
    shutil.rmtree(folder / "model")


def read_config(path: pathlib.Path) -> None:
    from mi_jax.avatar.folders import avatar_config
    from mi_jax.sample.sizes import check_memory

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, pathlib.Path(folder) / "config.json")
        check_memory(avatar_config(folder), 100, 1, 33)


def make_safetensors(folder: pathlib.Path) -> None:
    make_model(folder)
    shutil.move(folder / "model" / "model.safetensors", folder / "model.safetensors")
    shutil.rmtree(folder / "model")


def read_safetensors(path: pathlib.Path) -> None:
    from mi_jax.weights.sources import open_checkpoint

    for tensor in open_checkpoint(path).tensors.values():
        assert tensor.read().shape == tensor.shape


def read_folder(folder: pathlib.Path) -> None:
    from mi_jax.sample.avatar import load

    load(folder, devices=1)


def make_records(folder: pathlib.Path) -> None:
    import numpy as np
    from tiny_records import record

    from mi_jax.data.records import write_records

    rng = np.random.default_rng(0)
    write_records(folder / "records", (record(rng) for _ in range(4)))


def read_records(folder: pathlib.Path) -> None:
    from mi_jax.data.records import RecordSource

    source = RecordSource(folder)
    for i in range(len(source)):
        assert isinstance(source[i], dict)


def make_checkpoints(folder: pathlib.Path) -> None:
    from tiny_training import Regression, config

    from mi_jax.train.loop import train

    train(config(Regression(), steps=4, checkpoint_every=4, workers=0), folder / "run")


def read_checkpoint(folder: pathlib.Path) -> None:
    from mi_jax.train.checkpoints import load_ema_state

    load_ema_state(folder)


def make_factors(folder: pathlib.Path) -> None:
    import numpy as np

    from mi_jax.models.lora import Factors
    from mi_jax.weights.factors import save_factors

    rng = np.random.default_rng(0)
    values = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    shapes = {"double.audio.q.kernel": (2, 256, 256), "single.blocks.out.kernel": (3, 2, 1280, 256)}
    factors = {name: Factors(values(*n, d, 1), values(*n, 1, e)) for name, (*n, d, e) in shapes.items()}
    (folder / "fast").mkdir()
    for path in (folder / "f.safetensors", folder / "fast" / "f.safetensors"):
        save_factors(path, factors)
    config = {"base": "puppet-teacher", "lora": ["f.safetensors"], "steps": 4, "guidance_audio": 0.0}
    (folder / "fast" / "config.json").write_text(json.dumps(config))


def read_factors(path: pathlib.Path) -> None:
    from mi_jax.avatar.folders import avatar_config, combined_factors
    from mi_jax.weights.factors import load_factors

    if path.is_dir():
        avatar_config(path)
        combined_factors(path)
    else:
        load_factors(path)


READERS = {
    "pictures": (make_pictures, read_picture),
    "masks": (make_masks, read_mask),
    "sounds": (make_sounds, read_sound),
    "videos": (make_videos, read_film),
    "configs": (make_configs, read_config),
    "safetensors": (make_safetensors, read_safetensors),
    "records": (make_records, read_records),
    "folders": (make_model, read_folder),
    "checkpoints": (make_checkpoints, read_checkpoint),
    "factors": (make_factors, read_factors),
}


# --- one reader, in a process of its own -----------------------------------------------------------------------------


def damaged(good: pathlib.Path, number: int, seed: int, place: pathlib.Path) -> tuple[pathlib.Path, str]:
    """A mutant of one of the good files, or of a copy of the good folder with one file of it damaged."""
    rng = random.Random(f"{seed}/{number}")
    choices = sorted(good.iterdir())
    chosen = choices[number % len(choices)]
    if chosen.is_dir():
        target = place / chosen.name
        shutil.copytree(chosen, target)
        files = [path for path in sorted(target.rglob("*")) if path.is_file()]
        file = rng.choice(files)
        if rng.random() < 0.05:
            file.unlink()
            return target, f"{file.relative_to(place)} removed"
    else:
        target = file = place / chosen.name
        shutil.copy(chosen, target)
    change = json_mutant if file.suffix == ".json" else mutant
    file.write_bytes(change(file.read_bytes(), rng))
    return target, str(file.relative_to(place))


def work(reader: str, good: pathlib.Path, first: int, count: int, seed: int, keep: pathlib.Path | None, pipe) -> None:
    from mi_jax.errors import InputError

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    read = READERS[reader][1]
    for number in range(first, count):
        pipe.send(("begins", number, ""))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as place:
            target, what = damaged(good, number, seed, pathlib.Path(place))
            try:
                read(target)
                outcome, said = "accepted", ""
            except InputError as fault:
                outcome, said = ("refused", "") if "\n" not in str(fault) else ("fault", "a message of several lines")
            except BaseException as fault:  # whatever is no InputError
                place_of = traceback.extract_tb(fault.__traceback__)[-1]
                outcome, said = "fault", f"{type(fault).__name__}: {str(fault)[:150]} ({place_of.name})"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            if outcome != "fault" and grown > LARGE and number > first:
                outcome, said = "fault", f"{outcome}, but took {grown // 1024} MiB"
            if outcome == "fault":
                said = f"{what}: {said}"
                if keep is not None:
                    kept = keep / f"{reader}-{number}-{target.name}"
                    (shutil.copytree if target.is_dir() else shutil.copy)(target, kept)
        pipe.send((outcome, number, said))


def campaign(reader: str, count: int, seed: int, keep: pathlib.Path | None) -> dict:
    counts, faults, start = Counter(), [], time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        good = pathlib.Path(folder)
        maker = context.Process(target=READERS[reader][0], args=(good,))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(f"{reader}: no good file was made")
        first = 0
        while first < count:
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=work, args=(reader, good, first, count, seed, keep, theirs))
            worker.start()
            theirs.close()
            number = first
            try:
                while ours.poll(HANGS):
                    outcome, number, said = ours.recv()
                    if outcome == "begins":
                        continue
                    counts[outcome] += 1
                    if outcome == "fault":
                        faults.append(f"{number}: {said}")
                    first = number + 1
                died = f"no answer for {HANGS:.0f} s"
            except EOFError:
                worker.join()
                died = "" if worker.exitcode == 0 else f"the process died ({worker.exitcode})"
            worker.kill()
            worker.join()
            if died:
                counts["fault"] += 1
                faults.append(f"{number}: {died}")
                first = number + 1
    seconds = round(time.perf_counter() - start, 1)
    return {
        "mutants": count,
        **{k: counts[k] for k in ("refused", "accepted", "fault")},
        "seconds": seconds,
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=COUNTS)
    parser.add_argument("--count", type=int, help="of each reader")
    parser.add_argument("--out", type=pathlib.Path, help="where the result is added, as JSON")
    parser.add_argument("--keep", type=pathlib.Path)
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    results = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {}
    for reader in given.only or COUNTS:
        results[reader] = campaign(reader, given.count or COUNTS[reader], given.seed, given.keep) | {"seed": given.seed}
        shown = {name: value for name, value in results[reader].items() if name != "faults"}
        print(f"{reader}: {shown}", *results[reader]["faults"][:20], sep="\n    ", flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
