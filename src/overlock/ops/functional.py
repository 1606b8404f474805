"""The public operations: checked, registered with PyTorch, and handed to a backend.

Each is one operator to ``torch.compile``, ``torch.export``, autocast and the profiler; what runs inside is chosen at
the call (backends.py). Letters as in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overlock.ops.backends import choose

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? rpb, int kernel_size) -> Tensor"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, Tensor? rpb, int kernel_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rpb: Tensor | None,
    kernel_size: int,
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

    Returns:
        (B, G, C, H, W), dtype and memory layout of ``value``. Logits and sums are kept in float32 (float64 for float64).

    Raises:
        ValueError: where shapes do not fit, naming the argument.
    """
    if not torch.jit.is_scripting():
        _check(query, key, value, weight, bias, rpb, kernel_size)
        device = value.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return torch.ops.overlock.contmix(query, key, value, weight, bias, rpb, kernel_size)


def _check(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None, kernel_size: int
) -> None:
    if query.dim() != 5 or value.dim() != 5 or key.dim() != 4:
        raise ValueError(
            "contmix takes query (B, G, D, H, W), key (B, G, D, S^2) and value (B, G, C, H, W);"
            f" got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, groups, depth, height, width = query.shape
    if tuple(key.shape[:3]) != (batch, groups, depth):
        raise ValueError(f"key must be ({batch}, {groups}, {depth}, S^2) to fit query; got {tuple(key.shape)}")
    if tuple(value.shape[:2]) != (batch, groups) or tuple(value.shape[3:]) != (height, width):
        raise ValueError(
            f"value must be ({batch}, {groups}, C, {height}, {width}) to fit query; got {tuple(value.shape)}"
        )
    taps = kernel_size * kernel_size
    if kernel_size < 1 or tuple(weight.shape) != (taps, key.shape[3]):
        raise ValueError(
            f"weight must be (K^2, S^2) = ({taps}, {key.shape[3]}) for kernel_size {kernel_size};"
            f" got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (taps,):
        raise ValueError(f"bias must be (K^2,) = ({taps},); got {tuple(bias.shape)}")
    side = 2 * kernel_size - 1
    if rpb is not None and tuple(rpb.shape) != (groups, side, side):
        raise ValueError(f"rpb must be (G, 2K-1, 2K-1) = ({groups}, {side}, {side}); got {tuple(rpb.shape)}")


def _cut_to_map(
    weight: Tensor, bias: Tensor | None, rpb: Tensor | None, kernel_size: int, height: int, width: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Drop the taps that a map with a side shorter than the kernel has no room for. Returns views."""
    rows, columns = min(kernel_size, height), min(kernel_size, width)
    if rows == columns == kernel_size:
        return weight, bias, rpb
    shape = (kernel_size, kernel_size)
    weight = weight.unflatten(0, shape)[:rows, :columns].flatten(0, 1)
    bias = None if bias is None else bias.unflatten(0, shape)[:rows, :columns].flatten()
    if rpb is not None:
        first_row, first_column = kernel_size - rows, kernel_size - columns
        rpb = rpb[:, first_row : first_row + 2 * rows - 1, first_column : first_column + 2 * columns - 1]
    return weight, bias, rpb


def _forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None, kernel_size: int
) -> Tensor:
    if value.numel() == 0:
        return torch.empty_like(value)
    height, width = value.shape[3:]
    weight, bias, rpb = _cut_to_map(weight, bias, rpb, kernel_size, height, width)
    call = (query, key, value, weight, bias, rpb, min(kernel_size, height), min(kernel_size, width))
    with torch.autocast(value.device.type, enabled=False):
        mixed = choose(*call).forward(*call)
    return torch.empty_like(value).copy_(mixed) if mixed.stride() != torch.empty_like(value).stride() else mixed


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (query, key, value, weight, bias, rpb)
    gradients = [torch.zeros_like(x) if x is not None else query.new_empty(0) for x in inputs]
    if value.numel() == 0:
        return tuple(gradients)  # type: ignore[return-value]
    height, width = value.shape[3:]
    cut = _cut_to_map(weight, bias, rpb, kernel_size, height, width)
    call = (query, key, value, *cut, min(kernel_size, height), min(kernel_size, width))
    with torch.autocast(value.device.type, enabled=False):
        computed = choose(*call).backward(grad, *call)
    rows, columns = min(kernel_size, height), min(kernel_size, width)
    for position, gradient in enumerate(computed):
        if gradient is None:
            continue
        target = gradients[position]
        if position == 3:
            target = target.unflatten(0, (kernel_size, kernel_size))[:rows, :columns]
        elif position == 4:
            target = target.unflatten(0, (kernel_size, kernel_size))[:rows, :columns]
        elif position == 5:
            first_row, first_column = kernel_size - rows, kernel_size - columns
            target = target[:, first_row : first_row + 2 * rows - 1, first_column : first_column + 2 * columns - 1]
        target.copy_(gradient.view(target.shape))
    return tuple(gradients)  # type: ignore[return-value]


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.kernel_size = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad: Tensor):  # noqa: ANN001, ANN202
    tensors = ctx.saved_tensors
    gradients = torch.ops.overlock.contmix_backward(grad, *tensors, ctx.kernel_size)
    return *(g if x is not None else None for g, x in zip(gradients, tensors, strict=True)), None


torch.library.define("overlock::contmix", _SCHEMA)
torch.library.define("overlock::contmix_backward", _BACKWARD_SCHEMA)
torch.library.impl("overlock::contmix", ("cpu", "cuda"), _forward)
torch.library.impl("overlock::contmix_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("overlock::contmix", lambda query, key, value, *_: torch.empty_like(value))
torch.library.register_fake(
    "overlock::contmix_backward",
    lambda grad, *inputs: tuple(
        torch.empty_like(x) if x is not None else inputs[0].new_empty(0) for x in inputs[:6]
    ),
)
torch.library.register_autograd("overlock::contmix", _autograd, setup_context=_setup_context)
