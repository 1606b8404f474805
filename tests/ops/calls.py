"""Calls of the dynamic convolution: random inputs, in the memory layouts that networks bring, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = ("query", "key", "value", "weight", "bias", "rpb")
LAYOUTS = ("contiguous", "channels_last", "part_of_channels", "part_of_channels_last", "every_second", "transposed")


def make_inputs(
    *, batch=1, groups=2, depth=3, channels=2, height=6, width=7, kernel_size=3, grid=2, bias=True, rpb=True, seed=0,
    layout="contiguous", dtype=torch.float64, weight_dtype=None, device="cpu", requires_grad=False, logits=1.0,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Random inputs of one call; ``logits`` is their deviation before the biases, which have that of one.

    In the layout "expanded" every image has the same maps, and every tap and group the same biases, without a copy.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def place(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        return x.to(dtype).to(device)

    def place_map(part: int, scale: float = 1.0) -> Tensor:
        half, channels = slice(groups * part, None), 2 * groups * part
        shape, view = {
            "contiguous": ((batch, groups, part, height, width), lambda x: x),
            "channels_last": ((batch, groups, height, width, part), lambda x: x.permute(0, 1, 4, 2, 3)),
            "part_of_channels": ((batch, channels, height, width), lambda x: x[:, half].unflatten(1, (groups, part))),
            "part_of_channels_last": (
                (batch, height, width, channels),
                lambda x: x[..., half].permute(0, 3, 1, 2).unflatten(1, (groups, part)),
            ),
            "every_second": ((batch, groups, part, 2 * height, 2 * width), lambda x: x[..., ::2, 1::2]),
            "transposed": ((batch, groups, part, width, height), lambda x: x.transpose(3, 4)),
            "expanded": ((groups, part, height, width), lambda x: x.expand(batch, -1, -1, -1, -1)),
        }[layout]
        return view(place(scale * draw(*shape)))

    taps, side = kernel_size**2, 2 * kernel_size - 1
    expanded, weight_dtype = layout == "expanded", weight_dtype or dtype
    inputs = {
        "query": place_map(depth, logits * depth**-0.5),
        "key": place(draw(batch, groups, depth, grid**2)),
        "value": place_map(channels),
        "weight": place(draw(taps, grid**2) / grid, weight_dtype),
        "bias": place(draw(1 if expanded else taps), weight_dtype).expand(taps) if bias else None,
        "rpb": place(draw(1 if expanded else groups, side, side), weight_dtype).expand(groups, -1, -1) if rpb else None,
    }
    return {name: x if x is None else x.requires_grad_(requires_grad) for name, x in inputs.items()}


def with_gradients(function, inputs, cotangent_dtype=torch.float64):
    """Output and gradients of a call for a random cotangent, rounded to a type that may be narrower than the output."""
    output = function(**inputs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    cotangent = cotangent.to(cotangent_dtype).to(output)
    tensors = [x for x in inputs.values() if x is not None]
    return output.detach(), torch.autograd.grad(output, tensors, cotangent, materialize_grads=True)
