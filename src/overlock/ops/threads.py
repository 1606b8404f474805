"""Runs numba's loops on PyTorch's own threads; imports numba, so it is imported on use.

A second pool of threads would fight with PyTorch's for the cores: OpenMP's threads spin for a while after each
operation, waiting for the next. GNU's and Intel's OpenMP, which PyTorch on Linux loads for the whole process to see,
start a parallel region for anyone who asks; where neither is found (macOS, Windows), plain threads do the work.

A kernel is compiled for one signature, void(call, thread, threads); ``call`` holds the addresses and sizes it needs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

# No "nnan" and "ninf": a NaN must come out as one.
OPTIONS: dict[str, Any] = dict(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
CALL = types.CPointer(types.int64)
KERNEL = types.void(CALL, types.int64, types.int64)
C_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def kernel(function: Callable[..., None]) -> Any:
    """Compile now for the one signature, and cache where there is a place to write."""
    options = {name: value for name, value in OPTIONS.items() if name != "nogil"}  # C functions never hold the lock
    try:
        return cfunc(KERNEL, cache=True, **options)(function)
    except RuntimeError:  # no writable place for the cache
        return cfunc(KERNEL, **options)(function)


def run(compiled: Any, jobs: int, *arguments: Tensor | int) -> None:
    """Call a kernel on as many threads as PyTorch uses, at most one a job.

    Args:
        compiled: made by :func:`kernel`; it divides the jobs by :func:`share`.
        jobs: how many there are.
        arguments: tensors, handed on as addresses, and integers; the kernel finds them in ``call`` from index 2 on.
    """
    numbers = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    call = (ctypes.c_int64 * (2 + len(numbers)))(compiled.address, jobs, *numbers)
    start(compiled.address, jobs, ctypes.addressof(call))


def start(address: int, jobs: int, call: int) -> None:
    """Call the kernel at an address with the call at another, as :func:`run` does."""
    threads = max(1, min(torch.get_num_threads(), jobs))
    region = _parallel_region()
    if region is not None:
        begin, trampoline, _ = region
        begin(trampoline, call, threads, 0)
        return
    function = C_KERNEL(address)
    pool = _pool(os.getpid())
    others = [pool.submit(function, call, i, threads) for i in range(1, threads)]
    function(call, 0, threads)
    for other in others:
        other.result()


@njit(**OPTIONS)
def share(call, thread, threads):
    """First and last (exclusive) job of a thread."""
    return call[1] * thread // threads, call[1] * (thread + 1) // threads


@intrinsic
def _float_pointer(_typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


@njit(**OPTIONS)
def floats(address, shape):
    """The contiguous float32 array of a shape at an address."""
    return carray(_float_pointer(address), shape)


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


@functools.cache
def _parallel_region() -> tuple[Any, int, Any] | None:
    """OpenMP's entry point, the address of a function for it that tells a kernel its thread, and that function.

    None without OpenMP.
    """
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    number = types.ExternalFunction("omp_get_thread_num", types.int32())
    count = types.ExternalFunction("omp_get_num_threads", types.int32())

    @cfunc(types.void(CALL))
    def trampoline(call):
        _call_address(carray(call, 1)[0], call, types.int64(number()), types.int64(count()))

    return start, trampoline.address, trampoline


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix=f"overlock-{process}")
