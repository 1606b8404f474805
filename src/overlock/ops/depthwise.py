"""Depthwise convolution with a large kernel: on CUDA by Triton's kernels where they are the faster, else by PyTorch's.

Each part of the work, forward and the two gradients, is timed once for each shape, dtype and layout when it first runs.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.backends import on_use, triton_why_not
from overlock.ops.register import register


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=K // 2, groups=C)``, on CUDA by the faster of Triton and PyTorch.

    There it is one operator to ``torch.compile`` and ``torch.export``, and the choice is made when it runs. Elsewhere,
    and for K below 7, for which PyTorch has kernels of their own, it is PyTorch's convolution. Like the other operators
    it has no second derivatives.

    Args:
        x: (B, C, H, W), any strides; channels last is the fast layout.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in the dtype of ``x``, on CUDA in its layout too. Sums are kept in float32.
    """
    if x.is_cuda and weight.shape[3] >= 7:
        return torch.ops.overlock.depthwise_conv2d(x, weight, bias)
    return _convolve(x, weight, bias)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    reach = weight.shape[3] // 2
    return F.conv2d(x, weight, bias, padding=(reach, reach), groups=weight.shape[0])


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: int) -> Tensor:
    padding = [weight.shape[3] // 2] * 2
    mask = [wanted == 0, wanted == 1, False]
    arguments = (grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], mask)
    return torch.ops.aten.convolution_backward(*arguments)[wanted]


# Each part of the work by Triton and by PyTorch, called with (x, weight, bias) or (grad, x, weight).
PARTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "forward": (on_use("triton_depthwise", "convolve"), _convolve),
    "input": (on_use("triton_depthwise", "input_gradient"), functools.partial(_convolve_backward, wanted=0)),
    "weight": (on_use("triton_depthwise", "weight_gradient"), functools.partial(_convolve_backward, wanted=1)),
}
why_not = triton_why_not("triton_depthwise")
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


def choose(part: str, x: Tensor, weight: Tensor) -> bool:
    """Whether Triton's kernel of a part is taken: where it can run and was the faster.

    Where nothing can be timed, which is while a CUDA graph is captured, PyTorch's is taken unless the answer is known;
    also where algorithms must be deterministic, since a race of timings is not.
    """
    if why_not(x, weight) is not None:
        return False
    if not x.is_cuda:
        return True
    if torch.are_deterministic_algorithms_enabled():
        return False
    key = (part, x.device, x.dtype, tuple(x.shape), x.stride(1) == 1, weight.shape[3])
    if key not in _faster:
        if torch.cuda.is_current_stream_capturing():
            return False
        arguments = (x, weight, None) if part == "forward" else (x, x, weight)  # any numbers do for the gradient
        with torch.cuda.device(x.device):
            calls = (functools.partial(_compute, run, part, x, weight, *arguments) for run in PARTS[part])
            times = [_milliseconds(call) for call in calls]
        _faster[key] = times[0] < times[1]
    return _faster[key]


def _compute(run: Callable[..., Tensor], part: str, x: Tensor, weight: Tensor, *arguments: Tensor | None) -> Tensor:
    """Run a part, and bring the result into the layout that ``torch.empty_like`` gives, as the fakes promise."""
    result, like = run(*arguments), weight if part == "weight" else x
    wanted = torch.empty_like(like, device="meta").stride()
    return result if result.stride() == wanted else torch.empty_like(like).copy_(result)


def _run(part: str, x: Tensor, weight: Tensor, *arguments: Tensor | None) -> Tensor:
    triton, pytorch = PARTS[part]
    return _compute(triton if choose(part, x, weight) else pytorch, part, x, weight, *arguments)


register(
    "depthwise_conv2d", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: _run("forward", x, weight, x, weight, bias),
    lambda x, weight, bias: torch.empty_like(x),  # noqa: ARG005
    batched=1, cast=3,
)  # fmt: skip
register(
    "depthwise_conv2d_input_gradient", "(Tensor grad, Tensor x, Tensor weight) -> Tensor",
    lambda grad, x, weight: _run("input", x, weight, grad, x, weight),
    lambda grad, x, weight: torch.empty_like(x),  # noqa: ARG005
    batched=2,
)  # fmt: skip
register(
    "depthwise_conv2d_weight_gradient", "(Tensor grad, Tensor x, Tensor weight) -> Tensor",
    lambda grad, x, weight: _run("weight", x, weight, grad, x, weight),
    lambda grad, x, weight: torch.empty_like(weight),  # noqa: ARG005
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    operators = torch.ops.overlock
    return (
        operators.depthwise_conv2d_input_gradient(grad, x, weight) if wanted[0] else None,
        operators.depthwise_conv2d_weight_gradient(grad, x, weight) if wanted[1] else None,
        grad.sum((0, 2, 3)) if wanted[2] else None,
    )


torch.library.register_autograd("overlock::depthwise_conv2d", _backward, setup_context=_save)
