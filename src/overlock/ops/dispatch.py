"""The one table of implementations of all operations, and which of them a call takes.

A backend answers, for a given call, with ``None`` or the reason why it cannot run (:func:`why_not`). Without a choice
by the user the first one of a row that can run is taken. An explicit choice that cannot run ContMix raises the reason;
of the other operations, which not every backend has, PyTorch's own is taken then.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from overlock.kernels.numba import contmix as cpu
from overlock.kernels.torch import contmix as portable
from overlock.kernels.torch import depthwise, grn, reference, repconv
from overlock.kernels.triton.conditions import DTYPES, INTERPRETED
from overlock.ops.gradients import pull_back

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "OVERLOCK_BACKEND"
AUTO = "auto"

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _always(*_: object) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an operation.

    Attributes:
        forward: the function.
        backward: its gradients, called with the result's and the inputs; None where they are operations of their own.
        why_not: called as ``forward``; None, or the reason why it cannot run that call.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    why_not: Callable[..., str | None] = _always


def _reference_backward(grad: Tensor, *inputs: Tensor | int | None) -> Gradients:
    """Gradients of the reference, by functional autograd (the op runs below the autograd dispatcher)."""
    given = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    found = dict(zip(given, pull_back(reference.contmix, inputs, grad, given), strict=True))
    return tuple(found.get(i) for i in range(6))  # type: ignore[return-value]


def on_use(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this package that imports what may be absent, such as triton; imported when called."""

    def call(*arguments: Any) -> Any:
        return _function(module, name)(*arguments)

    return call


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"overlock.kernels.{module}"), name)
    return function


@functools.cache
def triton_installed() -> bool:
    """Triton comes with PyTorch for CUDA on Linux, and not elsewhere."""
    return importlib.util.find_spec("triton") is not None


def _triton_why_not(module: str) -> Callable[..., str | None]:
    """Why Triton's kernels cannot run a call with a tensor first: no GPU, no triton, or what the module itself says."""

    def why_not(*call: Any) -> str | None:
        if not (call[0].is_cuda or INTERPRETED):
            return f"it needs tensors on a CUDA device, not on {call[0].device.type}"
        if not triton_installed():
            return "triton is not installed"
        return on_use(module, "why_not")(*call)

    return why_not


def _numba(forward: str, backward: str | None = None, why_not: Callable[..., str | None] = cpu.why_not) -> Backend:
    """Functions of numba's modules, each as module.name."""
    functions = [None if path is None else on_use(*f"numba.{path}".rsplit(".", 1)) for path in (forward, backward)]
    return Backend(forward=functions[0], backward=functions[1], why_not=why_not)  # type: ignore[arg-type]


def _triton(forward: str, backward: str | None = None, conditions: str = "conditions") -> Backend:
    """Functions of Triton's modules, each as module.name, and the module that knows why they cannot run a call."""
    functions = [None if path is None else on_use(*f"triton.{path}".rsplit(".", 1)) for path in (forward, backward)]
    reason = _triton_why_not(f"triton.{conditions}")
    return Backend(forward=functions[0], backward=functions[1], why_not=reason)  # type: ignore[arg-type]


def _triton_filter(name: str) -> Backend:
    """Triton's depthwise kernels."""
    reason = _triton_why_not("triton.depthwise")
    first = 0 if name == "convolve" else 1  # of x and weight among the arguments, after the gradient

    def why_not(*arguments: Any) -> str | None:
        return reason(*arguments[first : first + 2], arguments[-1])

    return Backend(forward=on_use("triton.depthwise", name), why_not=why_not)


def _repconv_why_not(*call: Any) -> str | None:
    """As numba's, which have room for eight branches."""
    sizes = next(x for x in call if isinstance(x, list | tuple) and isinstance(x[0], int))
    return cpu.why_not(*call) if len(sizes) <= 8 else "it has eight branches at most"


BACKENDS: dict[str, Backend] = {
    "triton": _triton("contmix.forward", "contmix.backward", "contmix"),
    "cpu": Backend(forward=cpu.forward, backward=on_use("numba.contmix_gradients", "backward"), why_not=cpu.why_not),
    "torch": Backend(forward=portable.forward, backward=portable.backward),
    "reference": Backend(forward=reference.contmix, backward=_reference_backward),
}
"""ContMix's implementations, the preferred first; their names are those that a user can ask for."""

