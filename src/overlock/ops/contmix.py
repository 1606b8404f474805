"""The public operations: checked, registered with PyTorch, and handed to a backend.

Each is one operator to ``torch.compile``, ``torch.export``, autocast, vmap and the profiler (registration.py); what
runs inside is chosen at the call (dispatch.py). Letters as in kernels/torch/reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.torch import reference
from overlock.ops.checks import Inputs, check_at_least
from overlock.ops.dispatch import BACKENDS, asked_for, choose, exports_to_onnx, run
from overlock.ops.gradients import register_backward
from overlock.ops.registration import register, to_layout_of, without_autocast


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rpb: Tensor | None,
    kernel_size: int,
    min_side: int = 0,
) -> Tensor:
    """Mix each token's neighbourhood with a kernel made from its affinity to the whole map (section 3.2).

        kernel[t] = softmax(weight @ (query[t] . key) + bias + rpb)        K x K taps, one kernel a token and group
        out[t]    = sum over the taps n of kernel[t, n] * value[window(t) + n]

    The window is centred on its token and shifted at the borders to lie inside the map, never padded. A map with a side
    shorter than K uses the taps that fall into it.

    Args:
        query: (B, G, D, H, W), already scaled. Any strides.
        key: (B, G, D, S^2), the region centres.
        value: (B, G, C, H, W), same H and W as ``query``. Any strides.
        weight: (K^2, S^2), from affinities to taps, row by row; shared by the groups.
        bias: (K^2,) or None.
        rpb: relative position bias (G, 2K-1, 2K-1), entry [key_row - query_row + K-1, ...] or None.
        kernel_size: K >= 1.
        min_side: a map with a shorter side than this is enlarged to it for the mixing, bilinearly and keeping the
            aspect, and the result averaged back: what the released models do with the size of their large kernel.

    Returns:
        (B, G, C, H, W), dtype and layout of ``value``. Logits and sums are kept in float32 (float64 for float64).

    Raises:
        ValueError: where shapes or devices do not fit or a type is none of floating-point numbers, naming the argument.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - scripts only as a condition of its own
        if exports_to_onnx():
            _check(query, key, value, weight, bias, rpb, kernel_size, min_side)
            return _mix_plainly(query, key, value, weight, bias, rpb, kernel_size, min_side)
    return torch.ops.overlock.contmix(query, key, value, weight, bias, rpb, kernel_size, min_side)


_INPUTS = Inputs(
    "contmix", query="B G D H W", key="B G D S^2", value="B G C H W", weight="K^2 S^2", bias="K^2", rpb="G 2K-1 2K-1"
)


def _check(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_size: int, min_side: int = 0,
) -> None:  # fmt: skip
    check_at_least("contmix", 1, kernel_size=kernel_size)
    check_at_least("contmix", 0, min_side=min_side)
    sizes = {"K^2": kernel_size * kernel_size, "2K-1": 2 * kernel_size - 1}
    _INPUTS.check(query, key, value, weight, bias, rpb, **sizes)


def _taps_inside(x: Tensor, kernel_size: int, height: int, width: int) -> Tensor:
    """View (Kh, Kw, ...) of the taps in (K^2, ...) for which a map has room."""
    return x.unflatten(0, (kernel_size, kernel_size))[:height, :width]


def _offsets_inside(rpb: Tensor, kernel_size: int, height: int, width: int) -> Tensor:
    """View (G, 2Kh-1, 2Kw-1) of the offsets that occur in a map."""
    top, left = max(kernel_size - height, 0), max(kernel_size - width, 0)
    return rpb[:, top : rpb.shape[1] - top, left : rpb.shape[2] - left]


