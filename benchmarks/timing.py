"""Timing shared by the benchmarks: candidates interleaved, medians, spread, a table and a CSV."""

from __future__ import annotations

import csv
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


def interleave(candidates: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns, so that a slow spell of the machine hits all alike."""
    for run in candidates.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            _synchronise()
            started = time.perf_counter()
            run()
            _synchronise()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def middle(seconds: list[float]) -> float:
    """Median, in milliseconds."""
    return 1e3 * statistics.median(seconds)


def ratio(seconds: list[float], others: list[float]) -> float:
    """Median over the rounds of one candidate's time over another's in the same round.

    A machine that others share is slower for some seconds and not for the next: two medians may fall into different
    spells, the two times of a round hardly ever do.
    """
    return statistics.median(mine / other for mine, other in zip(seconds, others, strict=True))


def spread(seconds: list[float]) -> float:
    """Distance of the quartiles over the median, in percent."""
    first, _, third = statistics.quantiles(seconds, n=4)
    return 100 * (third - first) / statistics.median(seconds)


@functools.cache
def leave_out(name: str, reason: str) -> None:
    """Say, once, that a candidate cannot run here."""
    Console().print(f"{name} left out: {reason}", soft_wrap=True)


def machine() -> str:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}{load}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def report(title: str, rows: list[dict[str, object]], path: str | None) -> None:
    """Print rows as a table, and write them as CSV where a path is given."""
    table = Table(*rows[0], title=title, caption=machine())
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    Console().print(table)
    if path:
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
