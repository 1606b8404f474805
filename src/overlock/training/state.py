"""Checkpoints that are whole or not there, and what a run needs to go on from one."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


@dataclass
class Progress:
    """Where a run is."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps of the present epoch done."""
    counted: int = 0
    """Those of them that changed the weights."""
    bad: int = 0
    """Steps just before this one, in a row, without a finite loss and gradient."""
    skipped: int = 0
    """All such steps."""
    rollbacks: int = 0
    """Times the run went back to a checkpoint; gives the random changes after it another seed."""
    best: float = -1.0
    """The best test so far."""
    seconds: float = 0.0
    """Spent on training and testing, over all sessions."""
    epoch_seconds: float = 0.0
    """Spent on the present epoch's steps."""


class CheckpointStore:
    """The folder of a run's checkpoints: the last one, and the one before it.

    A checkpoint is written under another name, forced to the disk, and then renamed; so a file with a checkpoint's name
    is a whole one, whenever the process or the machine stops.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def last(self) -> Path:
        return self.folder / LAST

    @property
    def previous(self) -> Path:
        return self.folder / PREVIOUS

    def write(self, save: Callable[[Path], None], *, first_process: bool = True) -> None:
        """Write a new last checkpoint.

        Args:
            save: writes to a path; called on all processes.
            first_process: whether this one handles the files.

        Raises:
            ValueError: where that is not possible; then the checkpoints are as they were.
        """
        partial = self.folder / f".{LAST}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(partial)
            if not first_process:
                return
            sync(partial)
            if self.last.exists():
                self.last.replace(self.previous)
            partial.replace(self.last)
            sync(self.folder)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                partial.unlink()
            raise ValueError(self._why_not(error)) from None

    def _why_not(self, error: Exception) -> str:
        torch_says = ("file write failed", "unexpected pos")
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = full or any(words in str(error) for words in torch_says)
        reason = "the disk is full" if full else " ".join(str(error).split())[:200]
        kept = f"the run can go on from {self.last}" if self.last.exists() else "there is none yet"
        return f"{self.folder}: a checkpoint cannot be written ({reason}); {kept}: make room and repeat with --resume"

    def candidates(self) -> list[Path]:
        """The checkpoints there are, the newest first."""
        return [path for path in (self.last, self.previous) if path.is_file()]

    def find_good(self) -> tuple[Path, list[str]]:
        """The newest checkpoint without damage, and what is wrong with those passed over.

        Raises:
            ValueError: where there is none.
        """
        problems: list[str] = []
        for path in self.candidates():
            problem = check_archive(path)
            if problem is None:
                return path, problems
            problems.append(problem)
        if problems:
            raise ValueError(f"no checkpoint can be read: {'; '.join(problems)}; begin again with --overwrite")
        raise ValueError(f"{self.folder}: there is no checkpoint to go on from; leave --resume out")


def check_archive(path: Path) -> str | None:
    """What is wrong with a file of torch.save, by the checksums in it; None if nothing.

    torch.load does not compare them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return f"{path} is damaged ({error})"
    return f"{path} is damaged (in {damaged})" if damaged else None


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the settings that differ."""
    names = []
    for name in old.keys() | new.keys():
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            names += differing(before, after, f"{prefix}{name}.")
        elif before != after:
            names.append(f"{prefix}{name}")
    return sorted(names)
