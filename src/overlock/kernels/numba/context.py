"""Focus-Net's context on CPU: its means over regions, and features, context and prior side by side."""

from __future__ import annotations

import numpy as np

from overlock.kernels.numba.arguments import INT64, POINTER
from overlock.kernels.numba.runtime import ANY, floats, kernel, task_range
from overlock.kernels.numba.simd import LANES, broadcast, masked_load, masked_store


@kernel(
    x=POINTER,  # (B, H, W, C), tokens of a stride
    means=POINTER,  # (B, S S, C)
    batch=INT64,
    height=INT64,
    width=INT64,
    channels=INT64,
    stride=INT64,
    region_grid=INT64,  # S
)
def region_means(call, thread, threads):
    """Means over S x S regions. A task is one of them."""
    height, width, channels, stride, grid = call.height, call.width, call.channels, call.stride, call.region_grid
    images, means = floats(call.x, ANY), floats(call.means, (call.batch * grid * grid * channels,))
    begin, end = task_range(call.tasks, thread, threads)
    for task in range(begin, end):
        b, i, j = task // (grid * grid), task // grid % grid, task % grid
        top, bottom = height * i // grid, (height * (i + 1) + grid - 1) // grid
        left, right = width * j // grid, (width * (j + 1) + grid - 1) // grid
        for c in range(0, channels, LANES):
            lanes, both = min(LANES, channels - c), broadcast(np.float32(0))
            for y in range(top, bottom):
                line = broadcast(np.float32(0))
                for x in range(left, right):
                    line = line + masked_load(images, ((b * height + y) * width + x) * stride + c, lanes)
                both = both + line
            both = both * broadcast(np.float32(1) / np.float32((bottom - top) * (right - left)))
            masked_store(means, task * channels + c, both, lanes)


@kernel(
    features=POINTER,  # (tokens, C)
    context=POINTER,  # (tokens, Cc)
    prior=POINTER,  # (tokens, Cc), or None
    alpha=POINTER,  # (Cc)
    beta_weight=POINTER,  # (Cc)
    beta_bias=POINTER,  # (Cc)
    out=POINTER,  # (tokens, C + Cc)
    tokens=INT64,
    channels=INT64,  # C
    context_channels=INT64,  # Cc
    features_stride=INT64,
    context_stride=INT64,
    prior_stride=INT64,
)
def join_context(call, thread, threads):
    """out = features beside the context, or with a prior beside alpha * context + beta_weight * prior + beta_bias."""
    channels, beside, tasks = call.channels, call.context_channels, call.tasks
    features, context, prior = floats(call.features, ANY), floats(call.context, ANY), floats(call.prior, ANY)
    alpha, weight, bias = floats(call.alpha, ANY), floats(call.beta_weight, ANY), floats(call.beta_bias, ANY)
    out = floats(call.out, ANY)
    begin, end = task_range(tasks, thread, threads)
    for t in range(call.tokens * begin // tasks, call.tokens * end // tasks):
        place = t * (channels + beside)
        for c in range(0, channels, LANES):
            lanes = min(LANES, channels - c)
            masked_store(out, place + c, masked_load(features, t * call.features_stride + c, lanes), lanes)
        for c in range(0, beside, LANES):
            lanes = min(LANES, beside - c)
            value = masked_load(context, t * call.context_stride + c, lanes)
            if call.prior != 0:
                value = value * masked_load(alpha, c, lanes) + masked_load(bias, c, lanes)
                value = value + masked_load(prior, t * call.prior_stride + c, lanes) * masked_load(weight, c, lanes)
            masked_store(out, place + channels + c, value, lanes)
