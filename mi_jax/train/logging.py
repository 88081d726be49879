"""What a run tells while it runs: TensorBoard scalars and samples, metrics.csv, a progress bar."""

import contextlib
import csv
import io
import pathlib
import socket
import time
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from mi_jax.files import disk_faults_named, written_beside
from mi_jax.rates import FPS


class RunLog:
    """Writes under `out_dir`: tensorboard/ and metrics.csv (a row per log line: step, then the scalars by name).

    A resumed run goes on where its checkpoint stands: rows of later steps, which the killed run had still written, are
    dropped, in both.

    Written at once, by the thread that calls: a writer in the background would end unseen on a full disk, and the run
    wait for it for ever. Every method but `close` raises InputError there.
    """

    def __init__(self, out_dir: pathlib.Path, name: str, start: int, steps: int):
        self._folder, self._csv = out_dir / "tensorboard", out_dir / "metrics.csv"
        with disk_faults_named(self._folder):
            self._folder.mkdir(exist_ok=True)
            # TensorBoard reads them in the order of their names.
            events = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
            self._events = RecordWriter(str(self._folder / events))
            self._tell(file_version="brain.Event:2")
            if start:
                self._tell(step=start + 1, session_log=SessionLog(status=SessionLog.START))  # hides what came after
            self._columns = _drop_rows_after(self._csv, start)
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", smoothing=0.05, dynamic_ncols=True)

    def progress(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self._bar.update(steps)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One log line, of the state after `step` steps."""
        scalars = [Summary.Value(tag=f"train/{name}", simple_value=value) for name, value in values.items()]
        self._tell(step=step, summary=Summary(value=scalars))
        with disk_faults_named(self._csv):
            new = [name for name in values if name not in (self._columns or ())]
            if new:  # the first line; or another turn's
                self._columns = [*(self._columns or ["step"]), *new]
                _rewrite(self._csv, [self._columns, *_rows_of(self._csv)[1:]])
            row = {"step": step, **{name: f"{value:.7g}" for name, value in values.items()}}
            _append(self._csv, [row.get(column, "") for column in self._columns])
        loss = next(value for name, value in values.items() if name.rpartition("/")[2] == "loss")
        self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)

    def samples(self, step: int, samples: dict[str, Any]) -> None:
        """Pictures uint8 [H W 3] as PNG, videos uint8 [f H W 3] as animated GIF at 25 fps; numbers as scalars."""
        for name, sample in samples.items():
            sample = np.asarray(sample)
            if sample.ndim == 0:
                value = Summary.Value(tag=f"samples/{name}", simple_value=float(sample))
                self._tell(step=step, summary=Summary(value=[value]))
                continue
            image = encode_gif(sample) if sample.ndim == 4 else encode_png(sample)
            self._tell(step=step, summary=Summary(value=[Summary.Value(tag=f"samples/{name}", image=image)]))

    def _tell(self, **fields: Any) -> None:
        """Writes one TensorBoard event."""
        with disk_faults_named(self._folder):
            self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._events.flush()

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # of a disk that was full before: said already
            self._events.close()


def encode_png(image: UInt8[np.ndarray, "H W 3"]) -> Summary.Image:
    """A picture as TensorBoard stores it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return _image_summary(image.shape, buffer)


def encode_gif(video: UInt8[np.ndarray, "f H W 3"]) -> Summary.Image:
    """A video as TensorBoard stores it: an animated GIF that repeats."""
    from PIL import Image

    buffer = io.BytesIO()
    frames = [Image.fromarray(frame) for frame in video]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=1000 // FPS, loop=0)
    return _image_summary(video.shape[1:], buffer)


def _image_summary(shape: tuple[int, ...], buffer: io.BytesIO) -> Summary.Image:
    return Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=buffer.getvalue())


def _append(path: pathlib.Path, row: list) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(row)


def _rows_of(path: pathlib.Path) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.reader(file))


def _rewrite(path: pathlib.Path, rows: list[list[str]]) -> None:
    """The rows, each as long as the first."""
    with written_beside(path) as beside, beside.open("w", newline="") as file:
        csv.writer(file).writerows([*row, *[""] * (len(rows[0]) - len(row))] for row in rows)


def _drop_rows_after(path: pathlib.Path, step: int) -> list[str] | None:
    """Keeps the rows up to `step`; returns the file's columns, None where there is no file to go on with."""
    if step == 0:
        path.unlink(missing_ok=True)
    rows = _rows_of(path)
    if not rows:
        return None
    # A kill may have cut the last row short: only rows that hold every column count.
    kept = [row for row in rows[1:] if len(row) == len(rows[0]) and row[0].isdigit() and int(row[0]) <= step]
    _rewrite(path, [rows[0], *kept])
    return rows[0]
