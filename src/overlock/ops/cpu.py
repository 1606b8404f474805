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
    if not numba_installed():
        return "numba is not installed; pip install numba"
    return None


@functools.lru_cache(maxsize=1)
def numba_installed() -> bool:
    """Whether the kernels written for numba can be compiled."""
    return importlib.util.find_spec("numba") is not None


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See :func:`overlock.ops.reference.contmix`; (B, G, C, H, W) in the layout of ``value``, if that has flat rows."""
    from overlock.ops.cpu_kernels import PAIR, mix  # noqa: PLC0415
    from overlock.ops.threads import run  # noqa: PLC0415

    batch, groups, channels, height, width = value.shape
    taps, regions = weight.shape
    weights = F.pad(weight.t(), (0, -taps % PAIR))
    bias = torch.zeros(taps) if bias is None else bias.contiguous()
    if rpb is None:
        rpb = torch.zeros(groups, 2 * kernel_height - 1, 2 * kernel_width - 1)
    out = torch.empty_like(value)
    if out.stride(3) != width * out.stride(4):  # rows and columns swapped in memory: no flat view to write through
        out = torch.empty(value.shape)
    queries, values = query.flatten(3), value.flatten(3)
    # A map is cut only where there are too few for the threads: each piece folds the key and packs values anew.
    pieces = max(1, min(2 * torch.get_num_threads() // (batch * groups), height * width // 64))
    sizes = (batch, groups, query.shape[2], channels, height, width, kernel_height, kernel_width, regions, pieces)
    strides = (*queries.stride(), *values.stride(), *out.flatten(3).stride())
    tensors = (queries, key.contiguous(), values, weights, bias, rpb.contiguous(), out)
    run(mix, batch * groups * pieces, *tensors, *sizes, *strides)
    return out
