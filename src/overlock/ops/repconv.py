"""The branches of a Dilated RepConv and their batch norms by the batch's own statistics, as one operation to train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from overlock.kernels.torch import repconv as plain
from overlock.ops.checks import Inputs, check_gradient
from overlock.ops.dispatch import TABLE, asked_for, choose, run
from overlock.ops.gradients import register_autograd, register_plain_autograd
from overlock.ops.registration import register, to_layout_of

NAME = "dilated_repconv"
_INPUTS = Inputs(NAME, x="B C H W", taps="T C", scale="N C", shift="N C")


def dilated_repconv(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], shifts: Sequence[Tensor],
    dilations: Sequence[int], eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum over branches of batch norms of depthwise convolutions, the norms by the statistics of this batch.

    Args:
        x: (B, C, H, W).
        weights: (C, 1, k, k) of each branch, k odd.
        scales, shifts: (C,) of each branch's batch norm.
        dilations: of each branch.
        eps: of the batch norms.

    Returns:
        (B, C, H, W) in the dtype and layout of ``x``, then means and variances (N, C) of the branches' results, to
        move running statistics by; these have no gradients.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    taps = torch.cat([weight.flatten(1) for weight in weights], 1).t()
    sizes = [weight.shape[3] for weight in weights]
    y, _, mean, variance = torch.ops.overlock.dilated_repconv(
        x, taps, torch.stack(list(scales)), torch.stack(list(shifts)), sizes, list(dilations), eps
    )
    return y, mean.detach(), variance.detach()


def _check(
    x: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, sizes: Sequence[int], dilations: Sequence[int], _eps: float
) -> None:
    _INPUTS.check(x, taps, scale, shift, T=sum(k * k for k in sizes), N=len(sizes))
    if len(dilations) != len(sizes) or any(k % 2 == 0 or k < 3 for k in sizes) or min(dilations) < 1:
        raise ValueError(
            f"{NAME} wants an odd kernel size from 3 on and a dilation from 1 on for each branch;"
            f" got {list(sizes)} and {list(dilations)}"
        )


def _forward(x: Tensor, taps: Tensor, *call: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    y, kept, mean, variance = run(NAME, asked_for(), x, taps, *call)
    return to_layout_of(x, y), kept, mean, variance


def _fake(
    x: Tensor, _taps: Tensor, scale: Tensor, _shift: Tensor, sizes: Sequence[int], *_: Any
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    kept = plain.new_kept(x, len(sizes))
    exact = torch.promote_types(scale.dtype, torch.float32)
    return torch.empty_like(x), kept, torch.empty_like(scale, dtype=exact), torch.empty_like(scale, dtype=exact)


register(
    NAME,
    "(Tensor x, Tensor taps, Tensor scale, Tensor shift, int[] sizes, int[] dilations, float eps)"
    " -> (Tensor, Tensor[], Tensor, Tensor)",
    _forward, _fake, check=_check, cast=1,
)  # fmt: skip


def _backward_check(
    grad: Tensor, _backend: str, x: Tensor, taps: Tensor, scale: Tensor, _kept: Sequence[Tensor], mean: Tensor,
    variance: Tensor, sizes: Sequence[int], dilations: Sequence[int], eps: float, *_: Any,
) -> None:  # fmt: skip
    _check(x, taps, scale, scale, sizes, dilations, eps)
    _INPUTS.check(x, taps, mean, variance, N=len(sizes))
    check_gradient(f"{NAME}_backward", grad, x.shape)


def _run_backward(grad: Tensor, backend: str, x: Tensor, taps: Tensor, scale: Tensor, *call: Any) -> tuple[Tensor, ...]:
    wanted = call[-2:]
    gradients_of: Any = TABLE[NAME][choose(NAME, backend, x, taps, scale, *call)].backward
    of_x, of_taps, of_scale, of_shift = gradients_of(grad, x, taps, scale, *call[:-2], wanted)
    return (
        to_layout_of(x, of_x) if wanted[0] else x.new_empty(0),
        of_taps.to(taps.dtype).contiguous() if wanted[1] else taps.new_empty(0),
        of_scale.to(scale.dtype),
        of_shift.to(scale.dtype, copy=True),
    )


def _backward_fake(
    _grad: Tensor, _backend: str, x: Tensor, taps: Tensor, scale: Tensor, *call: Any
) -> tuple[Tensor, ...]:
    wanted = call[-2:]
    of_taps = taps.new_empty(taps.shape) if wanted[1] else taps.new_empty(0)
    return (
        torch.empty_like(x) if wanted[0] else x.new_empty(0),
        of_taps,
        torch.empty_like(scale),
        torch.empty_like(scale),
    )


register(
    f"{NAME}_backward",
    "(Tensor grad, str backend, Tensor x, Tensor taps, Tensor scale, Tensor[] kept, Tensor mean, Tensor variance,"
    " int[] sizes, int[] dilations, float eps, bool of_x, bool of_taps) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _backward_fake, check=_backward_check,
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], Tensor, Tensor]) -> None:
    x, taps, scale, _, *ctx.numbers = inputs
    _, kept, mean, variance = output
    ctx.save_for_backward(x, taps, scale, mean, variance, *kept)
    ctx.set_materialize_grads(False)  # else zeros for all that is kept
    ctx.backend = asked_for()


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, taps, scale, mean, variance, *kept = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    computed = torch.ops.overlock.dilated_repconv_backward(
        grad, ctx.backend, x, taps, scale, kept, mean, variance, *ctx.numbers, *wanted[:2]
    )
    return *(g if is_wanted else None for g, is_wanted in zip(computed, wanted[:4], strict=True)), None, None, None


def _plain_backward(
    grad: Tensor, _backend: str, x: Tensor, taps: Tensor, scale: Tensor, kept: Sequence[Tensor], *call: Any
) -> tuple[Tensor, ...]:
    wanted = call[-2:]
    gradients_of: Any = plain.backward
    of_x, of_taps, *others = gradients_of(grad, x, taps, scale, kept, *call[:-2], wanted)
    return of_x if wanted[0] else x.new_empty(0), of_taps if wanted[1] else taps.new_empty(0), *others


register_autograd(NAME, _backward, setup_context=_save, plain=plain.forward)
register_plain_autograd(f"{NAME}_backward", _plain_backward)
