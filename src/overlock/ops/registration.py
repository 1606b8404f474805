"""Make operators of PyTorch's out of plain functions: shapes, gradients, autocast and vmap, each declared once.

To ``torch.compile`` and ``torch.export`` an operator is one node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("overlock", "FRAGMENT")
DEVICES = ("cpu", "cuda")
CAST = (torch.float32, torch.bfloat16, torch.float16)  # float64 is left alone by PyTorch's autocast too


def register(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, batched: int = 0, cast: int = 0
) -> None:
    """Define ``overlock::name``.

    Args:
        name: of the operator.
        schema: arguments and results.
        run: the function, on CPU and CUDA.
        fake: the same on shapes alone.
        batched: how many arguments, the first ones, have images in their first dimension, as the one result has then:
            to ``torch.vmap`` more images are a larger batch. Where another argument is mapped over, it is called in
            turn.
        cast: how many arguments autocast brings to its dtype.
    """
    torch.library.define(f"overlock::{name}", schema)
    torch.library.impl(f"overlock::{name}", DEVICES, run)
    torch.library.register_fake(f"overlock::{name}", fake)
    _register_vmap(name, batched)
    if cast:
        for device in DEVICES:
            _register_autocast(name, cast, device)


def register_backward(
    name: str, arguments: str, run: Callable[..., Any], *, tensors: int, note: Callable[[], str] = str
) -> None:
    """Define ``overlock::name_backward`` and let autograd take it for the gradients of ``overlock::name``.

    Args:
        name: of the operator.
        arguments: its arguments, tensors first, then numbers.
        run: called with the result's gradient, the note and the arguments; returns a gradient for each tensor, empty
            for None.
        tensors: how many arguments are tensors or None.
        note: called with the operator; what it returns is kept for the gradients, which may be computed in another
            thread and context.
    """

    def fake(_grad: Tensor, _note: str, *inputs: Any) -> Any:
        like = tuple(inputs[0].new_empty(0) if x is None else torch.empty_like(x) for x in inputs[:tensors])
        return like if tensors > 1 else like[0]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs[:tensors])
        ctx.numbers, ctx.note = inputs[tensors:], note()

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        computed = call(grad, ctx.note, *saved, *ctx.numbers)
        computed = computed if tensors > 1 else (computed,)
        wanted = (g if x is not None else None for g, x in zip(computed, saved, strict=True))
        return *wanted, *(None for _ in ctx.numbers)

    results = ", ".join(["Tensor"] * tensors)
    register(f"{name}_backward", f"(Tensor grad, str note, {arguments}) -> ({results})", run, fake)
    call = _operator(f"{name}_backward")
    torch.library.register_autograd(f"overlock::{name}", backward, setup_context=setup_context)


def _operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.overlock, name).default


def _register_vmap(name: str, batched: int) -> None:
    call = _operator(name)

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
    call = _operator(name)

    def autocast(*inputs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        given = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in CAST else x for x in inputs[:cast])
        with torch.autocast(device, enabled=False):
            return call(*given, *inputs[cast:])

    LIBRARY.impl(name, autocast, f"Autocast{device.upper()}")
