"""Depthwise convolution by kernels of our own: large ones on CUDA, where they are faster, and in training on CPU.

On CUDA each part of the work, forward and the two gradients, takes Triton's kernel or PyTorch's by a stored table. On
CPU it is the gradients and dilated convolutions that gain (docs/performance.md).
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overlock.kernels.torch.depthwise import convolve, input_gradient, weight_gradient
from overlock.ops.checks import FilterInputs, check_gradient
from overlock.ops.dispatch import AUTO, TABLE, asked_for, choose, exports_to_onnx, trains_by_kernels
from overlock.ops.gradients import call_in_backward, register_autograd, register_plain_autograd
from overlock.ops.registration import operator_of, register, to_layout_of

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = (
    f"depthwise_conv2d{part}" for part in ("", "_input_gradient", "_weight_gradient")
)
"""Rows of the table of backends, and operators."""
_INPUTS = FilterInputs(FORWARD)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """``F.conv2d`` with groups = C and as much padding as keeps the size, by the fastest kernels at hand.

    It is one operator to ``torch.compile`` on CUDA where the filter is dilated, or 7 wide or more (Triton's kernels, or
    PyTorch's where they were measured to be faster), and on CPU where gradients are wanted (numba's). Elsewhere it is
    PyTorch's convolution, which exporters and counters of operations know. Derivatives beyond the first are PyTorch's.

    Args:
        x: (B, C, H, W), any strides; channels last is the fast layout.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.
        dilation: distance of neighbours in the window.

    Returns:
        (B, C, H, W) in the dtype of ``x``, from the operator in its layout too. Sums are kept in float32.

    Raises:
        ValueError: where shapes, types or devices do not fit, K is even or ``dilation`` < 1.
    """
    takes_operator = x.is_cuda and (weight.shape[3] >= 7 or dilation > 1)
    if not torch.jit.is_scripting():  # what follows does not script
        trains = not x.is_cuda and trains_by_kernels(x, weight, bias)
        takes_operator = (takes_operator or trains) and not exports_to_onnx()
    if takes_operator:
        return torch.ops.overlock.depthwise_conv2d(x, weight, bias, dilation)
    if not torch.jit.is_scripting():
        _INPUTS.check_filter(x, weight, bias, dilation)
    return convolve(x, weight, bias, dilation)


CHOICES = Path(__file__).with_name("depthwise_choices.json")
"""The faster on a GPU, ``triton`` or ``torch``, by :func:`choice_key`. ``benchmarks/gpu.py`` writes such a file."""


@functools.cache
def measured_choices() -> dict[str, str]:
    return json.loads(CHOICES.read_text())


def choice_key(
    operation: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], size: int, dilation: int = 1
) -> str:  # fmt: skip
    """What measurements are kept by: GPU, dtype, part, K, dilation, counts of maps and positions by powers of two."""
    major, minor = torch.cuda.get_device_capability(device)
    maps, positions = (round(math.log2(count)) for count in (shape[0] * shape[1], shape[2] * shape[3]))
    name = str(dtype).removeprefix("torch.")
    wide = f"K {size}" if dilation == 1 else f"K {size} dilated by {dilation}"
    return f"sm_{major}{minor} {name} {operation} {wide}, maps 2^{maps}, positions 2^{positions}"


@functools.lru_cache(maxsize=4096)
def _fastest(*call: Any) -> str:
    """On CUDA by the stored table; Triton's where it has nothing.

    The reason for that: it multiplies on tensor cores, PyTorch's convolutions for groups = C do not, and took 2 to 45
    times as long wherever both were measured (docs/performance.md). The answer is never timed when a network runs, so
    it is the same in every run.
    """
    return measured_choices().get(choice_key(*call), "triton")


def choose_fastest(operation: str, asked: str, x: Tensor, weight: Tensor, *call: Any) -> str:
    """As :func:`overlock.ops.dispatch.choose`, but on CUDA, unless asked for, not what was measured to be slower."""
    chosen = choose(operation, asked, *call)
    if asked == AUTO and chosen == "triton" and x.is_cuda:
        return _fastest(operation, x.device, x.dtype, tuple(x.shape), weight.shape[3], call[-1])
    return chosen


def _compute(operation: str, name: str, like: Tensor, *call: Any) -> Tensor:
    return to_layout_of(like, TABLE[operation][name].forward(*call))


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    call = (x, weight, bias, dilation)
    return _compute(FORWARD, choose_fastest(FORWARD, asked_for(), x, weight, *call), x, *call)


def _gradient(operation: str, grad: Tensor, x: Tensor, weight: Tensor, dilation: int, asked: str) -> Tensor:
    call = (grad, x, weight, dilation)
    like = weight if operation == WEIGHT_GRADIENT else x
    return _compute(operation, choose_fastest(operation, asked, x, weight, *call), like, *call)


register(
    FORWARD, "(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor",
    _forward, lambda x, *_: torch.empty_like(x),
    check=_INPUTS.check_filter, batched=1, cast=3,
)  # fmt: skip


def _check_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int, _backend: str) -> None:
    _INPUTS.check_filter(x, weight, None, dilation)
    check_gradient("depthwise_conv2d_backward", grad, x.shape)


_GRADIENT = "(Tensor grad, Tensor x, Tensor weight, int dilation, str backend) -> Tensor"
register(
    INPUT_GRADIENT, _GRADIENT,
    functools.partial(_gradient, INPUT_GRADIENT), lambda _, x, *__: torch.empty_like(x),
    check=_check_gradient, batched=2,
)  # fmt: skip
register(
    WEIGHT_GRADIENT, _GRADIENT,
    functools.partial(_gradient, WEIGHT_GRADIENT), lambda _, __, weight, *___: torch.empty_like(weight),
    check=_check_gradient,
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.dilation, ctx.backend = inputs[3], asked_for()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    call = (grad, x, weight, ctx.dilation, ctx.backend)
    return (
        call_in_backward(operator_of(INPUT_GRADIENT), *call) if wanted[0] else None,
        call_in_backward(operator_of(WEIGHT_GRADIENT), *call) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
        None,
    )


register_autograd(FORWARD, _backward, setup_context=_save, plain=convolve)
register_plain_autograd(INPUT_GRADIENT, lambda *call: input_gradient(*call[:-1]))
register_plain_autograd(WEIGHT_GRADIENT, lambda *call: weight_gradient(*call[:-1]))
