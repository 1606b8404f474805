"""Every complexity figure of Tables 2 to 7 that this package has a network for, as printed and as measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from overlock.ablation import MIXERS, ROADMAP, Row
from overlock.analysis.cost import Cost, count_cost, count_network
from overlock.analysis.model_cost import DENSE_TASKS, count_dense_cost
from overlock.network import VARIANTS

DIGITS = {2: (1, 0), 3: (0, 0), 4: (0, 0), 5: (0, 0), 6: (1, 1), 7: (1, 1)}
"""Digits after the point that a table prints of multiply-adds in G, and of parameters in M."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of the paper."""

    table: int
    row: str
    """As the paper has it, or the model's name."""
    unit: str
    """'multiply-adds, G' or 'parameters, M'."""
    digits: int
    """That the table prints after the point."""
    published: float
    measured: float

    @property
    def deviation(self) -> float:
        """Of the measured from the published, as a share of this; 0 where both are the same as printed."""
        return 0.0 if round(self.measured, self.digits) == self.published else self.measured / self.published - 1


def compare_tables() -> Iterator[Figure]:
    """All figures, table by table, counted on shapes alone.

    Raises:
        ImportError: for Table 5 without transformers.
    """
    for model, variant in VARIANTS.items():
        if variant.paper is not None:
            printed = variant.paper.macs, variant.paper.params
            yield from _figures(2, model, printed, count_cost(model)[-1])
    for name, task in sorted(DENSE_TASKS.items(), key=lambda item: item[1].table):
        for model, printed in task.paper.items():
            yield from _figures(task.table, f"{name} on {model}", printed, count_dense_cost(model, name)[-1])
    for table, rows in ((6, ROADMAP), (7, MIXERS)):
        for row in rows.values():
            if row.paper is not None:
                yield from _figures(table, row.title, (row.paper.macs, row.paper.params), _count_row(row))


def _count_row(row: Row) -> Cost:
    with torch.device("meta"):
        return count_network(row.build(deploy=True).eval())


def _figures(table: int, row: str, printed: tuple[float, float], cost: Cost) -> Iterator[Figure]:
    units, measured = ("multiply-adds, G", "parameters, M"), (cost.macs / 1e9, cost.params / 1e6)
    for unit, digits, published, value in zip(units, DIGITS[table], printed, measured, strict=True):
        yield Figure(table=table, row=row, unit=unit, digits=digits, published=published, measured=value)
