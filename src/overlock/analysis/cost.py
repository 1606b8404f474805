"""The columns of the paper's tables: parameters and multiply-adds, of each sub-network.

The paper's convention: the merged network without its auxiliary head, each term of a convolution, linear layer or
matrix product once. Norms, scales, activations, softmax, biases and interpolation are free. The application of the
dynamic kernels to the values is left out as well, since a count over modules does not see it; it stands beside as
``mixing``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from overlock.network import VARIANTS, OverLoCK

PARTS = ("base_net", "overview_net", "focus_net", "head")
Shape = Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a part or of the whole, for one image."""

    name: str
    """Of the sub-network, or 'total'."""
    params: int
    """Parameters."""
    macs: int
    """Multiply-adds as the paper counts them."""
    mixing: int
    """Multiply-adds of applying the dynamic kernels, not among ``macs``."""


def count_cost(model: str, *, image_size: tuple[int, int] = (224, 224), num_classes: int = 1000) -> list[Cost]:
    """Count on shapes alone, without memory or time for the values.

    Args:
        model: a name in ``overlock.VARIANTS``.
        image_size: height and width.
        num_classes: outputs of the classifier.

    Returns:
        A cost for each sub-network, and the total last.

    Raises:
        ValueError: for an unknown model or images that are too small.
    """
    if model not in VARIANTS:
        raise ValueError(f"unknown model {model!r}; the models are {', '.join(VARIANTS)}")
    with torch.device("meta"):
        network = OverLoCK(VARIANTS[model], num_classes=num_classes, deploy=True).eval()
        images = torch.empty(1, 3, *image_size)
    macs = _count(network, images, count_generation)
    mixing = _count(network, images, count_applications, only=torch.ops.overlock.contmix)
    costs = [
        Cost(
            name=name,
            params=sum(p.numel() for p in network.get_submodule(name).parameters()),
            macs=macs[name],
            mixing=mixing[name],
        )
        for name in PARTS
    ]
    total = {name: sum(getattr(cost, name) for cost in costs) for name in ("params", "macs", "mixing")}
    return [*costs, Cost(name="total", **total)]


def count_network(network: nn.Module, *, image_size: tuple[int, int] = (224, 224), in_chans: int = 3) -> Cost:
    """The cost of any network of images, as it stands: one built with ``deploy`` is merged.

    Args:
        network: in evaluation mode, on the device 'meta', where nothing is computed.
        image_size: height and width.
        in_chans: channels of the images.
    """
    return count_call("total", [network], network, torch.empty(1, in_chans, *image_size, device="meta"))


def count_call(name: str, modules: Sequence[nn.Module], call: Callable[..., Any], inputs: Any) -> Cost:
    """The cost of a call, and of the modules that it runs."""
    contmix = torch.ops.overlock.contmix

    def count(formula: Callable[..., int]) -> dict[Any, int]:
        counter = FlopCounterMode(display=False, custom_mapping={contmix: formula})
        with counter, torch.inference_mode():
            call(inputs)
        return counter.get_flop_counts().get("Global", {})

    flops = count(count_generation)
    mixing = count(count_applications)[contmix] if contmix in flops else 0
    return Cost(
        name=name,
        params=sum(p.numel() for module in modules for p in module.parameters()),
        macs=sum(flops.values()) // 2,
        mixing=mixing // 2,
    )


def _count(
    network: OverLoCK, images: torch.Tensor, formula: Callable[..., int], *, only: object = None
) -> dict[str, int]:
    """Multiply-adds of each part, of all operations or of one."""
    counter = FlopCounterMode(display=False, depth=2, custom_mapping={torch.ops.overlock.contmix: formula})
    with counter, torch.inference_mode():
        network(images)
    counts = counter.get_flop_counts()
    return {
        name: sum(
            flops for op, flops in counts.get(f"OverLoCK.{name}", {}).items() if only is None or op is only
        ) // 2
        for name in PARTS
    }  # fmt: skip


def count_generation(
    query: Shape,
    key: Shape,
    value: Shape,
    _weight: Shape,
    _bias: object,
    _rpb: object,
    kernel_size: int,
    min_side: int = 0,
    **_: object,
) -> int:
    """Flops of the affinities and of the kernels made from them.

    The affinities, of D multiply-adds each, are computed once for the 2 D value channels of a group. Where half of
    these take a kernel of another size, it is by another call: each pays for its share, C / (2 D).
    """
    batch, groups = query[:2]
    height, width = _mixed_map(query[3], query[4], min_side)
    pairs = batch * groups * height * width * key[-1]
    return 2 * pairs * _taps(kernel_size, height, width) + pairs * value[2]


def count_applications(
    _query: Shape,
    _key: Shape,
    value: Shape,
    _weight: Shape,
    _bias: object,
    _rpb: object,
    kernel_size: int,
    min_side: int = 0,
    **_: object,
) -> int:
    """Flops of the weighted sums over the windows."""
    height, width = _mixed_map(value[3], value[4], min_side)
    return 2 * math.prod(value[:3]) * height * width * _taps(kernel_size, height, width)


def _mixed_map(height: int, width: int, min_side: int) -> tuple[int, int]:
    """Size of the map that is mixed: small ones are enlarged to the larger kernel, keeping the aspect."""
    short = min(height, width)
    return (height, width) if short >= min_side else (min_side * height // short, min_side * width // short)


def _taps(kernel_size: int, height: int, width: int) -> int:
    """Taps that fall into a map."""
    return min(kernel_size, height) * min(kernel_size, width)