def _cut_to_map(
    weight: Tensor, bias: Tensor | None, rpb: Tensor | None, kernel_size: int, height: int, width: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Drop the taps that a map with a side shorter than the kernel has no room for."""
    if kernel_size <= min(height, width):
        return weight, bias, rpb
    extent = (kernel_size, height, width)
    return (
        _taps_inside(weight, *extent).flatten(0, 1),
        None if bias is None else _taps_inside(bias, *extent).flatten(),
        None if rpb is None else _offsets_inside(rpb, *extent),
    )


def _resize(x: Tensor, size: list[int]) -> Tensor:
    """Bilinear, over the last two dimensions of (B, G, C, H, W)."""
    return F.interpolate(x.flatten(1, 2), size=size, mode="bilinear").unflatten(1, x.shape[1:3])


def _shrink(x: Tensor, height: int, width: int) -> Tensor:
    """Average an enlarged map (B, G, C, H, W) back to a size."""
    return F.adaptive_avg_pool2d(x.flatten(1, 2), (height, width)).unflatten(1, x.shape[1:3])


def _resize_backward(grad: Tensor, size: list[int]) -> Tensor:
    batch, groups, channels, height, width = grad.shape
    small = torch.ops.aten.upsample_bilinear2d_backward(
        grad.reshape(batch, groups * channels, height, width), [height, width], [batch, groups * channels, *size], False
    )
    return small.unflatten(1, (groups, channels))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_size: int, min_side: int = 0,
) -> Tensor:  # fmt: skip
    if value.numel() == 0:
        return torch.empty_like(value)
    given = value
    height, width = value.shape[3:]
    size = reference.enlarged(height, width, min_side)
    if size is not None:
        query, value = _resize(query, size), _resize(value, size)
        height, width = size
    cut = _cut_to_map(weight, bias, rpb, kernel_size, height, width)
    call = (query, key, value, *cut, min(kernel_size, height), min(kernel_size, width))
    with without_autocast(value.device.type):
        result = run("contmix", asked_for(), *call)
    if size is not None:
        result = _shrink(result, given.shape[3], given.shape[4])
    return to_layout_of(given, result)


def _mix_plainly(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_size: int, min_side: int = 0,
) -> Tensor:  # fmt: skip
    """The definition, for ONNX and all derivatives but the first; needs N = K^2 times the value's memory."""
    before = height, width = value.shape[3:]
    size = reference.enlarged(height, width, min_side)
    if size is not None:
        query, value = _resize(query, size), _resize(value, size)
        height, width = size
    cut = _cut_to_map(weight, bias, rpb, kernel_size, height, width)
    result = reference.contmix(query, key, value, *cut, min(kernel_size, height), min(kernel_size, width))
    if size is not None:
        result = reference.average_regions(result, *before)
    return result


@torch.no_grad()
def contmix_kernels(
    query: Tensor, key: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None, kernel_size: int,
    min_side: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What :func:`contmix` makes its kernels of, and these: for those who want to look at them.

    The arguments are those of :func:`contmix`. H' x W' is the map, enlarged where ``min_side`` says so.

    Returns:
        The affinities (B, G, H', W', S^2) and the kernels (B, G, H', W', Kh, Kw), whose taps sum to 1; float32, or
        float64 for such queries.
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, weight = query.to(exact), key.to(exact), weight.to(exact)
    size = reference.enlarged(query.shape[3], query.shape[4], min_side)
    if size is not None:
        query = _resize(query, size)
    height, width = query.shape[3:]
    cut = _cut_to_map(weight, bias, rpb, kernel_size, height, width)
    extent = min(kernel_size, height), min(kernel_size, width)
    kernels = reference.make_kernels(query, key, *cut, *extent)
    return reference.make_affinities(query, key), kernels.unflatten(-1, extent)


def _backward(
    grad: Tensor, backend: str, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None,
    rpb: Tensor | None, kernel_size: int, min_side: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    inputs = (query, key, value, weight, bias, rpb)
    if value.numel() == 0:
        return tuple(query.new_zeros(0) if x is None else torch.zeros_like(x) for x in inputs)
    height, width = value.shape[3:]
    size = reference.enlarged(height, width, min_side)
    if size is not None:
        query, value = _resize(query, size), _resize(value, size)
        like = value.flatten(1, 2)
        grad = torch.ops.aten._adaptive_avg_pool2d_backward(grad.flatten(1, 2), like).view_as(value)
        height, width = size
    cut = _cut_to_map(weight, bias, rpb, kernel_size, height, width)
    call = (query, key, value, *cut, min(kernel_size, height), min(kernel_size, width))
    with without_autocast(value.device.type):
        gradients_of: Any = BACKENDS[choose("contmix", backend, *call)].backward
        computed: list[Any] = list(gradients_of(grad, *call))
    if size is not None:
        computed[0] = _resize_backward(computed[0], list(inputs[0].shape[3:]))
        computed[2] = _resize_backward(computed[2], list(inputs[2].shape[3:]))
    if kernel_size > min(height, width):
        extent = (kernel_size, height, width)
        for i, inside in ((3, _taps_inside), (4, _taps_inside), (5, _offsets_inside)):
            if computed[i] is not None:
                whole = torch.zeros_like(inputs[i])  # type: ignore[arg-type]
                view = inside(whole, *extent)
                view.copy_(computed[i].view(view.shape))
                computed[i] = whole
    pairs = zip(inputs, computed, strict=True)
    return tuple(query.new_zeros(0) if x is None else to_layout_of(x, gradient) for x, gradient in pairs)


def region_centres(context: Tensor, region_grid: int, min_side: int = 0) -> Tensor:
    """Average a map over an S x S grid of regions, small maps enlarged first as in :func:`contmix`.

    (B, C, H, W) -> (B, C, S, S). One operator, because its result has the same size for any map.

    Raises:
        ValueError: for a context that is no such map, and for ``region_grid`` < 1.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - scripts only as a condition of its own
        if exports_to_onnx():
            _check_centres(context, region_grid, min_side)
            return _centres_plainly(context, region_grid, min_side)
    return torch.ops.overlock.region_centres(context, region_grid, min_side)


_CENTRES_INPUTS = Inputs("region_centres", context="B C H W")


def _check_centres(context: Tensor, region_grid: int, min_side: int = 0) -> None:
    check_at_least("region_centres", 1, region_grid=region_grid)
    check_at_least("region_centres", 0, min_side=min_side)
    _CENTRES_INPUTS.check(context)


def _centres_forward(context: Tensor, region_grid: int, min_side: int = 0) -> Tensor:
    size = reference.enlarged(context.shape[2], context.shape[3], min_side)
    if size is not None:
        context = F.interpolate(context, size=size, mode="bilinear")
    return F.adaptive_avg_pool2d(context, region_grid).contiguous()


def _centres_plainly(context: Tensor, region_grid: int, min_side: int = 0) -> Tensor:
    size = reference.enlarged(context.shape[2], context.shape[3], min_side)
    if size is not None:
        context = F.interpolate(context, size=size, mode="bilinear")
    return reference.average_regions(context, region_grid, region_grid)


def _centres_backward(grad: Tensor, _backend: str, context: Tensor, _region_grid: int, min_side: int = 0) -> Tensor:
    size = reference.enlarged(context.shape[2], context.shape[3], min_side)
    like = context if size is None else context.new_empty(*context.shape[:2], *size)
    grad = torch.ops.aten._adaptive_avg_pool2d_backward(grad, like)
    if size is not None:
        grad = torch.ops.aten.upsample_bilinear2d_backward(grad, size, list(context.shape), False)
    return torch.empty_like(context).copy_(grad)


_MIX = (
    "Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? rpb, int kernel_size, int min_side=0"
)
register(
    "contmix", f"({_MIX}) -> Tensor", _forward, lambda _query, _key, value, *_: torch.empty_like(value),
    check=_check, batched=3, cast=3,
)  # fmt: skip
register_backward(
    "contmix", _MIX, _backward, tensors=6, plain=_mix_plainly, backend=asked_for,
    check=_check, result_shape=lambda _query, _key, value, *_: value.shape,
)  # fmt: skip

_CENTRES = "Tensor context, int region_grid, int min_side=0"
register(
    "region_centres", f"({_CENTRES}) -> Tensor", _centres_forward,
    lambda context, region_grid, _=0: context.new_empty(*context.shape[:2], region_grid, region_grid),
    check=_check_centres, batched=1,
)  # fmt: skip
register_backward(
    "region_centres", _CENTRES, _centres_backward, tensors=1, plain=_centres_plainly, backend=asked_for,
    check=_check_centres, result_shape=lambda context, grid, *_: (*context.shape[:2], grid, grid),
)  # fmt: skip
