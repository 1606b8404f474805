"""What the fused network on CUDA is made of beside PyTorch's own layers: one operator, and products scaled by image.

``overlock::filter_and_scale`` is the middle of a ConvFFN (kernels/triton/local_response.py). The scales that the
response norm and squeeze-excite give the channels of each image are left to the 1x1 convolution that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overlock.ops.checks import Inputs
from overlock.ops.gradients import register_no_gradients
from overlock.ops.registration import operator_of, register

_INPUTS = Inputs(
    "filter_and_scale", x="B C H W", weight="C 1 3 3", bias="C", norm_weight="C",
    same_dtype=("weight", "bias", "norm_weight"),
)  # fmt: skip


def _check(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, _eps: float) -> None:
    _INPUTS.check(x, weight, bias, norm_weight)


def _run(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from overlock.kernels.triton.local_response import filter_and_scale  # noqa: PLC0415 - Triton may be absent

    return filter_and_scale(x, weight, bias, norm_weight, eps)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), x.new_empty(x.shape[:2])


register(
    "filter_and_scale", "(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, float eps) -> (Tensor, Tensor)",
    _run, _fake, check=_check,
)  # fmt: skip
register_no_gradients("filter_and_scale")
filter_and_scale = operator_of("filter_and_scale")
"""y = conv(GELU(x)) in channels last, and the scales (B, C) that the response norm gives it."""


def scaled_pointwise(x: Tensor, scale: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(x * scale)``, a 1x1 convolution of images whose channels are scaled, each image's by its own numbers.

    On a map of more positions than the convolution has outputs, it is the weight that is scaled, one for each image,
    and the convolution is as many products: writing these and reading them again moves fewer bytes than to do so with
    the map (Cin Cout against Cin H W numbers, both ways).

    Args:
        x: (B, Cin, H, W).
        scale: (B, Cin).
        conv: weight (Cout, Cin, 1, 1) and a bias.

    Returns:
        (B, Cout, H, W).
    """
    height, width = x.shape[2:]
    if height * width <= conv.out_channels:
        return conv(x * scale[:, :, None, None])
    weights = conv.weight.flatten(1) * scale[:, None, :]  # B, Cout, Cin
    tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
    assert conv.bias is not None
    mixed = torch.baddbmm(conv.bias, tokens, weights.transpose(1, 2))
    return mixed.unflatten(1, (height, width)).permute(0, 3, 1, 2)
