"""``overlock summary MODEL`` and ``overlock summary --paper``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from overlock.cli.command import Command

if TYPE_CHECKING:
    from overlock.analysis.paper_tables import Figure

CLASSIFY = "classify"


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "model", type=str | None, nargs="?", default=None, metavar="MODEL",
        help="One of OverLoCK's sizes, such as overlock_t.",
    )  # fmt: skip
    parser.add_argument(
        "--paper", action="store_true", help="Count every network of the paper's Tables 2 to 7, beside what they print."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
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
    if options.paper:
        given = [name for name in ("model", "image_size") if options[name] is not None]
        if given or options.task != CLASSIFY:
            raise ValueError(f"--paper counts the paper's networks at its sizes; leave {(given or ['--task'])[0]} out")
        _compare(options.json, console)
    elif options.model is None:
        raise ValueError("required: model, one of OverLoCK's sizes, or --paper for the paper's tables")
    else:
        _summarise(options, console)


def _compare(as_json: bool, console: Console) -> None:
    """The paper's tables beside what is measured."""
    from overlock.analysis.paper_tables import compare_tables  # noqa: PLC0415

    figures = list(compare_tables())
    if as_json:
        rows = [dataclasses.asdict(one) | dict(deviation=one.deviation) for one in figures]
        console.print_json(json.dumps(rows))
        return
    table = Table("table", "network", title="complexity, as published and as measured")
    for title in ("G, published", "measured", "", "M, published", "measured", ""):
        table.add_column(title, justify="right")
    for macs, params in zip(figures[::2], figures[1::2], strict=True):
        table.add_row(str(macs.table), macs.row, *_cells(macs), *_cells(params))
    console.print(table)
    exact = sum(one.deviation == 0 for one in figures)
    worst = max(figures, key=lambda one: abs(one.deviation))
    console.print(
        f"{exact} of {len(figures)} figures are as printed; the others are marked. The farthest is "
        f"{worst.row} of Table {worst.table}, {worst.unit}: {100 * worst.deviation:+.1f} %"
    )


def _cells(figure: Figure) -> tuple[str, str, str]:
    mark = "" if figure.deviation == 0 else f"{100 * figure.deviation:+.1f} %"
    return f"{figure.published:.{figure.digits}f}", f"{figure.measured:.{figure.digits + 2}f}", mark


def _summarise(options: Namespace, console: Console) -> None:
    """The parts of one network."""
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
    if options.json:
        rows = [dataclasses.asdict(cost) for cost in costs]
        console.print_json(json.dumps(dict(model=options.model, task=options.task, image_size=size, parts=rows)))
        return
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
