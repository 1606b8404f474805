"""What a sub-command consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console


class Command(NamedTuple):
    """A sub-command: its line in the help, its options, and what it does."""

    summary: str
    add_options: Callable[[ArgumentParser, Sequence[str]], None]
    """Adds options to a parser; the words after the sub-command's name tell which, where they depend on them."""
    run: Callable[[Namespace, Console], int | None]
    """Carries it out; returns an exit code, None for 0."""
