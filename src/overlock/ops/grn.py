"""Global response norm, in training on CPU in two passes over memory forward and two backward."""

from __future__ import annotations

import torch
from torch import Tensor

from overlock.ops.checks import Inputs
from overlock.ops.dispatch import asked_for, on_use
from overlock.ops.gradients import register_backward
from overlock.ops.registration import register
from overlock.ops.training import takes_kernels, to_layout_of, trains_on_cpu

products_by_kernel, scale_by_kernel = on_use("numba.grn", "sum_products"), on_use("numba.grn", "scale_and_add")


def response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + weight * x * n / (mean of n over the channels + eps) + bias, with n the L2 norm of each channel's map.

    Norms are summed in float32 or better: a sum of squares over a map overflows float16 at values near 16. Where it
    trains in float32 on CPU it is one operator.

    Args:
        x: (B, C, H, W).
        weight, bias: (C,).
        eps: added to the mean.

    Returns:
        (B, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: where shapes or devices do not fit or a type is none of floating-point numbers.
    """
    if torch.jit.is_scripting():  # what follows does not script
        return _normalise(x, weight, bias, eps)
    if trains_on_cpu(x, weight, bias):
        return torch.ops.overlock.global_response_norm(x, weight, bias, eps)
    _check(x, weight, bias, eps)
    return _normalise(x, weight, bias, eps)


_INPUTS = Inputs("response_norm", x="B C H W", weight="C", bias="C")


def _check(x: Tensor, weight: Tensor, bias: Tensor, _eps: float) -> None:
    _INPUTS.check(x, weight, bias)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # Not torch.promote_types: an export of torch 2.6 that holds its call cannot be read back.
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=exact)
    return _scale(x, norms, weight, bias, eps)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same, with second derivatives of zero, not NaN, where a map is zero throughout and its norm has a corner."""
    squares = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).square().sum(dim=(2, 3), keepdim=True)
    norms = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    return _scale(x, norms, weight, bias, eps)


def _scale(x: Tensor, norms: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    shares = norms / (norms.mean(dim=1, keepdim=True) + eps)
    scale = weight.view(1, -1, 1, 1) * shares + 1
    return torch.addcmul(bias.view(1, -1, 1, 1).to(x.dtype), x, scale.to(x.dtype))


def _sum_products(backend: str, a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b (B, C, H, W) over the maps, (B, C)."""
    if takes_kernels(backend, a, b):
        return products_by_kernel(a, b)
    return (a * b).sum(dim=(2, 3))


def _scale_and_add(backend: str, a: Tensor, scale: Tensor, b: Tensor | None, other: Tensor) -> Tensor:
    """a * scale + b * other, or + other without b; maps (B, C, H, W), numbers (B, C)."""
    if takes_kernels(backend, a, scale):
        return scale_by_kernel(a, scale, b, other)
    scale, other = scale[:, :, None, None], other[:, :, None, None]
    return a * scale + (other if b is None else b * other)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    backend = asked_for()
    norms = _sum_products(backend, x, x).sqrt()
    scale = 1 + weight * (norms / (norms.mean(dim=1, keepdim=True) + eps))
    return to_layout_of(x, _scale_and_add(backend, x, scale, None, bias.expand_as(scale)))


def _gradients(
    grad: Tensor, backend: str, x: Tensor, weight: Tensor, _bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias. With n the norms and m their mean + eps, the scale is s = 1 + weight n / m."""
    norms = _sum_products(backend, x, x).sqrt()
    mean = norms.mean(dim=1, keepdim=True) + eps
    of_scale = _sum_products(backend, grad, x)
    of_shares = of_scale * weight
    of_norms = (of_shares - (of_shares * norms).mean(dim=1, keepdim=True) / mean) / mean
    along = torch.where(norms > 0, of_norms / norms, 0)  # times x it is the gradient by way of the norms
    of_x = _scale_and_add(backend, grad, 1 + weight * (norms / mean), x, along)
    return to_layout_of(x, of_x), (of_scale * (norms / mean)).sum(dim=0), grad.sum(dim=(0, 2, 3))


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, float eps"
register(
    "global_response_norm", f"({_ARGUMENTS}) -> Tensor", _forward, lambda x, *_: torch.empty_like(x),
    check=_check, batched=1,
)  # fmt: skip
register_backward(
    "global_response_norm", _ARGUMENTS, _gradients, tensors=3, plain=_plain, note=asked_for,
    check=_check, result_shape=lambda x, *_: x.shape,
)  # fmt: skip
