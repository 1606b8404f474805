"""``overlock summary MODEL``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from overlock.cli.command import Command

CLASSIFY = "classify"


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("model", type=str, metavar="MODEL", help="One of OverLoCK's sizes, such as overlock_t.")
    parser.add_argument(
        "--task",
        type=Literal["classify", "mask_rcnn", "cascade_mask_rcnn", "upernet"],
        default=CLASSIFY,
        help="What the network is the backbone of.",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        default=None,
        help="Height and width in pixels, by default those of the paper's table of the task.",
    )


def run(options: Namespace, console: Console) -> None:
    from overlock.analysis import DENSE_TASKS, count_cost, count_dense_cost  # noqa: PLC0415
    from overlock.checkpoints import check_model_name  # noqa: PLC0415
    from overlock.network import VARIANTS  # noqa: PLC0415

    check_model_name(options.model)
    given = None if options.image_size is None else tuple(options.image_size)
    if options.task == CLASSIFY:
        number, usual, what = 2, (224, 224), options.model
        costs = count_cost(options.model, image_size=given or usual)
        figures = VARIANTS[options.model].paper
        printed = None if figures is None else (figures.macs, figures.params)
    else:
        task = DENSE_TASKS[options.task]
        number, usual, what = task.table, task.image_size, f"{options.task} on {options.model}"
        costs = count_dense_cost(options.model, options.task, image_size=given)
        printed = task.paper.get(options.model)
    size = given or usual
    table = Table("part", title=f"{what}, merged, {size[0]} x {size[1]}")
    for title in ("parameters, M", "multiply-adds, G", "mixing, G"):
        table.add_column(title, justify="right")
    for cost in costs:
        style = "bold" if cost.name == "total" else None
        table.add_row(
            cost.name, f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.mixing / 1e9:.3f}", style=style
        )
    if printed is not None and size == usual:
        macs, params = printed
        table.add_row(f"paper, Table {number}", f"{params:g}", f"{macs:g}", "")
    console.print(table)
    console.print("mixing: the application of the dynamic kernels, which the paper's figures leave out")


COMMAND = Command("Parameters and multiply-adds of a model, beside the paper's.", add_options, run)
