"""Maps of another size on CPU: enlarged, averaged back, or averaged over regions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.numba.arguments import INT64, POINTER
from overlock.kernels.numba.runtime import ANY, floats, kernel, task_range
from overlock.kernels.numba.simd import LANES, broadcast, masked_load, masked_store
from overlock.kernels.torch.reference import averages


def enlargement(size: int, larger: int) -> Tensor:
    """The matrix (larger, size) of a bilinear enlargement along one dimension."""
    each = torch.eye(size, dtype=torch.float32, device="cpu")
    return F.interpolate(each[None], size=larger, mode="linear")[0].t().contiguous()


def averaging(size: int, parts: int) -> Tensor:
    """The matrix (parts, size) of the averages over regions of one dimension."""
    return averages(size, parts, torch.empty(0, dtype=torch.float32, device="cpu"))


def one_after_another(first: Tensor, second: Tensor) -> Tensor:
    """The matrix of both; not by a product of matrices, which autocast would take in 16 bits."""
    return (second[:, :, None] * first).sum(dim=1)


@kernel(
    x=POINTER,  # (B, H, W, C), tokens of a stride
    rows=POINTER,  # (H', H); what is not zero in a row is in one run
    columns=POINTER,  # (W', W), likewise
    out=POINTER,  # (B, H', W', C)
    batch=INT64,
    height=INT64,
    width=INT64,
    out_height=INT64,
    out_width=INT64,
    channels=INT64,
    stride=INT64,
)
def resample(call, thread, threads):
    """out = rows x columns^T, for each channel. A task is a position of the result."""
    height, width, channels, stride = call.height, call.width, call.channels, call.stride
    out_height, out_width = call.out_height, call.out_width
    images, out = floats(call.x, ANY), floats(call.out, ANY)
    rows, columns = floats(call.rows, (out_height, height)), floats(call.columns, (out_width, width))
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        b, i, j = task // (out_height * out_width), task // out_width % out_height, task % out_width
        top, bottom, left, right = 0, height, 0, width
        while rows[i, top] == 0:
            top += 1
        while rows[i, bottom - 1] == 0:
            bottom -= 1
        while columns[j, left] == 0:
            left += 1
        while columns[j, right - 1] == 0:
            right -= 1
        for c in range(0, channels, LANES):
            lanes, both = min(LANES, channels - c), broadcast(np.float32(0))
            for y in range(top, bottom):
                line = broadcast(np.float32(0))
                for x in range(left, right):
                    value = masked_load(images, ((b * height + y) * width + x) * stride + c, lanes)
                    line = line + value * broadcast(columns[j, x])
                both = both + line * broadcast(rows[i, y])
            masked_store(out, task * channels + c, both, lanes)
