"""Global response norm, in training in two passes over memory forward and two backward."""

from __future__ import annotations

import torch
from torch import Tensor

from overlock.kernels.torch import grn as plain
from overlock.ops.checks import Inputs
from overlock.ops.dispatch import asked_for, run, trains_by_kernels
from overlock.ops.gradients import register_backward
from overlock.ops.registration import register, to_layout_of


def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + weight * x * n / (mean of n over the channels + eps) + bias, with n the L2 norm of each channel's map.

    Norms are summed in float32 or better: a sum of squares over a map overflows float16 at values near 16. Where it
    trains by kernels, on CPU in float32 or bfloat16 or on CUDA, it is one operator.

    Args:
        x: (B, C, H, W).
        weight: (C,).
        bias: (C,).
        eps: added to the mean.

    Returns:
        (B, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: where shapes or devices do not fit or a type is none of floating-point numbers.
    """
    if torch.jit.is_scripting():  # what follows does not script
        return plain.response_norm(x, weight, bias, eps)
    if trains_by_kernels(x, weight, bias):
        return torch.ops.overlock.global_response_norm(x, weight, bias, eps)
    _check(x, weight, bias, eps)
    return plain.response_norm(x, weight, bias, eps)


_INPUTS = Inputs("response_norm", x="B C H W", weight="C", bias="C")


def _check(x: Tensor, weight: Tensor, bias: Tensor, _eps: float) -> None:
    _INPUTS.check(x, weight, bias)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    backend = asked_for()
    norms = run("sum_products", backend, x, x).sqrt()
    scale = 1 + weight * (norms / (norms.mean(dim=1, keepdim=True) + eps))
    return to_layout_of(x, run("scale_and_add", backend, x, scale, None, bias.expand_as(scale)))


def _gradients(
    grad: Tensor, backend: str, x: Tensor, weight: Tensor, _bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias. With n the norms and m their mean + eps, the scale is s = 1 + weight n / m."""
    norms = run("sum_products", backend, x, x).sqrt()
    mean = norms.mean(dim=1, keepdim=True) + eps
    of_scale = run("sum_products", backend, grad, x)
    of_shares = of_scale * weight
    of_norms = (of_shares - (of_shares * norms).mean(dim=1, keepdim=True) / mean) / mean
    along = torch.where(norms > 0, of_norms / norms, 0)  # times x it is the gradient by way of the norms
    of_x = run("scale_and_add", backend, grad, 1 + weight * (norms / mean), x, along)
    return to_layout_of(x, of_x), (of_scale * (norms / mean)).sum(dim=0), grad.sum(dim=(0, 2, 3))


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, float eps"
register(
    "global_response_norm", f"({_ARGUMENTS}) -> Tensor", _forward, lambda x, *_: torch.empty_like(x),
    check=_check, batched=1,
)  # fmt: skip
register_backward(
    "global_response_norm", _ARGUMENTS, _gradients, tensors=3, plain=plain.twice_differentiable, backend=asked_for,
    check=_check, result_shape=lambda x, *_: x.shape,
)  # fmt: skip
