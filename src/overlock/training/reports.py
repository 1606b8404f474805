"""What a run tells: lines and a bar on the console, log.csv, TensorBoard, a tracker, curves, and the images it could
not read."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from overlock.figures import encode_figure, new_figure
from overlock.files import write_atomically
from overlock.training.config import RunConfig
from overlock.training.trackers import close_tracker, open_tracker

LOG, CURVES, UNREADABLE, ENVIRONMENT = "log.csv", "curves.png", "unreadable.txt", "environment.json"
BOARD, NOTES = "tensorboard", "notes.txt"
LOG_EVERY = 50  # steps between TensorBoard's points
Row = dict[str, Any]


class RunLog:
    """The epochs of a run, in a file that is always as long as the run, however often it was resumed.

    Args:
        folder: of the run.
        console: to write to.
        epochs: of the whole run.
        main_metric: that is printed, of 0 to 1.
        metric_name: what it is called there.
        keep_best: called when a test was the best so far.
        first_process: only this one writes.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        epochs: int,
        main_metric: str,
        metric_name: str,
        keep_best: Callable[[], None],
        first_process: bool,
    ):
        self.folder, self.console, self.keep_best, self.first = folder, console, keep_best, first_process
        self.epochs, self.main_metric, self.metric_name = epochs, main_metric, metric_name
        self.rows: list[Row] = []
        self.board: Any = None
        self.tracker: Any = None
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal or not first_process,
        )  # fmt: skip
        self.bar_task = self.bar.add_task("training")

    def open(self, config: RunConfig, *, begin: bool) -> None:
        """Open TensorBoard's file, and the run in a tracker.

        Args:
            config: of the run, which the tracker is told.
            begin: take TensorBoard's files of an earlier run away, and begin a new run in the tracker.
        """
        if self.first:
            if begin:
                shutil.rmtree(self.folder / BOARD, ignore_errors=True)
            self.board = _make_board(self.folder / BOARD)
            if config.logger is not None:
                self.tracker = open_tracker(config.logger, self.folder, config.to_dict(), begin=begin)

    def on_step(self, step: int, *, total: int, lr: float, loss: Callable[[], float]) -> None:
        """Move the bar, and give TensorBoard a point now and then.

        Args:
            step: done since the run began.
            total: of the run.
            lr: learning rate.
            loss: gives that of the epoch so far; called only where it is shown, since it waits for the device.
        """
        if not self.bar.disable:
            self.bar.start()
            self.bar.update(self.bar_task, completed=step, total=total)
        if step % LOG_EVERY == 0 and (self.board is not None or self.tracker is not None):
            self._add({"step/loss": loss(), "step/lr": lr}, step, board_step=step)

    def write(self, *, better: bool) -> None:
        """Write the log with the epoch that was added last, keep the weights if they are better, and print a line."""
        if better:
            self.keep_best()
        if not self.first:
            return
        row = self.rows[-1]
        write_atomically(self.folder / LOG, to_csv(self.rows))
        points = {f"epoch/{name}": value for name, value in known(row).items() if name not in ("epoch", "step")}
        self._add(points, row["step"], board_step=row["epoch"])
        if self.board is not None:
            self.board.flush()
        tested = f"  test {self.metric_name} {as_percentage(row[self.main_metric])}" if self.main_metric in row else ""
        skipped = f"  {row['skipped']} steps skipped" if row["skipped"] else ""
        self.tell(
            f"epoch {row['epoch']:>3}/{self.epochs}  loss {row['loss']:.3f}{tested}  {row['seconds']:.0f} s{skipped}"
        )

    def _add(self, points: Mapping[str, float], step: int, *, board_step: int) -> None:
        """Points for TensorBoard, whose epochs count by themselves, and for the tracker, which knows steps alone."""
        if self.board is not None:
            for name, value in points.items():
                self.board.add_scalar(name, value, board_step)
        if self.tracker is not None:
            self.tracker.log_metrics(dict(points), step=step)

    def tell(self, line: str) -> None:
        """Print a line, above the bar."""
        if self.first:
            self.console.print(line, highlight=False, markup=False)

    def close(self) -> None:
        """Take the bar away, and close TensorBoard's file and the run in the tracker."""
        self.bar.stop()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            is_done = bool(self.rows) and self.rows[-1]["epoch"] == self.epochs
            close_tracker(self.tracker, is_done=is_done)


def _make_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def known(row: Mapping[str, Any]) -> Row:
    """A row without the measures that a test had nothing for: they are NaN."""
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def as_percentage(share: float) -> str:
    """A measure as text."""
    return "none" if math.isnan(share) else f"{100 * share:.2f} %"


def to_csv(rows: list[Row]) -> str:
    """Rows under the names of all their columns; a measure that there is none of is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(known, rows))
    return buffer.getvalue()


def draw_curves(rows: list[Row], path: Path, *, shares: Mapping[str, str], title: str) -> None:
    """Losses and measures over the epochs, as a PNG file.

    Args:
        rows: of the log.
        path: to write.
        shares: the measures to draw, and what they are called.
        title: of the picture.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    losses = dict(loss="training", test_loss="test")
    for axes, names, unit in ((left, losses, 1), (right, shares, 100)):
        for name, label in names.items():
            points = [(row["epoch"], unit * row[name]) for row in map(known, rows) if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylabel("loss")
    right.set_ylabel("test, %")
    figure.suptitle(title)
    write_atomically(path, encode_figure(figure))


class Unreadable:
    """The images that a run could not read: counted over all its processes and sessions, by a file of them.

    Args:
        folder: of the run.
        limit: how many there may be.
    """

    def __init__(self, folder: Path, limit: int):
        self.path, self.limit = folder / UNREADABLE, limit
        self.known: set[str] = set()

    def add(self, problems: Iterable[str]) -> None:
        """Note images, each once.

        Raises:
            ValueError: where there are more than the limit.
        """
        new = [problem for problem in problems if problem not in self.known]
        if not new:
            return
        self.known |= set(self.path.read_text(encoding="utf-8").splitlines()) if self.path.exists() else set()
        lines = [line for line in (" ".join(problem.split()) for problem in new) if line not in self.known]
        self.known |= {*new, *lines}
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in dict.fromkeys(lines)))
        count = len(set(self.path.read_text(encoding="utf-8").splitlines()))
        if count > self.limit:
            raise ValueError(
                f"{count} images could not be read, more than safety.unreadable {self.limit}; they are listed in "
                f"{self.path}; the last: {lines[-1] if lines else new[-1]}"
            )


def _version_of(name: str) -> str | None:
    """Of an installed distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_environment() -> str:
    """Versions and hardware, as JSON."""
    names = ("overlock", "torch", "torchvision", "timm", "lightning", "numpy", "pillow")
    return json.dumps(
        dict(
            command=sys.argv,
            python=sys.version.split()[0],
            system=platform.platform(),
            versions={name: version for name in names if (version := _version_of(name))},
            cpus=os.cpu_count(),
            threads=torch.get_num_threads(),
            cuda=torch.version.cuda,
            gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            slurm_job=os.environ.get("SLURM_JOB_ID"),
        ),
        indent=2,
    )
