"""The arguments of a kernel, by name: one declaration makes the record that Python fills and numba reads.

All kernels have one C signature, ``void(call, thread, threads)``, so that any of them can follow any other in a list of
calls. ``call`` points at a record of named fields: the kernel's own address, into how many tasks its work is cut, and
the arguments that :func:`overlock.kernels.numba.runtime.kernel` declared. Each field is of eight bytes, or several.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import from_dtype
from torch import Tensor

CONSTANT, WORKSPACE, INPUTS = 0, 1, 2  # what an address is counted from; inputs by their order


class BufferRef(NamedTuple):
    """An address that is known when a plan runs: bytes from the begin of its workspace, or of one of its inputs."""

    base: int
    offset: int = 0

    def __add__(self, numbers: object) -> BufferRef:
        """The address some float32 numbers on."""
        return BufferRef(self.base, self.offset + 4 * int(numbers))  # type: ignore[call-overload]


Pointer = Tensor | BufferRef


class Kind(NamedTuple):
    """What an argument is.

    Attributes:
        dtype: its field in the record.
        format: the same for ``struct``.
        convert: brings a value to it; called for each argument of each call of an operator, so best a builtin.
        is_several: whether ``convert`` gives several numbers.
        is_map: whether it is the address of a map, or several, all of a call's of one type.
    """

    dtype: Any
    format: str
    convert: Callable[[Any], Any]
    is_several: bool = False
    is_map: bool = False


def _pointer_to(*dtypes: torch.dtype) -> Callable[[Any], Any]:
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in dtypes:
                raise TypeError(f"a {wanted} tensor is wanted, got {value.dtype}")
        elif value is None:  # what the flags of this call leave unread
            return 0
        elif not isinstance(value, BufferRef):
            raise TypeError(f"a tensor or a buffer of the plan is wanted, got {type(value).__name__}")
        return value

    return convert


def _strides(value: Any) -> tuple[Any, ...]:
    strides = tuple(map(operator.index, value))
    if len(strides) != 4:
        raise TypeError(f"four strides are wanted, got {len(strides)}")
    return strides


POINTER = Kind(np.int64, "q", _pointer_to(torch.float32))  # to float32 numbers
MAP = Kind(np.int64, "q", _pointer_to(torch.float32, torch.bfloat16), is_map=True)  # to those of a map
INT64 = Kind(np.int64, "q", operator.index)
FLOAT64 = Kind(np.float64, "d", float)
STRIDES = Kind((np.int64, 4), "4q", _strides, is_several=True)  # of four dimensions, in numbers


def _unsigned(dtype: Any) -> Any:
    return (np.uint64, dtype[1]) if isinstance(dtype, tuple) else np.uint64


class Arguments:
    """Names and kinds of a kernel's arguments.

    Args:
        kernel: its name, for messages.
        kinds: of the arguments, in the order of the record.
    """

    def __init__(self, kernel: str, kinds: Mapping[str, Kind]):
        self.kernel, self.kinds, self.names = kernel, dict(kinds), set(kinds)
        self._rows = [(name, kind.convert, kind.is_several) for name, kind in kinds.items()]
        self.maps = [name for name, kind in kinds.items() if kind.is_map and not kind.is_several]
        self.layout = struct.Struct("=qq" + "".join(kind.format for kind in kinds.values()))
        self.record_type = self.record_type_of(torch.float32)

    def record_type_of(self, dtype: torch.dtype) -> Any:
        """The record as numba reads it where maps have a dtype: addresses of bfloat16 are unsigned, so that code can
        tell (:func:`overlock.kernels.numba.runtime.maps`)."""
        is_half = dtype == torch.bfloat16
        fields = [
            (n, _unsigned(kind.dtype) if kind.is_map and is_half else kind.dtype) for n, kind in self.kinds.items()
        ]
        return from_dtype(np.dtype([("function", np.int64), ("tasks", np.int64), *fields], align=True))

    def dtype_of(self, given: Mapping[str, Any]) -> torch.dtype:
        """Of a call's maps.

        Raises:
            TypeError: where they have several.
        """
        dtype = None
        for name in self.maps:
            x = given.get(name)
            if isinstance(x, Tensor) and x.dtype != dtype:
                if dtype is not None:
                    found = " and ".join(sorted((str(dtype), str(x.dtype))))
                    raise TypeError(f"{', '.join(self.maps)} of {self.kernel} are to be of one type, got {found}")
                dtype = x.dtype
        return dtype or torch.float32

    def flatten(self, given: Mapping[str, Any]) -> list[Any]:
        """The values in the order of the record; tensors and buffers as they are.

        Raises:
            TypeError: where a name is missing or unknown, or a value is not of its argument's kind.
        """
        if given.keys() != self.names:
            names = (("lacks", self.names - given.keys()), ("has no", given.keys() - self.names))
            wrong = ", ".join(f"{what} {', '.join(sorted(which))}" for what, which in names if which)
            raise TypeError(f"a call of {self.kernel} {wrong}; its arguments are {', '.join(self.kinds)}")
        values: list[Any] = []
        name = ""
        try:
            for name, convert, is_several in self._rows:
                if is_several:
                    values += convert(given[name])
                else:
                    values.append(convert(given[name]))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} of {self.kernel}: {error}") from None
        return values
