"""The operators of the fused network on CUDA beside the same in plain PyTorch, with the shapes of their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.fused import cuda_operators as cuda

EPS = 1e-6
Shapes = Callable[[int, int, int, int], list[tuple[int, ...]]]


def as_list(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _filter(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


def _channel_norms(x: Tensor) -> Tensor:
    norms = x.square().sum((2, 3)).sqrt()
    return norms / (norms.mean(1, keepdim=True) + EPS)


def _exact_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, gate: Tensor, residual: Tensor, residual_scale: Tensor
) -> Tensor:
    product = F.silu(F.conv2d(x * scale[:, :, None, None] * gate, weight, bias))
    return product + residual * residual_scale[:, None, None]


def _pointwise(*inputs: Tensor) -> Tensor:
    x, weight, bias, *factors = inputs
    return torch.ops.overlock.scaled_pointwise(x, weight, bias, *factors, True)


def _exact_local_norm(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    y = _filter(x, weight, bias)
    return y, F.layer_norm(y.permute(0, 2, 3, 1), x.shape[1:2], *norm, EPS).permute(0, 3, 1, 2)


def _exact_filter_and_scale(x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    y = _filter(F.gelu(x), weight, bias)
    return y, 1 + norm * _channel_norms(y)


def _exact_excitation(x: Tensor, *layers: Tensor) -> Tensor:
    inner = F.gelu(F.conv2d(x.mean((2, 3), keepdim=True), *layers[:2]))
    return F.conv2d(inner, *layers[2:]).sigmoid().flatten(1)


def _exact_response_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x * (1 + weight * _channel_norms(x))[:, :, None, None] + bias[:, None, None]


def _of_pointwise(b: int, c: int, h: int, w: int) -> list[tuple[int, ...]]:
    out = c + 24
    return [(b, c, h, w), (out, c, 1, 1), (out,), (b, c), (b, c, h, w), (b, out, h, w), (out,)]


def _exact_join(x: Tensor, context: Tensor, prior: Tensor, *scales: Tensor) -> Tensor:
    alpha, beta, bias = (scale[:, None, None] for scale in scales)
    return torch.cat([x, alpha * context + beta * prior + bias], dim=1)


OPERATORS: dict[str, tuple[Callable[..., object], Callable[..., object], Shapes]] = {
    "scaled_pointwise": (_pointwise, _exact_pointwise, _of_pointwise),
    "add_bias": (
        lambda *x: cuda.add_bias(*x, True), lambda x, bias: F.gelu(x + bias[:, None, None]),
        lambda b, c, h, w: [(b, c, h, w), (c,)],
    ),
    "local_norm": (
        lambda *x: cuda.local_norm(*x, EPS), _exact_local_norm,
        lambda b, c, h, w: [(b, c, h, w), (c, 1, 3, 3), (c,), (c,), (c,)],
    ),
    "local_gelu": (
        cuda.local_gelu, lambda *x: F.gelu(_filter(*x)), lambda b, c, h, w: [(b, c, h, w), (c, 1, 3, 3), (c,)]
    ),
    "filter_and_scale": (
        lambda *x: cuda.filter_and_scale(*x, EPS), _exact_filter_and_scale,
        lambda b, c, h, w: [(b, c, h, w), (c, 1, 3, 3), (c,), (c,)],
    ),
    "excitation": (
        cuda.excitation, _exact_excitation,
        lambda b, c, h, w: [(b, c, h, w), (18, c, 1, 1), (18,), (c, 18, 1, 1), (c,)],
    ),
    "fused_response_norm": (
        lambda *x: cuda.response_norm(*x, EPS), _exact_response_norm, lambda b, c, h, w: [(b, c, h, w), (c,), (c,)]
    ),
    "join_context": (
        cuda.join_context, _exact_join,
        lambda b, c, h, w: [(b, c, h, w), (b, 24, h, w), (b, 24, h, w), (24,), (24,), (24,)],
    ),
}  # fmt: skip
"""Of each: our operator, the plain form, and the shapes of the inputs for a map (B, C, H, W), which comes first."""
