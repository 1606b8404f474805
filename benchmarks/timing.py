"""Timing shared by the benchmarks: candidates interleaved, medians, spread, a table and a CSV.

It needs nothing but PyTorch, as benchmarks/gpu.py may find nothing more.
"""

from __future__ import annotations

import csv
import functools
import logging
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

HEAD_START = 20_000_000  # cycles for which a GPU waits while calls are queued, some 10 ms


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def interleave(candidates: dict[str, Callable[[], object]], *, repeats: int, rest: float = 0) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns, so that a slow spell of the machine hits all alike.

    With ``rest``, so many seconds pass before each turn, since a runtime's threads stay awake for a while after a call;
    then one call is not timed.
    """
    for run in candidates.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            if rest:
                time.sleep(rest)
                run()
            _synchronise()
            started = time.perf_counter()
            run()
            _synchronise()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def interleave_queued(
    candidates: dict[str, Callable[[], object]], *, repeats: int, calls: int
) -> dict[str, list[float]]:
    """As :func:`interleave`, of calls that wait in a GPU's queue: without their launch, as far as the host keeps up."""
    if not torch.cuda.is_available():
        return interleave(candidates, repeats=repeats)
    for run in candidates.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            stop.synchronize()
            seconds[name].append(start.elapsed_time(stop) / 1e3 / calls)
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
    say(f"{name} left out: {reason}")
    if sys.exc_info()[0] is not None:
        logger.debug("%s:", name, exc_info=True)


def machine() -> str:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}{load}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def report(title: str, rows: list[dict[str, object]], path: str | Path | None) -> None:
    """Print rows as a table, and write them as CSV where a path is given."""
    texts = [[*rows[0]], *([_text(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for line in ([title], *texts, [machine()]):
        say("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)).rstrip())
    if path:
        write_csv(rows, path)


def write_csv(rows: list[dict[str, object]], path: str | Path) -> None:
    """All rows, which may lack some of the others' columns."""
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _text(x: object) -> str:
    return f"{x:.4g}" if isinstance(x, float) else str(x)
