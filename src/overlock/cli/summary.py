"""``overlock summary MODEL``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from overlock.cli.command import Command


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument("model", type=str, metavar="MODEL", help="One of OverLoCK's sizes, such as overlock_t.")
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), default=[224, 224], help="Height and width in pixels."
    )


def run(options: Namespace, console: Console) -> None:
    from overlock.analysis import count_cost  # noqa: PLC0415
    from overlock.checkpoint import check_model_name  # noqa: PLC0415
    from overlock.network import VARIANTS  # noqa: PLC0415

    check_model_name(options.model)
    height, width = options.image_size
    costs = count_cost(options.model, image_size=(height, width))
    table = Table("part", title=f"{options.model}, merged, {height} x {width}")
    for title in ("parameters, M", "multiply-adds, G", "mixing, G"):
        table.add_column(title, justify="right")
    for cost in costs:
        style = "bold" if cost.name == "total" else None
        table.add_row(
            cost.name, f"{cost.params / 1e6:.3f}", f"{cost.macs / 1e9:.3f}", f"{cost.mixing / 1e9:.3f}", style=style
        )
    paper = VARIANTS[options.model].paper
    if paper is not None and (height, width) == (224, 224):
        table.add_row("paper, Table 2", f"{paper.params:g}", f"{paper.macs:g}", "")
    console.print(table)
    console.print("mixing: the application of the dynamic kernels, which the paper's figures leave out")


COMMAND = Command("Parameters and multiply-adds of a model, beside the paper's.", add_options, run)
