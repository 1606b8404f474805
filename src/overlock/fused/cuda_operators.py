"""What the fused network on CUDA is made of beside PyTorch's own layers: operators on Triton's kernels.

They have no gradients, and sums in float32. Results are channels last.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from overlock.ops.checks import Inputs
from overlock.ops.gradients import register_no_gradients
from overlock.ops.registration import operator_of, register


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of kernels.triton, imported when it is called: Triton may be absent."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"overlock.kernels.triton.{module}"), name)(*arguments)

    return call


def _register(schema: str, inputs: Inputs, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of which the first arguments are the tensors that ``inputs`` knows."""
    name, count = inputs.operator, len(inputs.shapes)
    register(name, schema, run, fake, check=lambda *call: inputs.check(*call[:count]))
    register_no_gradients(name)
    return operator_of(name)


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


# ---- 1x1 convolutions ----------------------------------------------------------------------------------------------


def _pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    residual_scale: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    from overlock.kernels.triton.pointwise import pointwise  # noqa: PLC0415 - Triton may be absent

    return pointwise(
        x, weight, bias, scale=scale, gate=gate, residual=residual, residual_scale=residual_scale, silu=silu
    )


def _pointwise_fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])  # len() would fix the batch of a graph
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_scaled_pointwise = _register(
    "(Tensor x, Tensor weight, Tensor bias, Tensor? scale, Tensor? gate, Tensor? residual, Tensor? residual_scale,"
    " bool silu) -> Tensor",
    Inputs(
        "scaled_pointwise", x="B I H W", weight="O I 1 1", bias="O", scale="B I", gate="B I H W", residual="B O H W",
        residual_scale="O", same_dtype=("weight", "bias", "scale", "gate", "residual", "residual_scale"),
    ),
    _pointwise, _pointwise_fake,
)  # fmt: skip


def scaled_pointwise(
    x: Tensor, conv: nn.Conv2d, *, scale: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, residual_scale: Tensor | None = None, silu: bool = False,
) -> Tensor:  # fmt: skip
    """act(conv(x * scale * gate)) + residual * residual_scale, a 1x1 convolution and what is beside it as one product.

    Args:
        x: (B, I, H, W).
        conv: weight (O, I, 1, 1) and a bias.
        scale: (B, I), by which the channels of an image are multiplied.
        gate: (B, I, H, W).
        residual: (B, O, H, W).
        residual_scale: (O,).
        silu: whether SiLU follows the convolution.

    Returns:
        (B, O, H, W).
    """
    return _scaled_pointwise(x, conv.weight, conv.bias, scale, gate, residual, residual_scale, silu)


# ---- other convolutions --------------------------------------------------------------------------------------------

add_bias = _register(
    "(Tensor x, Tensor bias, bool gelu) -> Tensor",
    Inputs("add_bias", x="B C H W", bias="C", same_dtype=("bias",)), _kernel("activations", "add_bias"), _like,
)  # fmt: skip
"""x + bias, or GELU of it."""

local_norm = _register(
    "(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps) -> (Tensor, Tensor)",
    Inputs(
        "local_norm", x="B C H W", weight="C 1 3 3", bias="C", norm_weight="C", norm_bias="C",
        same_dtype=("weight", "bias", "norm_weight", "norm_bias"),
    ),
    _kernel("local_norm", "local_norm"), lambda x, *_: (_like(x), _like(x)),
)  # fmt: skip
"""conv(x), and the layer norm of its channels."""

local_gelu = _register(
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    Inputs("local_gelu", x="B C H W", weight="C 1 3 3", bias="C", same_dtype=("weight", "bias")),
    _kernel("local_norm", "local_gelu"), _like,
)  # fmt: skip
"""GELU(conv(x))."""

filter_and_scale = _register(
    "(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
    Inputs(
        "filter_and_scale", x="B C H W", weight="C 1 3 3", bias="C", norm_weight="C",
        same_dtype=("weight", "bias", "norm_weight"),
    ),
    _kernel("local_response", "filter_and_scale"), lambda x, *_: (_like(x), x.new_empty(x.shape[:2])),
)  # fmt: skip
"""y = conv(GELU(x)), the middle of a ConvFFN, and the scales (B, C) that the response norm gives it."""


# ---- scales of channels --------------------------------------------------------------------------------------------

excitation = _register(
    "(Tensor x, Tensor first_weight, Tensor first_bias, Tensor second_weight, Tensor second_bias) -> Tensor",
    Inputs(
        "excitation", x="B C H W", first_weight="R C 1 1", first_bias="R", second_weight="C R 1 1", second_bias="C",
        same_dtype=("first_weight", "first_bias", "second_weight", "second_bias"),
    ),
    _kernel("channel_scales", "excitation"), lambda x, *_: x.new_empty(x.shape[:2]),
)  # fmt: skip
"""What squeeze-excite multiplies the channels of images by, (B, C)."""

response_norm = _register(
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    Inputs("fused_response_norm", x="B C H W", weight="C", bias="C", same_dtype=("weight", "bias")),
    _kernel("channel_scales", "response_norm"), _like,
)  # fmt: skip
"""The response norm, by three kernels."""


# ---- context ---------------------------------------------------------------------------------------------------------


def _join_fake(x: Tensor, context: Tensor, *_: object) -> Tensor:
    shape = (x.shape[0], x.shape[1] + context.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


join_context = _register(
    "(Tensor x, Tensor context, Tensor prior, Tensor? alpha, Tensor? beta, Tensor? bias) -> Tensor",
    Inputs(
        "join_context", x="B C H W", context="B P H W", prior="B P H W", alpha="P", beta="P", bias="P",
        same_dtype=("context", "prior", "alpha", "beta", "bias"),
    ),
    _kernel("context", "join_context"), _join_fake,
)  # fmt: skip
"""Features, and beside them alpha * context + beta * prior + bias (equation 1)."""
