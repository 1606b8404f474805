"""Which calls the kernels for CUDA take, and where they launch."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which Triton too asks for when it is imported
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(*call: object) -> str | None:
    """Reason why kernels over maps with their channels last cannot run a call, or None. Maps come first."""
    tensors = [x for x in call if isinstance(x, Tensor)]
    first = tensors[0]
    others = [x.dtype for x in tensors if x.dtype not in DTYPES]
    reason = None
    if not (first.is_cuda or INTERPRETED):
        reason = f"it needs tensors on a CUDA device, not on {first.device.type}"
    elif others:
        reason = f"it takes float32, bfloat16 and float16, not {str(others[0]).removeprefix('torch.')}"
    elif first.is_cuda and torch.cuda.get_device_capability(first.device) < (8, 0):
        reason = "it needs a GPU of compute capability 8.0 or above"
    elif first.numel() == 0:
        reason = "there is nothing to compute"
    elif first[0].numel() >= 2**31:
        reason = "an image has more numbers than 32 bits can count"
    return reason


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
