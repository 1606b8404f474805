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


def _has_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take a call: float32 on CPU, no gradient wanted, no other backend asked for."""
    if not x.is_cpu or x.numel() == 0:
        return False
    with_gradients = torch.is_grad_enabled()
    for tensor in (x, *others):
        if tensor is not None and (tensor.dtype != torch.float32 or (with_gradients and tensor.requires_grad)):
            return False
    return numba_installed() and not _is_watched() and asked_for() in (AUTO, "cpu")


def _is_watched() -> bool:
    """Whether each operation is to be seen by a trace, a mode (such as a counter of FLOPs) or a transform (vmap)."""
    return (
        torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )  # fmt: skip


def _is_packable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return _has_kernels(x, weight, bias) and torch.backends.mkldnn.is_available()


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _pack_once(weight: Tensor, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """oneDNN's own layout of a weight, made at the first call and kept as long as the weight.

    A parameter that ``Module.to`` gives other memory has the version that it had; the old memory is held, lest the new
    should come to lie at its address.
    """
    version = None if weight.is_inference() else weight._version
    known = _packed.get(weight)
    if known is None or known[0] != version or known[1].data_ptr() != weight.data_ptr():
        known = _packed[weight] = (version, weight.detach(), pack(weight.contiguous()))
    return known[2]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() * weight.shape[0] < PACKED_FROM or not _is_packable(x, weight, bias):
        return F.linear(x, weight, bias)
    packed = _pack_once(weight, torch.ops.mkldnn._reorder_linear_weight)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    if not _has_kernels(x, weight, bias):
        y = _filter(x, weight, bias)
        return to_images(to_tokens(F.gelu(y) if gelu else y))
    from overlock.ops.cpu_filters import GELU_AFTER, filter_tokens  # noqa: PLC0415

    tokens = to_tokens(x)
    return to_images(filter_tokens(tokens, weight, bias, torch.empty_like(tokens), GELU_AFTER if gelu else 0))


def _filter(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight.permute(2, 0, 1)[:, None], bias, padding=weight.shape[0] // 2, groups=x.shape[1])


def _squeeze_excite(
    x: Tensor, other: Tensor | None, gate: Tensor | None,
    reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor,
) -> Tensor:  # fmt: skip
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    y = to_tokens(x).flatten(1, 2)
    other = None if other is None else to_tokens(other).flatten(1, 2)
    gate = None if gate is None else to_tokens(gate).flatten(1, 2)
    if _has_kernels(y, other, gate, *parameters):
        from overlock.ops.cpu_scales import squeeze_excite  # noqa: PLC0415

        y = squeeze_excite(y, other, gate, *parameters)
    else:
        y = y if other is None else y + other
        hidden = F.gelu(F.linear(y.mean(dim=1, keepdim=True), reduce_weight, reduce_bias))
        y = y * F.linear(hidden, expand_weight, expand_bias).sigmoid()
        y = y if gate is None else y * F.silu(gate)
    return to_images(y.unflatten(1, x.shape[2:]))


def _response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    tokens = to_tokens(x)
    flat = tokens.flatten(1, 2)
    if _has_kernels(x, weight, bias):
        from overlock.ops.cpu_scales import response_norm  # noqa: PLC0415

        y = response_norm(flat, weight, bias, eps, torch.empty_like(flat))
    else:
        y = _normalise(flat, weight, eps) + bias
    return to_images(y.view_as(tokens))


def _normalise(tokens: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Response norm of (B, T, C), without a bias."""
    exact = torch.promote_types(tokens.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tokens, dim=1, dtype=exact)
    return tokens * _response_scale(norms, weight, eps).to(tokens.dtype)[:, None]


def _response_scale(norms: Tensor, weight: Tensor, eps: float) -> Tensor:
    return 1 + weight * (norms / (norms.mean(dim=1, keepdim=True) + eps))


