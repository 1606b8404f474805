"""The roadmap and the mixers on CIFAR-10 by one GPU in minutes: all rows, several seeds, the same number of steps.

    python benchmarks/gpu_studies.py --minutes 3 --data CIFAR10 --out results
    python benchmarks/gpu_studies.py --dry-run --minutes 2 --data CIFAR10 --out results      # on CPU, tiny

The settings are those of ``overlock ablate --size small``, but for bfloat16, and for the tenth of an epoch that counts
as one, so that the warm-up is a twentieth of the run. The seeds of a row train side by side. Each finished run leaves
its result where ``overlock ablate`` looks for it: at the end the command is printed that makes the table of them.

It needs the package with its ``train`` extra, and no command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from captured import CapturedTraining
from fleet import Fleet, Job, Prepared, Row, add_options
from gpu_images import Normalise, ShiftedImages, enlarge, load_decoded, save_decoded
from timing import say
from torch import Tensor

from overlock.data import ImageData
from overlock.data.images import read_classes
from overlock.ops.dispatch import ENVIRONMENT_VARIABLE
from overlock.study.plan import TABLES, Study
from overlock.training.classification import make_network

EPOCHS = 20
"""Into which the steps of a run are divided, for the warm-up, which is two of them."""
SIDE = 32
TEST_BATCH = 1000
MOST_STEPS, DRY_STEPS, DRY_IMAGES = 12000, 20, 64


def make_study(table: str, options: argparse.Namespace, steps: int) -> Study:
    """The study that ``overlock ablate`` would run with as many steps."""
    changes = dict(epochs=EPOCHS, epoch_steps=max(1, steps // EPOCHS), batch_size=4 if options.dry_run else 128)
    rows = tuple(row for row in TABLES[table] if options.rows is None or row in options.rows)
    return Study(
        table=table, data=options.data, size="small", output=options.out / f"{table}_small", rows=rows,
        seeds=tuple(options.seeds), changes=changes,
    )  # fmt: skip


def tests(images: Tensor, labels: Tensor, normalise: Normalise, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    for some, named in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
        yield normalise(enlarge(some, side)), named


def prepare(table: str, row: str, options: argparse.Namespace, decoded: Path) -> Prepared:
    """All seeds of a row."""
    device = "cpu" if options.dry_run else "cuda"
    study, most = make_study(table, options, EPOCHS), DRY_STEPS if options.dry_run else MOST_STEPS
    classes = read_classes(Path(options.data) / "classes.txt")
    images, _, labels = load_decoded(decoded, "train", device)
    test_images, _, test_labels = load_decoded(decoded, "test", device)
    trainings = []
    for seed in study.seeds:
        config = study.config(row, seed)
        torch.manual_seed(seed)
        network, record = make_network(config, ImageData(classes=classes, train=(), test=(), crop_pct=1.0))
        normalise = Normalise(record.preprocessing, device)
        draw = ShiftedImages(
            images, labels, normalise, side=config.image_size, padding=config.augment.padding or 0,
            batch=config.batch_size, steps=most, seed=seed,
        )  # fmt: skip
        network = network.to(device, memory_format=torch.channels_last)
        trainings.append(CapturedTraining(network, config, draw, most_steps=most, classes=len(classes)))

    def finish(steps: int, seconds: float) -> list[Row]:
        final, rows = make_study(table, options, steps), []
        for job, training in zip((job for job in final.jobs() if job.row == row), trainings, strict=True):
            top1 = training.accuracy(tests(test_images, test_labels, normalise, config.image_size))
            job.write_result(top1=top1, seconds=seconds, classes=len(classes))
            losses = training.losses[max(0, steps - 50) : steps]
            rows.append(
                dict(
                    table=table, row=row, seed=job.seed, top1=top1, steps=steps, images=steps * config.batch_size,
                    last_loss=float(losses.mean()), seconds=round(seconds, 1),
                )
            )  # fmt: skip
        return rows

    return Prepared(trainings, finish)


def main() -> None:
    """Decode, train all rows, and say how to get the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, minutes=3.0)
    parser.add_argument("--tables", default="roadmap,mixers")
    parser.add_argument("--rows", help="some rows, as plain,gate; all unless given")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    end = time.time() + 60 * options.minutes
    if options.dry_run:
        os.environ[ENVIRONMENT_VARIABLE] = "torch"
    options.seeds = [int(word) for word in options.seeds.split(",")]
    options.rows = options.rows and options.rows.split(",")
    decoded = Path(tempfile.mkdtemp())
    save_decoded(Path(options.data), decoded, SIDE, DRY_IMAGES if options.dry_run else None)
    jobs = [
        Job(f"{table}_{row}", partial(prepare, table, row, options, decoded))
        for table in options.tables.split(",")
        for row in TABLES[table]
        if options.rows is None or row in options.rows
    ]
    fleet = Fleet(
        options.out / "runs", end, options.at_a_time, steps=options.steps,
        most_steps=DRY_STEPS if options.dry_run else MOST_STEPS,
    )  # fmt: skip
    rows = fleet.run(jobs)
    for table in options.tables.split(","):
        steps = next((row["steps"] for row in rows if row["table"] == table), None)
        if steps is not None:
            study = make_study(table, options, steps)
            seeds = ",".join(map(str, study.seeds))
            say(
                f"overlock ablate {table} --report --data {study.data} --seeds {seeds} --output {study.output} "
                f"--epochs {EPOCHS} --epoch_steps {study.changes['epoch_steps']} "
                f"--batch_size {study.changes['batch_size']}"
            )
    sys.exit(len(rows) < len(jobs) * len(options.seeds))


if __name__ == "__main__":
    main()
