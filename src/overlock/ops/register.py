"""Make an operator of PyTorch's out of plain functions: shapes, gradients, autocast and vmap, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("overlock", "FRAGMENT")
DEVICES = ("cpu", "cuda")
CAST = (torch.float32, torch.bfloat16, torch.float16)  # float64 is left alone by PyTorch's autocast too


def register(
    name: str, arguments: str, forward: Callable, backward: Callable, fake: Callable,
    *, tensors: int, batched: int, cast: int,
) -> None:  # fmt: skip
    """Define ``overlock::name`` and its backward operator, each one node to ``torch.compile`` and ``torch.export``.

    Args:
        name: of the operator.
        arguments: as in a schema; tensors first, then numbers.
        forward: called with the arguments; returns one tensor.
        backward: called with the output's gradient and the arguments; returns the gradient of each tensor, of None an
            empty one.
        fake: as ``forward``, on shapes alone.
        tensors: how many arguments are tensors or None.
        batched: how many of them, the first ones, have images in their first dimension; the others are parameters.
        cast: how many of them autocast brings to its dtype.
    """
    operator, reverse = f"overlock::{name}", f"overlock::{name}_backward"
    torch.library.define(operator, f"({arguments}) -> Tensor")
    torch.library.define(reverse, f"(Tensor grad, {arguments}) -> ({', '.join(['Tensor'] * tensors)})")
    torch.library.impl(operator, DEVICES, forward)
    torch.library.impl(reverse, DEVICES, backward)
    torch.library.register_fake(operator, fake)

    def fake_backward(_: Tensor, *inputs: Any) -> Any:
        like = tuple(inputs[0].new_empty(0) if x is None else torch.empty_like(x) for x in inputs[:tensors])
        return like if tensors > 1 else like[0]

    torch.library.register_fake(reverse, fake_backward)
    call, call_reverse = (getattr(torch.ops.overlock, n).default for n in (name, f"{name}_backward"))
    _register_autograd(operator, call_reverse, tensors)
    _register_vmap(operator, call, batched)
    _register_autocast(name, call, cast)


def _register_autograd(operator: str, backward: Callable, tensors: int) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs[:tensors])
        ctx.numbers = inputs[tensors:]

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        computed = backward(grad, *saved, *ctx.numbers)
        computed = computed if tensors > 1 else (computed,)
        wanted = (g if x is not None else None for g, x in zip(computed, saved, strict=True))
        return *wanted, *(None for _ in ctx.numbers)

    torch.library.register_autograd(operator, run_backward, setup_context=setup_context)


def _register_vmap(operator: str, call: Callable[..., Tensor], batched: int) -> None:
    """More images are a larger batch; several sets of parameters are as many calls."""

    def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    def vmapped(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        if any(dim is not None for dim in in_dims[batched:]):
            each = [
                call(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
                for i in range(size)
            ]
            return torch.stack(each), 0
        maps = [fold(x, dim, size) for x, dim in zip(inputs[:batched], in_dims[:batched], strict=True)]
        result = call(*maps, *inputs[batched:])
        return result.unflatten(0, (size, result.shape[0] // size)), 0

    torch.library.register_vmap(operator, vmapped)


def _register_autocast(name: str, call: Callable[..., Tensor], cast: int) -> None:
    """Cast to the dtype in force, which ``torch.library.register_autocast`` (torch 2.7) would fix beforehand."""

    def make_kernel(device: str) -> Callable[..., Tensor]:
        def autocast(*inputs: Any) -> Tensor:
            dtype = torch.get_autocast_dtype(device)
            given = [x.to(dtype) if isinstance(x, Tensor) and x.dtype in CAST else x for x in inputs[:cast]]
            with torch.autocast(device, enabled=False):
                return call(*given, *inputs[cast:])

        return autocast

    for device in DEVICES if cast else ():
        LIBRARY.impl(name, make_kernel(device), f"Autocast{device.upper()}")
