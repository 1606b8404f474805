"""What a fused network does while its kernels for the CPU are not compiled yet: the same work by plain PyTorch.

Half a minute of compilation is much for one picture, and little for a thousand. A job therefore begins without kernels,
and has them compiled beside it as soon as it turns out to be a long one. The results are those of the kernels but for
the rounding of float32.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from torch import nn

from overlock.fused.flat_parameters import Packed
from overlock.fused.layers import Depthwise
from overlock.kernels.numba import cache
from overlock.kernels.numba.compilation import Compilation
from overlock.kernels.numba.contmix import numba_installed
from overlock.ops.dispatch import AUTO, asked_for, backend

PATIENCE = 3.0
"""Seconds of work without kernels from which on they are compiled beside it."""


class _Kernels:
    """Whether they may be called, in this process; those of several threads go by one answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._are_ready = False
        self._compilation: Compilation | None = None
        self._worked = 0.0

    def are_ready(self) -> bool:
        """Whether a call of them costs no compilation, or no more can be done about it."""
        with self._lock:
            ended = self._compilation is not None and self._compilation.has_ended
            self._are_ready = self._are_ready or ended or cache.are_compiled()
            return self._are_ready

    def add_work(self, seconds: float) -> None:
        """Tell how long work without them took."""
        with self._lock:
            self._worked += seconds
            if self._worked < PATIENCE or self._compilation is not None:
                return
            try:
                self._compilation = Compilation()
            except (OSError, TypeError):  # no other process can be started: compile in this one
                self._are_ready = True


_kernels = _Kernels()


@contextlib.contextmanager
def without_waiting(network: nn.Module) -> Iterator[None]:
    """Inside, calls of a fused network do not wait for its kernels to be compiled.

    As long as they are not, plain PyTorch does their work (the backend 'torch'), unless a backend was asked for.

    Args:
        network: that of the calls; where it has no kernels for the CPU, nothing changes.

    Example:
        >>> with without_waiting(network):  # doctest: +SKIP
        ...     logits = network(images)
    """
    if not numba_installed() or asked_for() != AUTO or _kernels.are_ready() or not _has_kernels(network):
        yield
        return
    begin = time.perf_counter()
    with backend("torch"):
        yield
    _kernels.add_work(time.perf_counter() - begin)


def _has_kernels(network: nn.Module) -> bool:
    layers = (module for module in network.modules() if isinstance(module, (Packed, Depthwise)))
    return any(parameter.is_cpu for layer in layers for parameter in layer.parameters())
