"""Operations of the fused network: several layers in one pass over memory.

On CPU in float32 without gradients they are numba's kernels (cpu_filters.py, cpu_scales.py) and oneDNN's products with
weights packed once; elsewhere the layers that they stand for. Images are (B, C, H, W) in channels_last, so (B, H, W, C)
in memory, where a 1x1 convolution is a matrix product; other layouts are turned first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from overlock.ops.backends import AUTO, asked_for
from overlock.ops.cpu import mix_into, numba_installed
from overlock.ops.functional import contmix, region_centres

CHUNK = 8 << 20  # bytes of a ConvFFN's hidden map that are made and used up before the next images': a cache's share
PACKED_FROM = 15_000_000  # multiply-adds of a product from which on a packed weight outweighs oneDNN's longer call


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as contiguous (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def to_images(tokens: Tensor) -> Tensor:
    """(B, H, W, C) as (B, C, H, W) in channels_last."""
    return tokens.permute(0, 3, 1, 2)


def _has_kernels(x: Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 and numba_installed()
        and not (torch.is_grad_enabled() and x.requires_grad)
    )  # fmt: skip


def _is_packable(x: Tensor) -> bool:
    return _has_kernels(x) and torch.backends.mkldnn.is_available()


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _pack_once(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """oneDNN's own layout of a weight, made at the first call and kept as long as the weight."""
    version = None if weight.is_inference() else weight._version
    known = _packed.get(weight)
    if known is None or known[0] != version:
        known = _packed[weight] = (version, pack(weight.contiguous()))
    return known[1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() * weight.shape[0] < PACKED_FROM or not _is_packable(x):
        return F.linear(x, weight, bias)
    packed = _pack_once(weight, torch.ops.mkldnn._reorder_linear_weight)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    if not _has_kernels(x):
        y = F.conv2d(x, weight.permute(2, 0, 1)[:, None], bias, padding=weight.shape[0] // 2, groups=x.shape[1])
        return to_images(to_tokens(F.gelu(y) if gelu else y))
    from overlock.ops.cpu_filters import GELU_AFTER, filter_tokens  # noqa: PLC0415

    tokens = to_tokens(x)
    return to_images(filter_tokens(tokens, weight, bias, torch.empty_like(tokens), GELU_AFTER if gelu else 0))


def _squeeze_excite(
    x: Tensor, other: Tensor | None, gate: Tensor | None,
    reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor,
) -> Tensor:  # fmt: skip
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    tokens, *others = (None if t is None else to_tokens(t).flatten(1, 2) for t in (x, other, gate))
    if _has_kernels(x):
        from overlock.ops.cpu_scales import squeeze_excite  # noqa: PLC0415

        y = squeeze_excite(tokens, *others, *parameters)  # type: ignore[arg-type]
    else:
        y = tokens if other is None else tokens + others[0]  # type: ignore[operator]
        hidden = F.gelu(F.linear(y.mean(dim=1, keepdim=True), reduce_weight, reduce_bias))  # type: ignore[union-attr]
        y = y * F.linear(hidden, expand_weight, expand_bias).sigmoid()
        y = y if gate is None else y * F.silu(others[1])
    return to_images(y.unflatten(1, x.shape[2:]))  # type: ignore[union-attr]


def _response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    tokens = to_tokens(x)
    flat = tokens.flatten(1, 2)
    if _has_kernels(x):
        from overlock.ops.cpu_scales import response_norm  # noqa: PLC0415

        y = response_norm(flat, weight, bias, torch.tensor([eps]), torch.empty_like(flat))
    else:
        y = flat * _response_scale(_sums_of_squares(flat), weight, eps).to(x.dtype)[:, None] + bias
    return to_images(y.view_as(tokens))


def _sums_of_squares(tokens: Tensor) -> Tensor:
    exact = torch.promote_types(tokens.dtype, torch.float32)
    return torch.linalg.vector_norm(tokens, dim=1, dtype=exact).square()


def _response_scale(squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    norms = squares.sqrt()
    return 1 + weight * (norms / (norms.mean(dim=1, keepdim=True) + eps))


def _conv_ffn(
    x: Tensor, expand_weight: Tensor, expand_bias: Tensor, local_weight: Tensor, local_bias: Tensor,
    norm_weight: Tensor, project_weight: Tensor, project_bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Some images at a time, so that their hidden maps need never leave the cache."""
    tokens = to_tokens(x)
    batch, height, width, _ = tokens.shape
    hidden_size = height * width * expand_weight.shape[0] * x.element_size()
    outputs = []
    for part in tokens.split(max(1, min(batch, CHUNK // max(hidden_size, 1)))):
        hidden = _linear(part, expand_weight, expand_bias)
        hidden, squares = _activate_and_filter(hidden, local_weight, local_bias)
        outputs.append(
            _normalise_and_project(hidden.flatten(1, 2), squares, norm_weight, eps, project_weight, project_bias)
        )
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return to_images(y.unflatten(1, (height, width)))


def _activate_and_filter(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and depthwise convolution of (B, H, W, C'), and each channel's sum of squares (B, C') of the result."""
    if not _has_kernels(hidden):
        hidden = to_tokens(_depthwise(to_images(F.gelu(hidden)), weight, bias, False))
        return hidden, _sums_of_squares(hidden.flatten(1, 2))
    from overlock.ops.cpu_filters import GELU_BEFORE, filter_tokens  # noqa: PLC0415

    squares = torch.empty(hidden.shape[0], hidden.shape[3])
    return filter_tokens(hidden, weight, bias, hidden, GELU_BEFORE, squares), squares


def _normalise_and_project(
    hidden: Tensor, squares: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Response norm of (B, T, C') and projection with weight (C, C'): scales go to the smaller of the two."""
    batch, tokens, _ = hidden.shape
    if not _has_kernels(hidden):
        return F.linear(hidden * _response_scale(squares, norm_weight, eps).to(hidden.dtype)[:, None], weight, bias)
    if tokens < 4 * weight.shape[0]:  # where a packed weight is worth more than a pass over the tokens
        from overlock.ops.cpu_scales import response_norm  # noqa: PLC0415

        zeros = torch.zeros_like(norm_weight)
        return _linear(response_norm(hidden, norm_weight, zeros, torch.tensor([eps]), hidden, squares), weight, bias)
    scale = _response_scale(squares, norm_weight, eps)
    y = hidden.new_empty(batch, tokens, weight.shape[0])
    for i in range(batch):
        torch.addmm(bias, hidden[i], (weight * scale[i]).t(), out=y[i])
    return y


def _context_mix(
    query: Tensor, context: Tensor, value: Tensor, key_weight: Tensor, key_bias: Tensor | None,
    weights: list[Tensor], biases: list[Tensor], rpbs: list[Tensor], region_grid: int,
) -> Tensor:  # fmt: skip
    groups, sizes = rpbs[0].shape[0], [(rpb.shape[1] + 1) // 2 for rpb in rpbs]
    batch, channels, height, width = value.shape
    share = channels // len(sizes)
    kinds = list(zip(sizes, weights, biases, rpbs, strict=True))
    if not _has_kernels(value) or min(height, width) < max(sizes) or asked_for() not in (AUTO, "cpu"):
        key = F.linear(region_centres(context, region_grid, max(sizes)).flatten(2).mT, key_weight, key_bias).mT
        query, key = query.unflatten(1, (groups, -1)), key.unflatten(1, (groups, -1))
        parts = [part.unflatten(1, (groups, -1)) for part in value.split(share, dim=1)]
        mixed = [
            contmix(query, key, part, weight[:, : k * k].t(), bias, rpb, k, max(sizes)).flatten(1, 2)
            for part, (k, weight, bias, rpb) in zip(parts, kinds, strict=True)
        ]
        return to_images(to_tokens(torch.cat(mixed, dim=1)))
    centres = F.adaptive_avg_pool2d(context, region_grid).flatten(2)
    keys = torch.matmul(key_weight, centres)
    keys = (keys if key_bias is None else keys + key_bias[:, None]).contiguous()
    queries, values = to_tokens(query), to_tokens(value)
    out, depth = torch.empty_like(values), queries.shape[3] // groups
    strides = (height * width * depth * groups, depth, 1, depth * groups)
    strides += 2 * (height * width * channels, share // groups, 1, channels)
    for i, (k, *tensors) in enumerate(kinds):
        start = i * share * value.element_size()
        places = (queries, keys, values.data_ptr() + start, *tensors, out.data_ptr() + start)
        mix_into(places, (batch, groups, depth, share // groups, height, width, k, k), region_grid**2, strides)
    return to_images(out)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool) -> Tensor:
    padding = weight.shape[2] // 2
    if not _is_packable(x):
        y = F.conv2d(x, weight, bias, stride, padding)
        return to_images(to_tokens(F.gelu(y) if gelu else y))
    shape, ones = list(x.shape), [1, 1]

    def pack(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, [padding] * 2, [stride] * 2, ones, 1, shape)

    y = torch.ops.mkldnn._convolution_pointwise(
        x.contiguous(memory_format=torch.channels_last), _pack_once(weight, pack), bias, [padding] * 2, [stride] * 2,
        ones, 1, "gelu" if gelu else "none", [], "none",
    )  # fmt: skip
    return to_images(to_tokens(y))


def _define(
    name: str, arguments: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register an operation for graphs; outside of them the implementation is called at once, which saves a detour."""
    torch.library.define(f"overlock::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"overlock::{name}", ("cpu", "cuda"), implementation)
    torch.library.register_fake(f"overlock::{name}", fake)
    operator = getattr(torch.ops.overlock, name).default

    def call(*inputs: Any) -> Tensor:
        return operator(*inputs) if torch.compiler.is_compiling() else implementation(*inputs)

    return call


def _images_like(x: Tensor, channels: int, stride: int = 1) -> Tensor:
    return to_images(x.new_empty(x.shape[0], -(-x.shape[2] // stride), -(-x.shape[3] // stride), channels))


linear = _define(
    "linear", "Tensor x, Tensor weight, Tensor? bias", _linear,
    lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[0]),
)  # fmt: skip
depthwise = _define(
    "depthwise", "Tensor x, Tensor weight, Tensor bias, bool gelu", _depthwise,
    lambda x, *_: _images_like(x, x.shape[1]),
)  # fmt: skip
conv = _define(
    "conv", "Tensor x, Tensor weight, Tensor? bias, int stride, bool gelu", _conv,
    lambda x, weight, _bias, stride, _gelu: _images_like(x, weight.shape[0], stride),
)  # fmt: skip
squeeze_excite = _define(
    "squeeze_excite",
    "Tensor x, Tensor? other, Tensor? gate, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight,"
    " Tensor expand_bias",
    _squeeze_excite, lambda x, *_: _images_like(x, x.shape[1]),
)  # fmt: skip
response_norm = _define(
    "response_norm", "Tensor x, Tensor weight, Tensor bias, float eps", _response_norm,
    lambda x, *_: _images_like(x, x.shape[1]),
)  # fmt: skip
context_mix = _define(
    "context_mix",
    "Tensor query, Tensor context, Tensor value, Tensor key_weight, Tensor? key_bias, Tensor[] weights,"
    " Tensor[] biases, Tensor[] rpbs, int region_grid",
    _context_mix, lambda _query, _context, value, *_: _images_like(value, value.shape[1]),
)  # fmt: skip
conv_ffn = _define(
    "conv_ffn",
    "Tensor x, Tensor expand_weight, Tensor expand_bias, Tensor local_weight, Tensor local_bias, Tensor norm_weight,"
    " Tensor project_weight, Tensor project_bias, float eps",
    _conv_ffn, lambda x, *others: _images_like(x, others[5].shape[0]),
)  # fmt: skip
