"""Focus-Net's context on CPU: features, context and prior side by side."""

from __future__ import annotations

from overlock.kernels.numba.arguments import INT64, POINTER
from overlock.kernels.numba.runtime import ANY, floats, kernel, task_range
from overlock.kernels.numba.simd import LANES, masked_load, masked_store


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
