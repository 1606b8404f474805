"""Runs numba's loops on PyTorch's own threads; imports numba, so it is imported on use.

A second pool of threads would fight with PyTorch's for the cores: OpenMP's threads spin for a while after each
operation, waiting for the next. GNU's and Intel's OpenMP, which PyTorch on Linux loads for the whole process to see,
start a parallel region for anyone who asks; where neither is found (macOS, Windows), plain threads do the work.

A kernel is compiled for one C signature, void(call, thread, threads); ``call`` points at the record of its arguments
(arguments.py).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from overlock.kernels.numba import cache
from overlock.kernels.numba.arguments import Arguments, Kind
from overlock.kernels.numba.kept import KeptFunction

logger = logging.getLogger(__name__)

# Of the functions that kernels are made of. No "nnan" and "ninf": a NaN must come out as one. Always inlined: an array
# is handed on as seven numbers, so that a call of a few arrays costs as much as a small loop.
OPTIONS: dict[str, Any] = dict(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True, forceinline=True
)
RECORD = types.CPointer(types.int64)
ANY = (1 << 60,)  # shape of an array whose size the kernel knows by its other arguments
C_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


class Kernel:
    """A function compiled for float32 maps, for bfloat16 ones too once they are met, and the arguments of its calls."""

    def __init__(self, function: Callable[..., None], arguments: Arguments):
        self.function, self.arguments = function, arguments
        self._compiled = {torch.float32: _compile(function, arguments, torch.float32)}

    @property
    def compiled(self) -> Any:
        """The function for float32."""
        return self._compiled[torch.float32]

    @property
    def address(self) -> int:
        """Of that function."""
        return self.address_for(torch.float32)

    def compile_for_bfloat16(self) -> None:
        """Do so now, where the kernel has maps."""
        if self.arguments.maps:
            self.address_for(torch.bfloat16)

    def address_for(self, dtype: torch.dtype) -> int:
        """Of the function for maps of a type, compiled now if need be."""
        if dtype not in self._compiled:
            self._compiled[dtype] = _compile(self.function, self.arguments, dtype)
        address: int = self._compiled[dtype].address
        return address


def kernel(**kinds: Kind) -> Callable[[Callable[..., None]], Kernel]:
    """Declare a kernel's arguments; the function is called with their record, a thread's number, and how many threads.

    It reads the arguments as ``call.name``, and how many tasks there are as ``call.tasks``; :func:`task_range` says
    which of them are the thread's own.

    Example:
        >>> @kernel(x=POINTER, count=INT64)
        ... def double(call, thread, threads):
        ...     x = floats(call.x, (call.count,))
        ...     begin, end = task_range(call.tasks, thread, threads)
        ...     for i in range(begin, end):
        ...         x[i] *= 2
        >>> run(double, len(x), x=x, count=len(x))
    """

    def declare(function: Callable[..., None]) -> Kernel:
        return Kernel(function, Arguments(function.__name__, kinds))

    return declare


def _compile(function: Callable[..., None], arguments: Arguments, dtype: torch.dtype) -> Any:
    """Compile now, or take what is kept."""
    options = {name: OPTIONS[name] for name in ("fastmath", "error_model")}  # a C function never holds the lock
    record = arguments.record_type_of(dtype)  # handed on as a pointer
    variant = "" if dtype == torch.float32 else str(dtype).removeprefix("torch.")
    compiled = KeptFunction(function, types.void(record, types.int64, types.int64), options, variant)
    if not compiled.is_kept:
        _tell(f"compiling kernels anew, since there is no place to keep them; set {cache.ENVIRONMENT_VARIABLE} to one")
    elif not compiled.was_kept:
        _tell("compiling kernels for this processor, which is done once and takes about half a minute")
    return compiled


@functools.cache
def _tell(note: str) -> None:
    """Once for all kernels: those of a classifier took 34 s on one core of a Zen 4."""
    logger.info(note)


def run(kernel: Kernel, tasks: int, /, **arguments: Any) -> None:
    """Call a kernel on as many threads as PyTorch uses, at most one a task.

    Args:
        kernel: made by :func:`kernel`.
        tasks: into how many its work is cut.
        arguments: those that it declared, each by its name; tensors are handed on as addresses.

    Raises:
        TypeError: where a name is missing or unknown, or a value is not of its argument's kind.
    """
    layout = kernel.arguments.layout
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in kernel.arguments.flatten(arguments)]
    address = kernel.address_for(kernel.arguments.dtype_of(arguments))
    call = (ctypes.c_int64 * (layout.size // 8))()
    layout.pack_into(call, 0, address, tasks, *values)
    start(address, tasks, ctypes.addressof(call))


def start(address: int, tasks: int, call: int) -> None:
    """Call the kernel at an address with the record at another, as :func:`run` does."""
    threads = max(1, min(torch.get_num_threads(), tasks))
    region = _parallel_region()
    if region is not None:
        region.begin(region.one.address, call, threads, 0)
        return
    function = C_KERNEL(address)
    pool = _pool(os.getpid())
    others = [pool.submit(function, call, i, threads) for i in range(1, threads)]
    function(call, 0, threads)
    for other in others:
        other.result()


def run_all(calls: np.ndarray, most_tasks: int) -> None:
    """Make calls (N, slots), one after another; without a new start of the threads for each where OpenMP is there.

    Args:
        calls: records as int64 numbers, of the length of the longest.
        most_tasks: the largest number of tasks of a call.
    """
    count, slots = calls.shape
    region, first = _parallel_region(), calls.ctypes.data
    if region is None:
        for i in range(count):
            start(int(calls[i, 0]), int(calls[i, 1]), first + 8 * slots * i)
        return
    order = (ctypes.c_int64 * 3)(first, count, slots)
    threads = max(1, min(torch.get_num_threads(), most_tasks))
    region.begin(region.several.address, ctypes.addressof(order), threads, 0)


@njit(**OPTIONS)
def task_range(tasks, thread, threads):
    """First and last (exclusive) task of a thread."""
    return tasks * thread // threads, tasks * (thread + 1) // threads


def _pointer(kind: Any) -> Any:
    @intrinsic
    def point(_typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return point


_float_pointer, _integer_pointer = _pointer(types.float32), _pointer(types.int64)


@njit(**OPTIONS)
def floats(address, shape):
    """The contiguous float32 array of a shape at an address."""
    return carray(_float_pointer(address), shape)


@intrinsic
def _map_pointer(_typing_context: Any, address: Any) -> Any:
    kind = types.uint16 if address == types.uint64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind)(address), generate


@njit(**OPTIONS)
def maps(address, shape):
    """The contiguous array of a map at its address: float32, or the bits of bfloat16, to be read by simd.py."""
    return carray(_map_pointer(address), shape)


@intrinsic
def _call_address(_typing_context: Any, address: Any, call: Any, thread: Any, threads: Any) -> Any:
    """Call the kernel at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        from llvmlite import ir  # noqa: PLC0415

        value_types = [context.get_value_type(x) for x in signature.args[1:]]
        function = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), value_types).as_pointer())
        builder.call(function, arguments[1:])
        return context.get_dummy_value()

    return types.void(address, call, thread, threads), generate


class _Region(NamedTuple):
    """OpenMP's entry point, and functions for it that tell one kernel, or several in turn, their thread."""

    begin: Any
    one: Any
    several: Any


@functools.cache
def _parallel_region() -> _Region | None:
    """None without OpenMP."""
    try:
        begin = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    begin.argtypes, begin.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    number = types.ExternalFunction("omp_get_thread_num", types.int32())
    count = types.ExternalFunction("omp_get_num_threads", types.int32())
    wait = types.ExternalFunction("GOMP_barrier", types.void())

    def one(call):
        _call_address(carray(call, 1)[0], call, types.int64(number()), types.int64(count()))

    def several(order):
        first, calls, slots = carray(order, 3)
        for i in range(calls):
            call = _integer_pointer(first + 8 * slots * i)
            _call_address(carray(call, 1)[0], call, types.int64(number()), types.int64(count()))
            wait()

    return _Region(begin, *(KeptFunction(function, types.void(RECORD), {}) for function in (one, several)))


def prepare_threads() -> None:
    """Compile now what starts the threads, at other times done by the first call of a kernel."""
    _parallel_region()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix=f"overlock-{process}")
