"""What a sub-command consists of, and the file of weights that some of them write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console


class Command(NamedTuple):
    """A sub-command: its line in the help, its options, and what it does."""

    summary: str
    add_options: Callable[[ArgumentParser, Sequence[str]], None]
    """Adds options to a parser; the words after the sub-command's name tell which, where they depend on them."""
    run: Callable[[Namespace, Console], int | None]
    """Carries it out; returns an exit code, None for 0."""


def add_runtime(parser: ArgumentParser) -> None:
    """The options of where, and in which precision, a network runs."""
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ...; a GPU where there is one.")
    parser.add_argument(
        "--precision", type=Literal["fp32", "bf16", "fp16"], default="fp32", help="Of the network's arithmetic."
    )


def add_target(parser: ArgumentParser, name: str) -> None:
    """The options that :func:`check_target` reads: the file to write, and leave to replace it."""
    required = dict(required=True) if name.startswith("--") else {}
    parser.add_argument(name, type=str, metavar="OUT.safetensors", help="File to write.", **required)
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")


def check_target(name: str, *, force: bool) -> Path:
    """The path of a file of weights to write.

    Raises:
        ValueError: where its name has another ending, or, without ``force``, where it exists.
    """
    path = Path(name)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a file of weights must end in .safetensors")
    if path.exists() and not force:
        raise ValueError(f"{path}: exists already; choose another name or pass --force")
    return path
