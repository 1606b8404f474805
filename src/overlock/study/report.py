"""The table of a study: what the paper prints of each row, and what was measured, as rows, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from overlock.ablation import Published
from overlock.analysis import count_network
from overlock.deploy.evaluate_classification import measure_speed
from overlock.figures import encode_figure, new_figure
from overlock.files import write_atomically
from overlock.fused.fuse import fuse
from overlock.study.plan import Job, Study

SPEED, BATCH = "speed.json", 32
TABLE_CSV, TABLE_JSON, PICTURE = "table.csv", "table.json", "table.png"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table."""

    row: str
    """Its key."""
    title: str
    """As the paper has it."""
    paper: Published | None
    """What the paper prints."""
    top1: tuple[float, ...]
    """Measured accuracy of each seed that is done, of 0 to 1."""
    macs: float
    """Multiply-adds in G at the size of the study's images, counted."""
    params: float
    """Parameters in M, merged, counted."""
    speed: float | None
    """Images a second of the fused network; None where nothing is trained yet."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.top1) if self.top1 else None

    @property
    def deviation(self) -> float | None:
        """Of the seeds, the sample's."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    def flat(self) -> dict[str, Any]:
        """As a row of CSV or JSON."""
        names = ("macs", "params", "top1", "miou")
        paper = dict.fromkeys(names) if self.paper is None else asdict(self.paper)
        return dict(
            row=self.row, title=self.title, **{f"paper_{name}": paper[name] for name in names}, top1=self.mean,
            top1_std=self.deviation, n=len(self.top1), macs=self.macs, params=self.params, images_per_second=self.speed,
        )  # fmt: skip


def make_table(study: Study) -> list[Line]:
    """Count, and measure what has no speed yet, of each row."""
    jobs = list(study.jobs())
    finished = [result for result in (job.result() for job in jobs) if result is not None]
    classes = finished[0]["classes"] if finished else 1000  # of the data, which all rows share; or ImageNet's
    return [_line(study, [job for job in jobs if job.row == row], classes) for row in study.rows]


def _line(study: Study, jobs: Sequence[Job], classes: int) -> Line:
    results = [result for result in (job.result() for job in jobs) if result is not None]
    config, row = jobs[0].config, study.row(jobs[0].row)
    arguments = dict(num_classes=classes, in_chans=config.in_chans, **config.model_args)
    if config.stem_stride is not None:
        arguments["stem_stride"] = config.stem_stride
    side = config.image_size
    network = timm.create_model(config.model, device="meta", deploy=True, **arguments).eval()
    cost = count_network(network, image_size=(side, side), in_chans=config.in_chans)
    speed = _speed(study.folder(jobs[0].row) / SPEED, config.model, arguments, side) if results else None
    return Line(
        row=jobs[0].row, title=row.title, paper=row.paper, top1=tuple(result["top1"] for result in results),
        macs=cost.macs / 1e9, params=cost.params / 1e6, speed=speed,
    )  # fmt: skip


def _speed(path: Path, model: str, arguments: dict[str, Any], side: int) -> float:
    """Images a second on this machine, in batches of 32 in float32; measured once, and kept in a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    key = dict(model=model, arguments=arguments, side=side, batch=BATCH, device=where)
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] == key:
            return float(kept["images_per_second"])
    network = fuse(timm.create_model(model, **arguments).to(device))
    images = torch.rand(BATCH, arguments["in_chans"], side, side, device=device)
    with torch.inference_mode():
        network(images)
        speed = measure_speed(network, images)
    write_atomically(path, json.dumps(dict(of=key, images_per_second=speed), indent=2) + "\n")
    return speed


def write_table(table: Sequence[Line], study: Study) -> None:
    """Write table.csv, table.json and table.png into the study's folder."""
    rows = [line.flat() for line in table]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(study.output / TABLE_CSV, buffer.getvalue())
    write_atomically(study.output / TABLE_JSON, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    write_atomically(study.output / PICTURE, _draw(table, study))


def _draw(table: Sequence[Line], study: Study) -> bytes:
    """Measured accuracies, with their deviations, beside the published ones: a PNG file."""
    figure = new_figure(9, 1.2 + 0.32 * len(table))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(table))
    means = [float("nan") if line.mean is None else 100 * line.mean for line in table]
    left.errorbar(means, places, xerr=[100 * (line.deviation or 0) for line in table], fmt="o", capsize=3)
    left.set_xlabel(f"measured top-1, % (n = {max(len(line.top1) for line in table)})")
    printed = [float("nan") if line.paper is None else line.paper.top1 for line in table]
    right.plot(printed, places, "o", color="gray")
    right.set_xlabel("published top-1 on ImageNet-1K, %")
    left.set_yticks(list(places), [line.title for line in table])
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{study.table}, size {study.size}, on {Path(study.data).name}")
    return encode_figure(figure)
