"""ContMix's dynamic convolution fused for inference on CPU: logits, softmax and weighted sum of a tile in the cache.

Compiled by numba at the first call and kept in its cache, so no compiler and no binary bound to a version of PyTorch is
needed. Float32. The letters of reference.py, and T the tokens of a tile (consecutive in the flattened map).

What bounds it, for one group of 16 channels, K = 13, S = 7: a token takes 2 * 49 * 169 = 16.6 kFLOP of logits and
2 * 169 * 16 = 5.4 kFLOP of weighted sum, against 64 bytes in and 64 out: arithmetic. Loops are therefore written so
that LLVM keeps a vector register full for each multiply-add: tokens (logits, softmax) or channels (sum) innermost, and
a few terms spelled out for each pass over them, so that partial sums are loaded and stored once for several terms.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None, *_: int
) -> str | None:
    """The reason why a call cannot run here, or None."""
    tensors = [x for x in (query, key, value, weight, bias, rpb) if x is not None]
    if value.device.type != "cpu":
        return f"it runs on CPU, not on {value.device.type}"
    if any(x.dtype != torch.float32 for x in tensors):
        return "it computes in float32 only"
    if not _numba_installed():
        return "numba is not installed; pip install numba"
    return None


@functools.lru_cache(maxsize=1)
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See :func:`overlock.ops.reference.contmix`; (B, G, C, H, W) in the layout of ``value``, if that has flat rows."""
    from overlock.ops.cpu_kernels import BLOCK, TOKENS, mix  # noqa: PLC0415
    from overlock.ops.threads import run  # noqa: PLC0415

    batch, groups, channels, height, width = value.shape
    taps = weight.shape[0]
    bias = torch.zeros(taps) if bias is None else bias.contiguous()
    if rpb is None:
        rpb = torch.zeros(groups, 2 * kernel_height - 1, 2 * kernel_width - 1)
    # weight @ (key^T query) = (weight @ key^T) query: D numbers a tap instead of S^2.
    rows = torch.matmul(key, F.pad(weight, (0, 0, 0, -taps % BLOCK)).t())
    packed = F.pad(value, (0, 0, 0, 0, 0, -channels % BLOCK)) if channels % BLOCK else value
    packed = packed.unflatten(2, (-1, BLOCK)).permute(0, 1, 2, 4, 5, 3).contiguous()
    out = torch.empty_like(value)
    if out.stride(3) != width * out.stride(4):  # rows and columns swapped in memory: no flat view to write through
        out = torch.empty(value.shape)
    flat = query.flatten(3)
    jobs = batch * groups * -(-height * width // TOKENS)
    sizes = (batch, groups, query.shape[2], channels, height, width, kernel_height, kernel_width)
    strides = (*flat.stride(), *out.flatten(3).stride())
    run(mix, jobs, flat, rows, packed, bias, rpb.contiguous(), out, *sizes, *strides)
    return out
