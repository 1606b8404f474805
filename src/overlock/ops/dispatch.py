"""The one table of implementations of the operations, and which of them a call takes.

A backend answers, for a given call, with ``None`` or the reason why it cannot run. Without a choice by the user the
first one in the table that can run is taken; an explicit choice that cannot run raises that reason.
"""

from __future__ import annotations

import contextlib
import contextvars
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
from overlock.kernels.torch import reference
from overlock.ops.gradients import pull_back

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "OVERLOCK_BACKEND"
AUTO = "auto"

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of ContMix's dynamic convolution; ``backward`` may be another's."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Gradients]
    why_not: Callable[..., str | None]


def _reference_backward(grad: Tensor, *inputs: Tensor | int | None) -> Gradients:
    """Gradients of the reference, by functional autograd (the op runs below the autograd dispatcher)."""
    given = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    found = dict(zip(given, pull_back(reference.contmix, inputs, grad, given), strict=True))
    return tuple(found.get(i) for i in range(6))  # type: ignore[return-value]


def _always(*_: object) -> None:
    return None


def on_use(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of this package that imports what may be absent, such as triton; imported when called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"overlock.kernels.{module}"), name)(*arguments)

    return call


def triton_why_not(module: str) -> Callable[..., str | None]:
    """Why Triton's kernels cannot run a call with a tensor first: no GPU, no triton, or what the module itself says."""

    def why_not(*call: Any) -> str | None:
        device = call[0].device.type
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it needs tensors on a CUDA device, not on {device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return on_use(module, "why_not")(*call)

    return why_not


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        forward=on_use("triton.contmix", "forward"),
        backward=on_use("triton.contmix", "backward"),
        why_not=triton_why_not("triton.contmix"),
    ),
    "cpu": Backend(forward=cpu.forward, backward=on_use("numba.contmix_gradients", "backward"), why_not=cpu.why_not),
    "torch": Backend(forward=portable.forward, backward=portable.backward, why_not=_always),
    "reference": Backend(forward=reference.contmix, backward=_reference_backward, why_not=_always),
}

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
    return torch.onnx.is_in_onnx_export()


def choose(name: str, *call: Tensor | int | None) -> Backend:
    """The backend of a name, or for 'auto' the first of the table that can run a call."""
    if name != AUTO:
        reason = BACKENDS[name].why_not(*call)
        if reason:
            raise ValueError(f"The backend {name!r} cannot run this call: {reason}")
        return BACKENDS[name]
    for candidate, implementation in BACKENDS.items():
        reason = implementation.why_not(*call)
        if reason is None:
            return implementation
        logger.debug("backend %s passed over: %s", candidate, reason)
    raise AssertionError("the torch backend runs everywhere")
