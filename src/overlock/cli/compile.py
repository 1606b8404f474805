"""``overlock compile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.cli.command import Command


def add_options(parser: ArgumentParser, _: Sequence[str]) -> None:
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        metavar="DIR",
        help="Folder to put them in, to ship with an image or copy to machines with the same kind of processor; there "
        "OVERLOCK_CACHE=DIR names it. Without it, this installation finds them by itself.",
    )


def run(options: Namespace, console: Console) -> None:
    from overlock.kernels.numba.compilation import compile_all  # noqa: PLC0415

    output = None if options.output is None else Path(options.output)
    with console.status("compiling, which takes about a minute"):
        paths = compile_all(output)
    size = sum(path.stat().st_size for path in paths) / 1e6
    console.print(f"{len(paths)} kernels for this kind of processor, {size:.1f} MB, in {paths[0].parent}")
    if output is not None:
        console.print(f"to use them: OVERLOCK_CACHE={output.absolute()}")


COMMAND = Command("Compile the CPU's kernels ahead, for an image or a container.", add_options, run)
