"""ContMix's dynamic convolution fused on CPU: logits, softmax and weighted sum of a tile in the cache.

Compiled by numba at the first call and kept in its cache, so no compiler and no binary bound to a version of PyTorch is
needed. Maps are float32 or bfloat16, sums float32; the gradients are in contmix_gradients.py. The letters of
kernels/torch/reference.py, and T the tokens of a tile (consecutive in the flattened map).

What bounds it, for one group of 16 channels, K = 13, S = 7: a token takes 2 * 49 * 169 = 16.6 kFLOP of logits and
2 * 169 * 16 = 5.4 kFLOP of weighted sum, against 64 bytes in and 64 out: arithmetic. Loops are therefore written so
that LLVM keeps a vector register full for each multiply-add: tokens (logits, softmax) or channels (sum) innermost, and
a few terms spelled out for each pass over them, so that partial sums are loaded and stored once for several terms.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
HAS_NUMBA = importlib.util.find_spec("numba") is not None


def why_not(*call: object) -> str | None:
    """Why numba's kernels, of any operation, cannot run a call; or None."""
    first = None
    for x in call:
        if isinstance(x, Tensor):
            first = x if first is None else first
            if x.device.type != "cpu":  # torch.compile knows it, and not ``is_cpu``
                return f"it runs on CPU, not on {x.device.type}"
            if x.dtype not in DTYPES:
                return f"it takes float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if not HAS_NUMBA:
        return "numba is not installed; pip install numba"
    return "there is nothing to compute" if first is not None and first.numel() == 0 else None


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as contiguous (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_images(tokens: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) in channels_last."""
    return tokens.permute(0, 3, 1, 2)


def numba_installed() -> bool:
    """Whether the kernels written for numba can be compiled."""
    return HAS_NUMBA


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See kernels/torch/reference.py; (B, G, C, H, W) in the layout of ``value``, if that has flat rows."""
    from overlock.kernels.numba.contmix_kernels import contmix  # noqa: PLC0415
    from overlock.kernels.numba.runtime import run  # noqa: PLC0415

    batch, groups, channels, height, width = value.shape
    out = torch.empty_like(value)
    if out.stride(3) != width * out.stride(4):  # rows and columns swapped in memory: no flat view to write through
        out = value.new_empty(value.shape)
    queries, values, key = query.flatten(3).to(value.dtype), value.flatten(3), key.to(value.dtype)
    splits = map_splits(batch * groups, height * width)
    run(
        contmix, batch * groups * splits, queries=queries, keys=key, values=values, out=out,
        **prepare(weight, bias, rpb, groups, kernel_height, kernel_width),
        groups=groups, depth=query.shape[2], channels=channels, height=height, width=width,
        kernel_height=kernel_height, kernel_width=kernel_width, regions=weight.shape[1], splits=splits,
        query_strides=queries.stride(), key_strides=key.stride(), value_strides=values.stride(),
        out_strides=out.flatten(3).stride(),
    )  # fmt: skip
    return out


def prepare(
    weight: Tensor, bias: Tensor | None, rpb: Tensor | None, groups: int, kernel_height: int, kernel_width: int
) -> dict[str, Tensor]:
    """Weight (S^2, N), bias (N) and relative position bias as the kernel reads them."""
    weight, bias, rpb = weight.float(), None if bias is None else bias.float(), None if rpb is None else rpb.float()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.contiguous()
    if rpb is None:
        rpb = weight.new_zeros(groups, 2 * kernel_height - 1, 2 * kernel_width - 1)
    return dict(weight=weight.t().contiguous(), bias=bias, rpb=rpb.contiguous())


def map_splits(maps: int, positions: int) -> int:
    """Into how many parts each map is cut: only where they are too few for the threads, for each folds the key anew."""
    return max(1, min(2 * torch.get_num_threads() // maps, positions // 64))
