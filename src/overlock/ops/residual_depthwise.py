"""The residual 3x3 depthwise convolution of the blocks, with GELU before it in a ConvFFN, as one operation to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from overlock.kernels.torch import depthwise as plain
from overlock.ops.checks import FilterInputs
from overlock.ops.dispatch import TABLE, asked_for, choose, run, trains_by_kernels
from overlock.ops.gradients import register_backward
from overlock.ops.registration import register, to_layout_of

_INPUTS = FilterInputs("local_conv")


def local_conv(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """a + conv(a), with a = GELU(x) or x itself.

    Where it trains in float32 or bfloat16 on CPU it is one operator that keeps ``x`` alone for the gradients.

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
        return plain.local_conv(x, weight, bias, gelu)
    if trains_by_kernels(x, weight, bias):
        return torch.ops.overlock.local_conv(x, weight, bias, gelu)
    _INPUTS.check_filter(x, weight, bias)
    return plain.local_conv(x, weight, bias, gelu)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return to_layout_of(x, run("local_conv", asked_for(), x, weight, bias, gelu))


def _gradients(
    grad: Tensor, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gradients_of: Any = TABLE["local_conv"][choose("local_conv", backend, x, weight, bias, gelu)].backward
    of_x, of_weight, of_bias = gradients_of(grad, x, weight, gelu)
    return to_layout_of(x, of_x), to_layout_of(weight, of_weight), x.new_empty(0) if bias is None else of_bias.clone()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, _gelu: bool) -> None:
    _INPUTS.check_filter(x, weight, bias)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool gelu"
register(
    "local_conv", f"({_ARGUMENTS}) -> Tensor", _forward, lambda x, *_: torch.empty_like(x),
    check=_check, batched=1, cast=3,
)  # fmt: skip
register_backward(
    "local_conv", _ARGUMENTS, _gradients, tensors=3, plain=plain.local_conv, backend=asked_for,
    check=_check, result_shape=lambda x, *_: x.shape,
)  # fmt: skip
