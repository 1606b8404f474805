"""Plans: kernels called one after another over one workspace, with all arguments prepared for a size of images."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overlock.kernels.numba.arguments import CONSTANT, INPUTS, WORKSPACE, BufferRef
from overlock.kernels.numba.runtime import Kernel, run_all

ALIGNMENT = 64  # bytes, a line of the cache
KEPT = 256 << 20  # bytes of workspace that a thread keeps between calls


def input_buffer(index: int) -> BufferRef:
    """The begin of one of the tensors that a plan is run with."""
    return BufferRef(INPUTS + index)


class Plan:
    """A list of kernel calls, and the workspace that they share.

    Tensors among the arguments are constants; they are held, and must not move.
    """

    def __init__(self) -> None:
        self.peak = 0  # float32 numbers of the workspace
        self._used = 0
        self._records: list[bytes] = []
        self._bases: list[list[int]] = []
        self._constants: list[Tensor] = []

    def alloc(self, *shape: int) -> BufferRef:
        """Take float32 numbers of the workspace."""
        buffer = BufferRef(WORKSPACE, 4 * self._used)
        self._used += -(-math.prod(shape) * 4 // ALIGNMENT) * ALIGNMENT // 4
        self.peak = max(self.peak, self._used)
        return buffer

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """Give back at the end what is taken inside: later calls may write over it."""
        used = self._used
        yield
        self._used = used

    def add(self, kernel: Kernel, tasks: int, /, **arguments: Any) -> None:
        """Add a call, with arguments as those of :func:`overlock.kernels.numba.runtime.run`, or buffers.

        Raises:
            TypeError: where a name is missing or unknown, or a value is not of its argument's kind.
        """
        address = kernel.address_for(kernel.arguments.dtype_of(arguments))
        bases, values = [CONSTANT, CONSTANT], [address, tasks]
        for x in kernel.arguments.flatten(arguments):
            bases.append(x.base if isinstance(x, BufferRef) else CONSTANT)
            values.append(x.offset if isinstance(x, BufferRef) else x.data_ptr() if isinstance(x, Tensor) else x)
        self._constants += [x for x in arguments.values() if isinstance(x, Tensor)]
        self._records.append(kernel.arguments.layout.pack(*values))
        self._bases.append(bases)

    def finish(self) -> Plan:
        """End the list of calls."""
        slots = max(map(len, self._bases))
        records = b"".join(record.ljust(8 * slots, b"\0") for record in self._records)
        self._template = np.frombuffer(records, np.int64).reshape(-1, slots)
        self._base_of = np.array([bases + [CONSTANT] * (slots - len(bases)) for bases in self._bases])
        self._most_tasks = int(self._template[:, 1].max())
        self._last: tuple[list[int], np.ndarray] = ([], self._template)
        return self

    def run(self, *inputs: Tensor) -> None:
        """Call the kernels over the memory of some tensors."""
        workspace = _workspace.take(self.peak)  # held by this name while the kernels run
        bases = [0, *map(Tensor.data_ptr, (workspace, *inputs))]
        known, calls = self._last  # memory given back and taken again often lies where it did
        if known != bases:
            calls = self._template + np.array(bases)[self._base_of]
            self._last = bases, calls
        run_all(calls, self._most_tasks)


class _Workspace(threading.local):
    """Memory of a thread for one plan after another, kept from call to call.

    Fresh memory comes page by page from the system: at 800 x 1280 pixels that was a seventh of the network's time.
    """

    held: Tensor | None = None

    def take(self, numbers: int) -> Tensor:
        """Memory for float32 numbers, until the next call."""
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
