"""Kernels called one after another over one workspace, with all arguments prepared for a size of images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from overlock.ops.threads import start

SLOTS = 40  # 64-bit numbers of a call
ALIGNMENT = 64  # bytes, a line of the cache
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
        self._kernels: list[tuple[int, int]] = []
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
        """Add a call with arguments as those of :func:`overlock.ops.threads.run`."""
        values, bases = [compiled.address, jobs], [CONSTANT, CONSTANT]
        for x in arguments:
            values.append(x.offset if isinstance(x, Place) else x.data_ptr() if isinstance(x, Tensor) else int(x))
            bases.append(x.base if isinstance(x, Place) else CONSTANT)
        self._held += [x for x in arguments if isinstance(x, Tensor)]
        self._kernels.append((compiled.address, jobs))
        self._values.append(values + [0] * (SLOTS - len(values)))
        self._bases.append(bases + [CONSTANT] * (SLOTS - len(bases)))

    def compile(self) -> Program:
        """End the list of calls."""
        self._template, self._counted = np.array(self._values, np.int64), np.array(self._bases)
        return self

    def run(self, *inputs: Tensor) -> None:
        """Call the kernels over the memory of some tensors."""
        workspace = torch.empty(self.peak, dtype=torch.float32)
        bases = np.array([0, workspace.data_ptr(), *(x.data_ptr() for x in inputs)])
        calls = self._template + bases[self._counted]
        place = calls.ctypes.data
        for address, jobs in self._kernels:
            start(address, jobs, place)
            place += 8 * SLOTS
