"""Depthwise convolution by kernels of our own: large ones on CUDA, where they are faster, and in training on CPU.

On CUDA each part of the work, forward and the two gradients, is timed once for each shape, dtype and layout when it
first runs, Triton's kernel against PyTorch's. On CPU it is the gradients and dilated convolutions that gain
(docs/performance.md).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.checks import FilterInputs, check_gradient
from overlock.ops.dispatch import AUTO, asked_for, exports_to_onnx, on_use, triton_why_not
from overlock.ops.gradients import register_autograd, register_plain_autograd
from overlock.ops.registration import register
from overlock.ops.training import takes_kernels, to_layout_of, trains_on_cpu

_INPUTS = FilterInputs("depthwise_conv2d")


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """``F.conv2d`` with groups = C and as much padding as keeps the size, by the fastest kernels at hand.

    It is one operator to ``torch.compile`` on CUDA for K from 7 on without dilation (Triton's kernels or PyTorch's, as
    is found when it runs), and in float32 on CPU where gradients are wanted (numba's). Elsewhere it is PyTorch's
    convolution, which exporters and counters of operations know. Derivatives beyond the first are PyTorch's.

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
    takes_operator = x.is_cuda and weight.shape[3] >= 7 and dilation == 1
    if not torch.jit.is_scripting():  # what follows does not script
        takes_operator = not exports_to_onnx() and (takes_operator or trains_on_cpu(x, weight, bias))
    if takes_operator:
        return torch.ops.overlock.depthwise_conv2d(x, weight, bias, dilation)
    if not torch.jit.is_scripting():
        _INPUTS.check_filter(x, weight, bias, dilation)
    return _convolve(x, weight, bias, dilation)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    reach = weight.shape[3] // 2 * dilation
    return F.conv2d(x, weight, bias, padding=(reach, reach), dilation=(dilation, dilation), groups=weight.shape[0])


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, dilation: int, *, wanted: int) -> Tensor:
    padding = [weight.shape[3] // 2 * dilation] * 2
    mask = [wanted == 0, wanted == 1, False]
    arguments = (grad, x, weight, None, [1, 1], padding, [dilation] * 2, False, [0, 0], x.shape[1], mask)
    return torch.ops.aten.convolution_backward(*arguments)[wanted]


def _undilated(name: str) -> Callable[..., Tensor]:
    """A function of Triton's, which knows no dilation."""
    call = on_use("triton.depthwise", name)
    return lambda *arguments: call(*arguments[:-1])


# Each part of the work by PyTorch and by our kernels, called with (x, weight, bias, dilation) or
# (grad, x, weight, dilation).
PARTS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "forward": {
        "torch": _convolve,
        "triton": _undilated("convolve"),
        "cpu": on_use("numba.depthwise_gradients", "convolve"),
    },
    "input": {
        "torch": functools.partial(_convolve_backward, wanted=0),
        "triton": _undilated("input_gradient"),
        "cpu": on_use("numba.depthwise_gradients", "input_gradient"),
    },
    "weight": {
        "torch": functools.partial(_convolve_backward, wanted=1),
        "triton": _undilated("weight_gradient"),
        "cpu": on_use("numba.depthwise_gradients", "weight_gradient"),
    },
}
why_not = triton_why_not("triton.depthwise")
_faster: dict[tuple[object, ...], bool] = {}


def _milliseconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Median time on the device, after two calls to compile and to warm up."""
    times = []
    for repeat in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def choose(part: str, x: Tensor, weight: Tensor, dilation: int, backend: str) -> str:
    """Whose kernel of a part is taken: Triton's where it can run and was the faster, numba's on CPU, else PyTorch's.

    Where nothing can be timed, which is while a CUDA graph is captured, PyTorch's is taken unless the answer is known;
    also where algorithms must be deterministic, since a race of timings is not.
    """
    if dilation == 1 and backend in (AUTO, "triton") and why_not(x, weight) is None:
        return "triton" if not x.is_cuda or _is_faster(part, x, weight) else "torch"
    return "cpu" if takes_kernels(backend, x, weight) and weight.shape[3] % 2 else "torch"


def _is_faster(part: str, x: Tensor, weight: Tensor) -> bool:
    """Whether Triton's kernel of a part takes less time than PyTorch's."""
    if torch.are_deterministic_algorithms_enabled():
        return False
    key = (part, x.device, x.dtype, tuple(x.shape), x.stride(1) == 1, weight.shape[3])
    if key not in _faster:
        if torch.cuda.is_current_stream_capturing():
            return False
        arguments = (x, weight, None, 1) if part == "forward" else (x, x, weight, 1)  # any gradient does
        with torch.cuda.device(x.device):
            calls = (functools.partial(_compute, name, part, x, weight, *arguments) for name in ("triton", "torch"))
            times = [_milliseconds(call) for call in calls]
        _faster[key] = times[0] < times[1]
    return _faster[key]


def _compute(name: str, part: str, x: Tensor, weight: Tensor, *arguments: Tensor | int | None) -> Tensor:
    return to_layout_of(weight if part == "weight" else x, PARTS[part][name](*arguments))


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    name = choose("forward", x, weight, dilation, asked_for())
    return _compute(name, "forward", x, weight, x, weight, bias, dilation)


def _gradient(part: str, grad: Tensor, x: Tensor, weight: Tensor, dilation: int, backend: str) -> Tensor:
    name = choose(part, x, weight, dilation, backend)
    return _compute(name, part, x, weight, grad, x, weight, dilation)


register(
    "depthwise_conv2d", "(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor",
    _forward, lambda x, *_: torch.empty_like(x),
    check=_INPUTS.check_filter, batched=1, cast=3,
)  # fmt: skip


def _check_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int, _backend: str) -> None:
    _INPUTS.check_filter(x, weight, None, dilation)
    check_gradient("depthwise_conv2d_backward", grad, x.shape)


_GRADIENT = "(Tensor grad, Tensor x, Tensor weight, int dilation, str backend) -> Tensor"
register(
    "depthwise_conv2d_input_gradient", _GRADIENT,
    functools.partial(_gradient, "input"), lambda _, x, *__: torch.empty_like(x),
    check=_check_gradient, batched=2,
)  # fmt: skip
register(
    "depthwise_conv2d_weight_gradient", _GRADIENT,
    functools.partial(_gradient, "weight"), lambda _, __, weight, *___: torch.empty_like(weight),
    check=_check_gradient,
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.dilation, ctx.backend = inputs[3], asked_for()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    operators, settings = torch.ops.overlock, (ctx.dilation, ctx.backend)
    return (
        operators.depthwise_conv2d_input_gradient(grad, x, weight, *settings) if wanted[0] else None,
        operators.depthwise_conv2d_weight_gradient(grad, x, weight, *settings) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
        None,
    )


def _plain_gradient(grad: Tensor, x: Tensor, weight: Tensor, dilation: int, _backend: str, *, wanted: int) -> Tensor:
    return _convolve_backward(grad, x, weight, dilation, wanted=wanted)


register_autograd("depthwise_conv2d", _backward, setup_context=_save, plain=_convolve)
register_plain_autograd("depthwise_conv2d_input_gradient", functools.partial(_plain_gradient, wanted=0))
register_plain_autograd("depthwise_conv2d_weight_gradient", functools.partial(_plain_gradient, wanted=1))
