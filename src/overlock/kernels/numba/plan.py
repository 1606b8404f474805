"""Kernels called one after another over one workspace, with all arguments prepared for a size of images."""

from __future__ import annotations

import mmap
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from overlock.kernels.numba.runtime import run_all

SLOTS = 40  # 64-bit numbers of a call
ALIGNMENT = 64  # bytes, a line of the cache
KEPT = 256 << 20  # bytes of workspace that a thread keeps between calls
CONSTANT, WORKSPACE, INPUTS = 0, 1, 2  # what a number of a call is counted from; inputs by their order


class Place(NamedTuple):
    """Bytes from the begin of the workspace or of an input."""

    base: int
    offset: int = 0

    def __add__(self, numbers: object) -> Place:
        """The place some float32 numbers on."""
        return Place(self.base, self.offset + 4 * int(numbers))  # type: ignore[call-overload]


def input_place(index: int) -> Place:
    """The begin of one of the tensors that a program is run with."""
    return Place(INPUTS + index)


class Program:
    """Calls of kernels, and the workspace that they share.

    Tensors among the arguments are constants; they are held, and must not move.
    """

    def __init__(self) -> None:
        self.numbers = self.peak = 0
        self._values: list[list[int]] = []
        self._bases: list[list[int]] = []
        self._held: list[Tensor] = []

    def room(self, *shape: int) -> Place:
        """Take room for float32 numbers in the workspace; to give back what was taken last, lower ``numbers``."""
        place = Place(WORKSPACE, 4 * self.numbers)
        self.numbers += -(-int(np.prod(shape)) * 4 // ALIGNMENT) * ALIGNMENT // 4
        self.peak = max(self.peak, self.numbers)
        return place

    def call(self, compiled: Any, jobs: int, *arguments: Place | Tensor | int) -> None:
        """Add a call with arguments as those of :func:`overlock.kernels.numba.runtime.run`."""
        values, bases = [compiled.address, jobs], [CONSTANT, CONSTANT]
        for x in arguments:
            values.append(x.offset if isinstance(x, Place) else x.data_ptr() if isinstance(x, Tensor) else int(x))
            bases.append(x.base if isinstance(x, Place) else CONSTANT)
        self._held += [x for x in arguments if isinstance(x, Tensor)]
        self._values.append(values + [0] * (SLOTS - len(values)))
        self._bases.append(bases + [CONSTANT] * (SLOTS - len(bases)))

    def compile(self) -> Program:
        """End the list of calls."""
        self._template, self._counted = np.array(self._values, np.int64), np.array(self._bases)
        self._most = int(self._template[:, 1].max())
        self._last: tuple[list[int], np.ndarray] = ([], self._template)
        return self

    def run(self, *inputs: Tensor) -> None:
        """Call the kernels over the memory of some tensors."""
        workspace = _workspace.take(self.peak)  # held by this name while the kernels run
        bases = [0, *map(Tensor.data_ptr, (workspace, *inputs))]
        known, calls = self._last  # memory given back and taken again often lies where it did
        if known != bases:
            calls = self._template + np.array(bases)[self._counted]
            self._last = bases, calls
        run_all(calls, self._most)


class _Workspace(threading.local):
    """Memory of a thread for one program after another, kept from call to call.

    Fresh memory comes page by page from the system: at 800 x 1280 pixels that was a seventh of the network's time.
    """

    held: Tensor | None = None

    def take(self, numbers: int) -> Tensor:
        """Room for float32 numbers, until the next call."""
        if self.held is None or self.held.numel() < numbers:
            self.held = None  # before there is more
            taken = _large_pages(numbers)
            if 4 * numbers > KEPT:
                return taken
            self.held = taken
        return self.held


def _large_pages(numbers: int) -> Tensor:
    """Memory in large pages, where the system has them for the asking."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numbers, dtype=torch.float32)
    memory = mmap.mmap(-1, max(4 * numbers, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


_workspace = _Workspace()


def release_workspace() -> int:
    """Give back the memory that this thread keeps for its next call of the fused network.

    Returns:
        How many bytes it was.
    """
    held, _workspace.held = _workspace.held, None
    return 0 if held is None else 4 * held.numel()
