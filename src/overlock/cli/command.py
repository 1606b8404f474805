"""What a sub-command consists of, and the options that several of them have."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from overlock.extras import missing_extra
from overlock.files import Outputs

NOUNS = dict(classify="classifier", detect="detector", segment="segmenter")
"""What a network is called, by its task."""


class Command(NamedTuple):
    """A sub-command: its line in the help, its options, and what it does."""

    summary: str
    add_options: Callable[[ArgumentParser, Sequence[str]], None]
    """Adds options to a parser; the words after the sub-command's name tell which, where they depend on them."""
    run: Callable[[Namespace, Console], int | None]
    """Carries it out; returns an exit code, None for 0."""


def add_runtime(parser: ArgumentParser) -> None:
    """The options of where, and in which precision, a network runs."""
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ...; a GPU if there is one.")
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16", "fp16"], default="fp32", help="Precision of the network."
    )


def add_limits(parser: ArgumentParser) -> None:
    """The options of what a detector gives at most."""
    parser.add_argument(
        "--max_detections", type=int | None, default=None, help="detect: most objects of an image; 100 unless given."
    )
    parser.add_argument(
        "--nms_iou",
        type=float | None,
        default=None,
        help="detect: IoU from which on non-maximum suppression drops a box; 0.5 unless given.",
    )


def add_averaging(parser: ArgumentParser) -> None:
    """The options of how a segmenter looks at an image."""
    parser.add_argument(
        "--scales",
        type=list[float] | None,
        default=None,
        metavar="SCALE ...",
        help="segment: scales to average over, such as 0.5 1 1.5; 1 unless given.",
    )
    parser.add_argument("--flip", action="store_true", help="segment: average over the mirrored image too.")
    parser.add_argument("--window", type=int | None, default=None, help="segment: side of a sliding window in pixels.")
    parser.add_argument(
        "--stride", type=int | None, default=None, help="segment: its stride; two thirds of the window unless given."
    )


def check_task(options: Namespace, task: str, table: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The given ones of a task's options.

    Args:
        options: of which those of tasks are None, or False, unless given.
        task: at hand.
        table: the options of each task.

    Raises:
        ValueError: where one is given that this task does not have.
    """
    given = given_of(options, [name for names in table.values() for name in names])
    for name in given:
        if name not in table[task]:
            owners = " and ".join(f"{NOUNS[other]}s" for other, names in table.items() if name in names)
            *most, last = (f"--{own}" for own in table[task])
            takes = f"{', '.join(most)} and {last}" if most else last
            raise ValueError(f"--{name} is for {owners}; a {NOUNS[task]} takes {takes}")
    return given


def given_of(options: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that are given, of those that are None, or False, unless given."""
    values = {name: options[name] for name in names}
    return {name: value for name, value in values.items() if value is not None and value is not False}


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM, as schedulers send it, ends the work as Ctrl-C does: what is open is closed first."""

    def end(signum: int, _: object) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def needing_training() -> Iterator[None]:
    """Inside, an import of what training needs.

    Raises:
        ImportError: where a package is not installed, with what to do.
    """
    try:
        yield
    except ImportError as error:
        raise missing_extra(f"training needs a package that is not installed ({error.name})", "train") from None


def add_overwrite(parser: ArgumentParser) -> None:
    """Leave to replace what a command finds where it writes; see :class:`overlock.files.Outputs`."""
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace files that are there already, but never what is read."
    )


def add_target(parser: ArgumentParser, name: str) -> None:
    """The options that :func:`claim_target` reads: the file to write, and leave to replace it."""
    required = dict(required=True) if name.startswith("--") else {}
    parser.add_argument(name, type=str, metavar="OUT.safetensors", help="File to write.", **required)
    add_overwrite(parser)


def claim_target(name: str, inputs: Iterable[str], *, overwrite: bool) -> Path:
    """The path of a file of weights to write, made from others.

    Raises:
        ValueError: where its name has another ending, or :class:`overlock.files.Outputs` refuses it.
    """
    path = Path(name)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a file of weights must end in .safetensors")
    return Outputs(inputs, overwrite=overwrite).claim(path)