TABLE: dict[str, dict[str, Backend]] = {
    "contmix": BACKENDS,
    "depthwise_conv2d": {
        "triton": _triton_filter("convolve"),
        "cpu": _numba("depthwise_gradients.convolve"),
        "torch": Backend(forward=depthwise.convolve),
    },
    "depthwise_conv2d_input_gradient": {
        "triton": _triton_filter("input_gradient"),
        "cpu": _numba("depthwise_gradients.input_gradient"),
        "torch": Backend(forward=depthwise.input_gradient),
    },
    "depthwise_conv2d_weight_gradient": {
        "triton": _triton_filter("weight_gradient"),
        "cpu": _numba("depthwise_gradients.weight_gradient"),
        "torch": Backend(forward=depthwise.weight_gradient),
    },
    "local_conv": {
        "triton": _triton("local_conv.forward", "local_conv.gradients", "local_conv"),
        "cpu": _numba("depthwise_gradients.local_conv", "local_gradients.local_gradients"),
        "torch": Backend(forward=depthwise.local_conv, backward=depthwise.local_gradients),
    },
    "dilated_repconv": {
        "triton": _triton("repconv.forward", "repconv.backward", "repconv"),
        "cpu": _numba("repconv.forward", "repconv_gradients.backward", _repconv_why_not),
        "torch": Backend(forward=repconv.forward, backward=repconv.backward),
    },
    "sum_products": {
        "triton": _triton("channel_scales.sum_products"),
        "cpu": _numba("grn.sum_products"),
        "torch": Backend(forward=grn.sum_products),
    },
    "scale_and_add": {
        "triton": _triton("channel_scales.scale_and_add"),
        "cpu": _numba("grn.scale_and_add"),
        "torch": Backend(forward=grn.scale_and_add),
    },
}
"""Of each operation, or each part of one that is chosen apart, the backends, the preferred first."""

_chosen: contextvars.ContextVar[str] = contextvars.ContextVar("overlock_backend")


def _check_name(name: str, source: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; the backends are: {', '.join((AUTO, *BACKENDS))}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block: 'auto', or a name in :data:`BACKENDS`.

    It holds for the operations called in the block, and for their gradients whenever these are computed. (In a function
    that ``torch.compile`` made, the choice for the gradients is the one at its compilation.)

    Raises:
        ValueError: at once for an unknown name; at the call of an operation that this backend cannot run.
    """
    token = _chosen.set(_check_name(name, "The backend asked for"))
    try:
        yield
    finally:
        _chosen.reset(token)


def asked_for() -> str:
    """The user's choice, by ``with backend(...)`` or else by the environment variable, or 'auto'."""
    return _chosen.get(None) or _check_name(os.environ.get(ENVIRONMENT_VARIABLE, AUTO), ENVIRONMENT_VARIABLE)


def exports_to_onnx() -> bool:
    """Whether the call is part of an ONNX export, which knows PyTorch's own operations alone.

    Then each operation is its plain form. Other graphs keep the operators. (PyTorch 2.6 and 2.7 tell of their
    TorchScript exporter only, not of ``dynamo=True``.)
    """
    return _is_exporting(unless_known=True) and torch.onnx.is_in_onnx_export()


def why_not(operation: str, backend: str, *call: Any) -> str | None:
    """Why a backend cannot run a call of an operation, or None."""
    if backend not in TABLE[operation]:
        return f"it has no {operation}"
    return TABLE[operation][backend].why_not(*call)


def choose(operation: str, asked: str, *call: Any) -> str:
    """The backend that a call takes: the one asked for, or for 'auto' the first of the table that can run it.

    Raises:
        ValueError: where the backend asked for cannot run a call of ContMix.
    """
    for candidate in TABLE[operation] if asked == AUTO else (asked,):
        reason = why_not(operation, candidate, *call)
        if reason is None:
            return candidate
        if asked != AUTO and operation == "contmix":
            raise ValueError(f"The backend {asked!r} cannot run this call: {reason}")
        logger.debug("%s: backend %s passed over: %s", operation, candidate, reason)
    return "torch"


def run(operation: str, asked: str, *call: Any) -> Any:
    """Call an operation with the backend that it takes."""
    return TABLE[operation][choose(operation, asked, *call)].forward(*call)


def trains_by_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call has a gradient to compute, where the kernels for it run: CPU in float32 or bfloat16, or CUDA.

    An exported or traced graph is to have operations that others know.
    """
    if not torch.is_grad_enabled():
        return False
    tensors = [x, *(other for other in others if other is not None)]
    if not any(tensor.requires_grad for tensor in tensors) or _is_exporting():
        return False
    if not x.is_cuda:
        return cpu.why_not(*tensors) is None
    return x.numel() > 0 and all(tensor.dtype in DTYPES for tensor in tensors) and _triton_trains(x.device)


@torch.compiler.assume_constant_result
def _triton_trains(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU, and no other backend is asked for; a graph keeps the answer."""
    return asked_for() in (AUTO, "triton") and triton_installed() and torch.cuda.get_device_capability(device) >= (8, 0)


_EXPORTS: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)  # of PyTorch 2.7


def _is_exporting(unless_known: bool = False) -> bool:
    """Whether a graph is traced or exported, as far as this version of PyTorch tells."""
    return torch._C._get_tracing_state() is not None or (unless_known if _EXPORTS is None else _EXPORTS())
