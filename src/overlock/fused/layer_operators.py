"""Single layers of the fused network, for what stands outside of its blocks (stage_operators.py).

On CPU in float32 without gradients they are our depthwise filter (kernels/numba/depthwise.py) and oneDNN's products
with weights packed once; elsewhere the layers that they stand for. Images are (B, C, H, W) in channels_last, so (B, H,
W, C) in memory, where a 1x1 convolution is a matrix product; other layouts are turned first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from overlock.fused.conditions import kernels_apply
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.ops.dispatch import exports_to_onnx
from overlock.ops.gradients import register_plain_autograd

PACKED_FROM = 15_000_000  # multiply-adds of a product from which on a packed weight outweighs oneDNN's longer call


def _is_packable(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    fits = x.numel() > 0 and x.shape[-1:] == weight.shape[1:]  # F.linear refuses other shapes
    return fits and kernels_apply(x, weight, bias) and torch.backends.mkldnn.is_available()


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
    fits = x.numel() > 0 and x.dim() == 4 and x.shape[1] == weight.shape[2]  # F.conv2d refuses other shapes
    if not fits or not kernels_apply(x, weight, bias):
        return _filter(x, weight, bias, gelu)
    from overlock.kernels.numba.depthwise import filter_tokens  # noqa: PLC0415
    from overlock.kernels.numba.flags import GELU  # noqa: PLC0415

    return to_images(filter_tokens(to_tokens(x), weight, bias, epilogue=GELU if gelu else 0))


def _filter(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    y = F.conv2d(x, weight.permute(2, 0, 1)[:, None], bias, padding="same", groups=x.shape[1])
    return to_images(to_tokens(F.gelu(y) if gelu else y))


def _define(
    name: str, arguments: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor],
    plain: Callable[..., Tensor],
) -> Callable[..., Tensor]:  # fmt: skip
    """Register an operation for graphs; outside of them the implementation is called at once, which saves a detour.

    A graph that wants gradients takes the layers that the operation stands for; where it does after all, as an
    exported one may, they are those of the plain form.
    """
    torch.library.define(f"overlock::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"overlock::{name}", ("cpu", "cuda"), implementation)
    torch.library.register_fake(f"overlock::{name}", fake)
    register_plain_autograd(name, plain)
    operator = getattr(torch.ops.overlock, name).default

    def call(*inputs: object) -> Tensor:
        in_graph = torch.compiler.is_compiling() and not (_want_gradients(inputs) or exports_to_onnx())
        return operator(*inputs) if in_graph else implementation(*inputs)

    return call


def _want_gradients(inputs: tuple[object, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _images_like(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return to_images(x.new_empty(batch, height, width, channels))


linear = _define(
    "linear", "Tensor x, Tensor weight, Tensor? bias", _linear,
    lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[0]), F.linear,
)  # fmt: skip
depthwise = _define(
    "depthwise", "Tensor x, Tensor weight, Tensor bias, bool gelu", _depthwise,
    lambda x, *_: _images_like(x), _filter,
)  # fmt: skip
