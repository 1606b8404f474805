"""When the kernels for training on CPU are taken, and the layout of what they return."""

from __future__ import annotations

import torch
from torch import Tensor

from overlock.kernels.numba.contmix import numba_installed
from overlock.ops.dispatch import AUTO

HAS_NUMBA = numba_installed()  # a constant to torch.compile


def trains_on_cpu(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call has a gradient to compute in float32 on CPU, where the kernels can run.

    An exported or traced graph is to have operations that others know.
    """
    tensors = [x, *(other for other in others if other is not None)]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return wanted and _is_plain(*tensors) and not _is_exporting()


def takes_kernels(backend: str, x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take part of the work, inside an operator, where a backend is asked for."""
    return backend in (AUTO, "cpu") and _is_plain(x, *others) and x.numel() > 0


def _is_plain(*tensors: Tensor) -> bool:
    return HAS_NUMBA and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)


def _is_exporting() -> bool:
    known = getattr(torch.compiler, "is_exporting", None)  # of PyTorch 2.7
    return torch._C._get_tracing_state() is not None or (known is not None and known())


def to_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """The result in the layout that ``torch.empty_like`` gives, as an operator's fake promises."""
    wanted = torch.empty_like(like, device="meta").stride()
    return result if result.stride() == wanted else torch.empty_like(like).copy_(result)
