"""The residual 3x3 depthwise convolution of the blocks, with GELU before it in a ConvFFN, as one operation to train."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.checks import FilterInputs
from overlock.ops.dispatch import asked_for, on_use
from overlock.ops.gradients import register_backward
from overlock.ops.registration import register
from overlock.ops.training import takes_kernels, to_layout_of, trains_on_cpu

filter_by_kernel, gradients_by_kernel = (
    on_use("numba.depthwise_gradients", "local_conv"),
    on_use("numba.depthwise_gradients", "local_gradients"),
)


_INPUTS = FilterInputs("local_conv")


def local_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """a + conv(a), with a = GELU(x) or x itself.

    Where it trains in float32 on CPU it is one operator that keeps ``x`` alone for the gradients.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.
        gelu: whether GELU comes first.

    Returns:
        (B, C, H, W) in the dtype of ``x``.

    Raises:
        ValueError: where shapes, types or devices do not fit, or K is even.
    """
    if torch.jit.is_scripting():  # what follows does not script
        return _convolve(x, weight, bias, gelu)
    if trains_on_cpu(x, weight, bias):
        return torch.ops.overlock.local_conv(x, weight, bias, gelu)
    _INPUTS.check_filter(x, weight, bias)
    return _convolve(x, weight, bias, gelu)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    x = F.gelu(x) if gelu else x
    reach = weight.shape[3] // 2
    return x + F.conv2d(x, weight, bias, padding=(reach, reach), groups=weight.shape[0])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    run = filter_by_kernel if takes_kernels(asked_for(), x, weight) else _convolve
    return to_layout_of(x, run(x, weight, bias, gelu))


def _gradients(
    grad: Tensor, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    run = gradients_by_kernel if takes_kernels(backend, x, weight) else _plain_gradients
    of_x, of_weight, of_bias = run(grad, x, weight, gelu)
    return to_layout_of(x, of_x), to_layout_of(weight, of_weight), x.new_empty(0) if bias is None else of_bias.clone()


def _plain_gradients(grad: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, padding = F.gelu(x) if gelu else x, [weight.shape[3] // 2] * 2
    channels = x.shape[1]
    arguments = (grad, a, weight, [channels], [1, 1], padding, [1, 1], False, [0, 0], channels, [True] * 3)
    of_a, of_weight, of_bias = torch.ops.aten.convolution_backward(*arguments)
    of_a = of_a + grad
    return torch.ops.aten.gelu_backward(of_a, x) if gelu else of_a, of_weight, of_bias


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, _gelu: bool) -> None:
    _INPUTS.check_filter(x, weight, bias)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool gelu"
register(
    "local_conv", f"({_ARGUMENTS}) -> Tensor", _forward, lambda x, *_: torch.empty_like(x),
    check=_check, batched=1, cast=3,
)  # fmt: skip
register_backward(
    "local_conv", _ARGUMENTS, _gradients, tensors=3, plain=_convolve, note=asked_for,
    check=_check, result_shape=lambda x, *_: x.shape,
)  # fmt: skip