def _conv_ffn(
    x: Tensor, expand_weight: Tensor, expand_bias: Tensor, local_weight: Tensor, local_bias: Tensor,
    norm_weight: Tensor, project_weight: Tensor, project_bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Some images at a time, so that their hidden maps need never leave the cache."""
    tokens = to_tokens(x)
    parameters = (expand_weight, expand_bias, local_weight, local_bias, norm_weight, project_weight, project_bias)
    if not _has_kernels(x, *parameters):
        hidden = F.gelu(F.linear(tokens, expand_weight, expand_bias))
        hidden = to_tokens(_filter(to_images(hidden), local_weight, local_bias)).flatten(1, 2)
        y = F.linear(_normalise(hidden, norm_weight, eps), project_weight, project_bias)
        return to_images(y.unflatten(1, x.shape[2:]))
    from overlock.ops.cpu_filters import GELU_BEFORE, filter_tokens  # noqa: PLC0415

    batch, height, width, _ = tokens.shape
    hidden_size = height * width * expand_weight.shape[0] * x.element_size()
    outputs = []
    for part in tokens.split(max(1, min(batch, CHUNK // max(hidden_size, 1)))):
        hidden = _linear(part, expand_weight, expand_bias)
        squares = hidden.new_empty(hidden.shape[0], hidden.shape[3])
        filter_tokens(hidden, local_weight, local_bias, hidden, GELU_BEFORE, squares)
        outputs.append(
            _normalise_and_project(hidden.flatten(1, 2), squares, norm_weight, eps, project_weight, project_bias)
        )
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return to_images(y.unflatten(1, (height, width)))


def _normalise_and_project(
    hidden: Tensor, squares: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Response norm of (B, T, C') and projection with weight (C, C'): scales go to the smaller of the two."""
    batch, tokens, _ = hidden.shape
    if tokens < 4 * weight.shape[0]:  # where a packed weight is worth more than a pass over the tokens
        from overlock.ops.cpu_scales import response_norm  # noqa: PLC0415

        zeros = torch.zeros_like(norm_weight)
        return _linear(response_norm(hidden, norm_weight, zeros, eps, hidden, squares), weight, bias)
    scale = _response_scale(squares.sqrt(), norm_weight, eps)
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
    small = min(height, width, *context.shape[2:]) < max(sizes)  # to be enlarged
    if small or not _has_kernels(query, context, value, key_weight, key_bias, *weights, *biases, *rpbs):
        key = F.linear(region_centres(context, region_grid, max(sizes)).flatten(2).mT, key_weight, key_bias).mT
        query, key = query.unflatten(1, (groups, -1)), key.unflatten(1, (groups, -1))
        parts = [part.unflatten(1, (groups, -1)) for part in value.split(share, dim=1)]
        mixed = [
            contmix(query, key, part, weight.t(), bias, rpb, k, max(sizes)).flatten(1, 2)
            for part, (k, weight, bias, rpb) in zip(parts, kinds, strict=True)
        ]
        return to_images(to_tokens(torch.cat(mixed, dim=1)))
    centres = F.adaptive_avg_pool2d(context, region_grid).flatten(2)
    keys = torch.matmul(key_weight, centres)
    keys = (keys if key_bias is None else keys + key_bias[:, None]).contiguous()
    queries, values = to_tokens(query), to_tokens(value)
    out, depth = torch.empty_like(values), queries.shape[3] // groups
    of_queries = (height * width * depth * groups, depth, 1, depth * groups)
    of_values = (height * width * channels, share // groups, 1, channels)
    strides = (*of_queries, *of_values, *of_values)
    for i, (k, weight, bias, rpb) in enumerate(kinds):
        start = i * share * value.element_size()
        parameters = (weight.contiguous(), bias.contiguous(), rpb.contiguous())
        places = (queries, keys, values.data_ptr() + start, *parameters, out.data_ptr() + start)
        mix_into(places, (batch, groups, depth, share // groups, height, width, k, k), region_grid**2, strides)
    return to_images(out)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gelu: bool) -> Tensor:
    padding = weight.shape[2] // 2
    if not _is_packable(x, weight, bias):
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
    """Register an operation for graphs; outside of them the implementation is called at once, which saves a detour.

    The operation has no gradient: a graph that wants one takes the layers that it stands for.
    """
    torch.library.define(f"overlock::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"overlock::{name}", ("cpu", "cuda"), implementation)
    torch.library.register_fake(f"overlock::{name}", fake)
    operator = getattr(torch.ops.overlock, name).default

    def call(*inputs: Any) -> Tensor:
        in_graph = torch.compiler.is_compiling() and not _want_gradients(inputs)
        return operator(*inputs) if in_graph else implementation(*inputs)

    return call


def _want_gradients(inputs: tuple[Any, ...]) -> bool:
    tensors = [x for group in inputs for x in (group if isinstance(group, list) else [group])]
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


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
