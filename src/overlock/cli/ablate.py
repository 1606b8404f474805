"""``overlock ablate roadmap|mixers --data DATA``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from overlock.cli.command import Command, ended_by_sigterm, given_of, needing_training
from overlock.files import Outputs

if TYPE_CHECKING:
    from overlock.study.report import Line

CHANGES = ("epochs", "epoch_steps", "batch_size", "image_size")
RUNTIME = ("accelerator", "precision", "workers")


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "table",
        type=Literal["roadmap", "mixers"],
        metavar="TABLE",
        help="roadmap: the twelve rows of Table 6, from a plain ConvNet to OverLoCK-XT. mixers: the eight token mixers "
        "of Table 7 in one frame.",
    )
    parser.add_argument("--data", type=str, required=True, help="Labelled images, in any form that training takes.")
    parser.add_argument(
        "--size",
        type=Literal["small", "paper"],
        default="small",
        help="small: about a million parameters, 64 x 64 pixels, the recipe ablation_small. paper: the networks of the "
        "paper by its recipe, 120 epochs at 224 x 224.",
    )
    parser.add_argument(
        "--rows", type=str | None, default=None, help="Some rows, such as convffn,dds,gate; all unless given."
    )
    parser.add_argument("--seeds", type=str, default="0", help="Seeds to train each row with, such as 0,1,2.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder for the runs, table.csv, table.json and table.png; runs/TABLE_SIZE unless given. The same command "
        "again trains what is not finished there and goes on with what was stopped.",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="Processes that share the runs, each on a GPU of its own where there are several. The same command on "
        "another machine with the same folder shares them too.",
    )
    parser.add_argument("--report", action="store_true", help="Train nothing; the table of what is there.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    for name, text in dict(
        epochs="Passes over the training images; the recipe's unless given, as for the next three.",
        epoch_steps="Steps that are counted as an epoch.",
        batch_size="Images a step.",
        image_size="Side of the images in pixels.",
        workers="Processes that load images.",
    ).items():
        parser.add_argument(f"--{name}", type=int | None, default=None, help=text)
    parser.add_argument(
        "--accelerator", type=Literal["auto", "cpu", "cuda", "mps"] | None, default=None, help="Kind of device."
    )
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16", "fp16"] | None, default=None, help="Precision of the networks."
    )


def run(options: Namespace, console: Console) -> int | None:
    if options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")
    seeds = _numbers(options.seeds)
    output = Path(options.output or f"runs/{options.table}_{options.size}")
    Outputs([options.data] if Path(options.data).exists() else [], overwrite=True).check_folder(output)
    changes: dict[str, Any] = given_of(options, CHANGES)
    if runtime := given_of(options, RUNTIME):
        changes["runtime"] = runtime
    with needing_training():
        from overlock.study.plan import Study  # noqa: PLC0415
        from overlock.study.report import make_table, write_table  # noqa: PLC0415
        from overlock.study.run import run_in_processes, run_study  # noqa: PLC0415
        from overlock.training.stop import RunStoppedError  # noqa: PLC0415
    rows = tuple(filter(None, (options.rows or "").split(",")))
    study = Study(
        table=options.table, data=options.data, size=options.size, output=output, rows=rows, seeds=seeds,
        changes=changes,
    )  # fmt: skip
    told = Console(stderr=True, soft_wrap=True, highlight=False, markup=False) if options.json else console
    try:
        if options.processes > 1 and not options.report:
            with ended_by_sigterm():
                run_in_processes(study, options.processes, told)
        elif not options.report:
            run_study(study, told)
    except RunStoppedError as stopped:
        told.print("the same overlock ablate command, as it was, goes on with the study")
        return 128 + stopped.signum
    with told.status("counting, and measuring the speed"):
        table = make_table(study)
    write_table(table, study)
    if options.json:
        sys.stdout.write(json.dumps([line.flat() for line in table], indent=2, ensure_ascii=False) + "\n")
    else:
        console.print(_shown(table))
        console.print(f"in {output}: table.csv, table.json, table.png")
    return None


def _numbers(words: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, words.split(",")))
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers with commas between, got {words!r}") from None


def _shown(table: Sequence[Line]) -> Table:
    shown = Table(Column("row", overflow="fold", min_width=12), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    published, counted = ("paper: #F", "#P", "top-1", "mIoU"), ("n", "#F, G", "#P, M")
    for title in (*published, "here, %", *counted, "images/s"):
        shown.add_column(title, justify="right", no_wrap=True)
    for line in table:
        paper = line.paper
        figures = () if paper is None else (paper.macs, paper.params, paper.top1, paper.miou)
        printed = tuple(f"{figure:.1f}" for figure in figures) or ("",) * 4
        spread = "" if line.deviation is None else f"±{100 * line.deviation:.2f}"
        top1 = "" if line.mean is None else f"{100 * line.mean:.2f}{spread}"
        speed = "" if line.speed is None else f"{line.speed:.0f}"
        counts = (str(len(line.top1)), f"{line.macs:.3f}", f"{line.params:.2f}")
        shown.add_row(line.title, *printed, top1, *counts, speed)
    return shown


COMMAND = Command("Train the rows of the paper's ablations alike, and put them into one table.", add_options, run)
