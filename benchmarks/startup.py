"""How long commands and imports take to start, each in a process of its own.

    python benchmarks/startup.py                     # all of it, three rounds
    python benchmarks/startup.py --repeats 7 --csv startup.csv

One picture is classified with nothing compiled (a new, empty folder for kernels each time) and with the kernels
compiled ahead by ``overlock compile``; every command is asked for its help; ``import overlock, timm`` stands beside
``import timm``. Within a part all take turns, and ratios are medians over the rounds. Beside the time that passes
stands that of the processor, which a machine shared with other work lengthens less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from timing import report

from overlock.cli.main import COMMANDS

PICTURE = Path(__file__).parents[1] / "examples" / "photos" / "cat.jpg"


class Seconds(NamedTuple):
    """Of one process."""

    passed: float
    processor: float


def run(*words: str, folder: str | None = None) -> Seconds:
    """Start Python with some words, its compiled kernels in a folder, and wait for its end.

    Raises:
        subprocess.CalledProcessError: where it fails.
    """
    environment = os.environ | ({} if folder is None else {"OVERLOCK_CACHE": folder})
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)
    passed, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(passed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def overlock(*words: str, folder: str | None = None) -> Seconds:
    """The same for the command."""
    return run("-m", "overlock.cli", *words, folder=folder)


def predict_uncompiled() -> Seconds:
    """As the first prediction after an install."""
    with tempfile.TemporaryDirectory() as folder:
        return overlock("predict", str(PICTURE), folder=folder)


def compare(candidates: dict[str, Callable[[], Seconds]], repeats: int) -> list[dict[str, object]]:
    """A row for each candidate: medians of its times, and of their ratios to the last candidate's in the same round."""
    for candidate in candidates.values():  # files are read from the disk once
        candidate()
    rounds = [{name: candidate() for name, candidate in candidates.items()} for _ in range(repeats)]
    base = list(candidates)[-1]

    def row(name: str) -> dict[str, object]:
        own, others = [one[name] for one in rounds], [one[base] for one in rounds]
        return {
            "what": name,
            "s": statistics.median(one.passed for one in own),
            "s of the processor": statistics.median(one.processor for one in own),
            "over the last": statistics.median(a.passed / b.passed for a, b in zip(own, others, strict=True)),
            "the same, of the processor": statistics.median(
                a.processor / b.processor for a, b in zip(own, others, strict=True)
            ),
        }

    return [row(name) for name in candidates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="Rounds of each part.")
    parser.add_argument("--csv", default=None, help="File to write all figures to.")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        compiled = overlock("compile", "--output", folder)
        rows += compare(
            {
                "predict, nothing compiled": predict_uncompiled,
                "predict, compiled": lambda: overlock("predict", str(PICTURE), folder=folder),
            },
            options.repeats,
        )
    blank = dict.fromkeys(rows[0], "")
    rows.append(blank | {"what": "compile, once", "s": compiled.passed, "s of the processor": compiled.processor})
    helps = {f"{name} --help": (name, "--help") for name in COMMANDS}
    lines = {"--version": ("--version",), **helps, "--help": ("--help",)}
    rows += compare({name: lambda words=words: overlock(*words) for name, words in lines.items()}, options.repeats)
    imports = {f"import {names}": names for names in ("overlock", "overlock, timm", "timm")}
    rows += compare(
        {name: lambda names=names: run("-c", f"import {names}") for name, names in imports.items()}, options.repeats
    )
    report("Starting", rows, options.csv)


if __name__ == "__main__":
    main()
