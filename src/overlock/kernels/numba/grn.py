"""The numba code of global response norm: sums over maps, and their scaling, in one pass each over tokens (B, T, C)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from overlock.kernels.numba.arguments import INT64, MAP, POINTER
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.kernels.numba.runtime import floats, kernel, maps, run, task_range
from overlock.kernels.numba.simd import LANES, broadcast, load, masked_load, masked_store, store

LONGEST = 64  # tokens summed up in float32 before their sum joins others


@kernel(
    a=MAP,  # (B, T, C)
    b=MAP,  # (B, T, C)
    sums=POINTER,  # (B, splits, C)
    batch=INT64,
    tokens=INT64,
    channels=INT64,
    splits=INT64,  # of the tokens
)
def multiply_and_sum(call, thread, threads):
    """Sums of a * b over parts of the tokens. A task is one of these."""
    batch, tokens, channels, splits = call.batch, call.tokens, call.channels, call.splits
    a, b = maps(call.a, (batch * tokens * channels,)), maps(call.b, (batch * tokens * channels,))
    sums = floats(call.sums, (batch, splits, channels))
    line = np.zeros(channels + LANES, np.float32)
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        image, split = task // splits, task % splits
        line[:] = 0
        for t in range(tokens * split // splits, tokens * (split + 1) // splits):
            place = (image * tokens + t) * channels
            for c in range(0, channels, LANES):
                lanes = min(LANES, channels - c)
                product = masked_load(a, place + c, lanes) * masked_load(b, place + c, lanes)
                store(line, c, load(line, c) + product)
        for c in range(channels):
            sums[image, split, c] = line[c]


@kernel(
    a=MAP,  # (B, T, C)
    scale=POINTER,  # (B, C)
    b=MAP,  # (B, T, C), or None for 1
    shift=POINTER,  # (B, C)
    out=MAP,  # (B, T, C)
    batch=INT64,
    tokens=INT64,
    channels=INT64,
    splits=INT64,  # of the tokens
)
def scale_and_shift(call, thread, threads):
    """out = a * scale + b * shift. A task is some tokens of an image."""
    tokens, channels, splits = call.tokens, call.channels, call.splits
    numbers = call.batch * tokens * channels
    a, b, out = maps(call.a, (numbers,)), maps(call.b, (numbers,)), maps(call.out, (numbers,))
    scale, shift = floats(call.scale, (call.batch * channels,)), floats(call.shift, (call.batch * channels,))
    one = broadcast(np.float32(1))
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        image, split = task // splits, task % splits
        for t in range(tokens * split // splits, tokens * (split + 1) // splits):
            place = (image * tokens + t) * channels
            for c in range(0, channels, LANES):
                lanes, n = min(LANES, channels - c), image * channels + c
                factor = masked_load(b, place + c, lanes) if call.b != 0 else one
                value = masked_load(a, place + c, lanes) * masked_load(scale, n, lanes)
                masked_store(out, place + c, value + factor * masked_load(shift, n, lanes), lanes)


def _tokens(x: Tensor) -> Tensor:
    return to_tokens(x).flatten(1, 2)


def sum_products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b (B, C, H, W) over the maps, (B, C) in float32."""
    first = _tokens(a)
    second = first if b is a else _tokens(b).to(a.dtype)
    batch, tokens, channels = first.shape
    splits = max(-(-tokens // LONGEST), 1)
    sums = torch.empty(batch, splits, channels)
    run(
        multiply_and_sum, batch * splits, a=first, b=second, sums=sums, batch=batch, tokens=tokens, channels=channels,
        splits=splits,
    )  # fmt: skip
    return sums.sum(dim=1)


def scale_and_add(a: Tensor, scale: Tensor, b: Tensor | None, shift: Tensor) -> Tensor:
    """a * scale + b * shift, or + shift without b; maps (B, C, H, W), numbers (B, C); channels last."""
    first = _tokens(a)
    batch, tokens, channels = first.shape
    splits, out = max(1, min(-(-2 * torch.get_num_threads() // batch), tokens)), torch.empty_like(first)
    run(
        scale_and_shift, batch * splits, a=first, scale=scale.float().contiguous(),
        b=None if b is None else _tokens(b).to(a.dtype), shift=shift.float().contiguous(), out=out, batch=batch,
        tokens=tokens, channels=channels, splits=splits,
    )  # fmt: skip
    return to_images(out.unflatten(1, a.shape[2:]))
