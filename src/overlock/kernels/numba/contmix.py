"""ContMix's dynamic convolution fused on CPU: logits, softmax and weighted sum of a tile in the cache.

Compiled by numba at the first call and kept in its cache, so no compiler and no binary bound to a version of PyTorch is
needed. Float32; the gradients are in contmix_gradients.py. The letters of kernels/torch/reference.py, and T the
tokens of a tile (consecutive in the flattened map).

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


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as contiguous (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_images(tokens: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) in channels_last."""
    return tokens.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=1)
def numba_installed() -> bool:
    """Whether the kernels written for numba can be compiled."""
    return importlib.util.find_spec("numba") is not None


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See kernels/torch/reference.py; (B, G, C, H, W) in the layout of ``value``, if that has flat rows."""
    batch, groups, channels, height, width = value.shape
    out = torch.empty_like(value)
    if out.stride(3) != width * out.stride(4):  # rows and columns swapped in memory: no flat view to write through
        out = value.new_empty(value.shape)
    queries, values = query.flatten(3), value.flatten(3)
    tensors = (queries, key, values, *prepare(weight, bias, rpb, groups, kernel_height, kernel_width), out)
    sizes = (batch, groups, query.shape[2], channels, height, width, kernel_height, kernel_width)
    mix_into(
        tensors,
        sizes,
        weight.shape[1],
        (*queries.stride(), *values.stride(), *out.flatten(3).stride(), *tensors[1].stride()),
    )
    return out


def prepare(
    weight: Tensor, bias: Tensor | None, rpb: Tensor | None, groups: int, kernel_height: int, kernel_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (S^2, N), bias (N) and relative position bias as the kernel reads them."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.contiguous()
    if rpb is None:
        rpb = weight.new_zeros(groups, 2 * kernel_height - 1, 2 * kernel_width - 1)
    return weight.t().contiguous(), bias, rpb.contiguous()


def mix_into(tensors: tuple[Tensor | int, ...], sizes: tuple[int, ...], regions: int, strides: tuple[int, ...]) -> None:
    """Run the kernel.

    Args:
        tensors: queries, keys, values, weight, bias, rpb and out, or their addresses.
        sizes: B, G, D, C, H, W, Kh, Kw.
        regions: S^2.
        strides: of queries, values and out as (B, G, D or C, H W), and of keys as (B, G, D, S^2).
    """
    from overlock.kernels.numba.contmix_kernels import mix  # noqa: PLC0415
    from overlock.kernels.numba.runtime import run  # noqa: PLC0415

    maps = sizes[0] * sizes[1]
    pieces = map_pieces(maps, sizes[4] * sizes[5])
    run(mix, maps * pieces, *tensors, *sizes, regions, pieces, *strides)


def map_pieces(maps: int, positions: int) -> int:
    """Into how many each map is cut: only where they are too few for the threads, for each folds the key anew."""
    return max(1, min(2 * torch.get_num_threads() // maps, positions // 64))
