"""Make operators of PyTorch's out of plain functions: checks, shapes, autocast and vmap, each declared once.

Gradients are in gradients.py. To ``torch.compile`` and ``torch.export`` an operator is one node.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("overlock", "FRAGMENT")
DEVICES = ("cpu", "cuda")
UNCHECKED: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What operators run, for inputs that were checked before."""
CAST = (torch.float32, torch.bfloat16, torch.float16)  # float64 is left alone by PyTorch's autocast too


def register(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, check: Callable[..., None],
    batched: int = 0, cast: int = 0,
) -> None:  # fmt: skip
    """Define ``overlock::name``.

    Args:
        name: of the operator.
        schema: arguments and results.
        run: the function, on CPU and CUDA.
        fake: the same on shapes alone.
        check: called with the arguments before either, and raises ValueError for those that do not fit.
        batched: how many arguments, the first ones, have images in their first dimension, as the one result has then:
            to ``torch.vmap`` more images are a larger batch. Where another argument is mapped over, it is called in
            turn.
        cast: how many arguments autocast brings to its dtype.
    """
    torch.library.define(f"overlock::{name}", schema)
    UNCHECKED[operator_of(name)] = run
    torch.library.impl(f"overlock::{name}", DEVICES, _checked(run, check))
    torch.library.register_fake(f"overlock::{name}", _checked(fake, check))
    _register_vmap(name, batched)
    if cast:
        for device in DEVICES:
            _register_autocast(name, cast, device)


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        check(*inputs)
        return function(*inputs)

    return call


def operator_of(name: str) -> Callable[..., Any]:
    """``overlock::name``, to be called."""
    return getattr(torch.ops.overlock, name).default


def _register_vmap(name: str, batched: int) -> None:
    call = operator_of(name)

    def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    def in_turn(size: int, in_dims: Sequence[int | None], inputs: Sequence[Any]) -> tuple[Any, Any]:
        each = [
            call(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(size)
        ]
        if isinstance(each[0], Tensor):
            return torch.stack(each), 0
        return tuple(torch.stack(x) for x in zip(*each, strict=True)), (0,) * len(each[0])

    def mapped(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[batched:]):
            return in_turn(size, in_dims, inputs)
        images = (fold(x, dim, size) for x, dim in zip(inputs[:batched], in_dims[:batched], strict=True))
        result = call(*images, *inputs[batched:])
        return result.unflatten(0, (size, result.shape[0] // size)), 0

    torch.library.register_vmap(f"overlock::{name}", mapped)


def _register_autocast(name: str, cast: int, device: str) -> None:
    """Cast to the dtype in force, which ``torch.library.register_autocast`` (of torch 2.7) would fix beforehand."""
    call = operator_of(name)

    def autocast(*inputs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        given = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in CAST else x for x in inputs[:cast])
        with torch.autocast(device, enabled=False):
            return call(*given, *inputs[cast:])

    LIBRARY.impl(name, autocast, f"Autocast{device.upper()}")


def to_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """The result in the type and the layout that ``torch.empty_like`` gives, as an operator's fake promises."""
    if result.stride() == like.stride():  # ``result`` has no gaps, so that empty_like keeps these strides
        return result.to(like.dtype)
    laid_out = torch.empty_like(like)
    return result.to(like.dtype) if result.stride() == laid_out.stride() else laid_out.copy_(result)


def without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off, for what is called with the types that it gave, or is not to get."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


_NOTHING = contextlib.nullcontext()
