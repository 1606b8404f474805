"""Four feature maps of any backbone that timm knows, for the heads of detection and segmentation."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
from torch import nn

from overlock.network import VARIANTS, OverLoCK
from overlock.tasks.pyramid import Pyramid

STRIDES = (4, 8, 16, 32)


class Features(NamedTuple):
    """A backbone without its classifier."""

    module: nn.Module
    """Images (B, 3, H, W) to a list of features (B, C, H / stride, W / stride), one for each of STRIDES."""
    channels: tuple[int, ...]
    """C of each."""
    strides: tuple[int, ...] = STRIDES
    """Of each; others than STRIDES only where a stem_stride or an output_stride asks for them."""


def find_backbone(network: nn.Module) -> nn.Module:
    """What gives the features: a classifier itself, or what a detector or segmenter stands on."""
    backbone = getattr(network, "backbone", None)
    if backbone is None or isinstance(network, OverLoCK):
        return network
    return getattr(backbone, "body", backbone)


def make_features(
    backbone: str, *, pretrained: bool = False, overview: bool = False, drop_path: float | None = None, **options: Any
) -> Features:
    """Build a backbone for dense tasks.

    Args:
        backbone: a name that timm knows; OverLoCK's are built as :class:`overlock.Pyramid`, others with timm's
            ``features_only``.
        pretrained: load the weights that timm has for it.
        overview: of :class:`overlock.Pyramid`; nothing to other backbones.
        drop_path: rate of stochastic depth, the backbone's own where it is None.
        options: further arguments of the backbone.

    Raises:
        ValueError: for a name that timm does not know, or a backbone without features at strides 4, 8, 16 and 32.
    """
    if not timm.is_model(backbone):
        near = timm.list_models(f"{backbone.split('_', maxsplit=1)[0]}*")[:8]
        raise ValueError(f"unknown backbone {backbone!r}" + (f"; there are {', '.join(near)}" if near else ""))
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    if backbone.partition(".")[0] in VARIANTS:
        pyramid = Pyramid(timm.create_model(backbone, pretrained=pretrained, **options), overview=overview)
        info = pyramid.feature_info
        return Features(pyramid, *(tuple(int(level[key]) for level in info) for key in ("num_chs", "reduction")))
    return _of_timm(backbone, pretrained=pretrained, **options)


def _of_timm(backbone: str, **options: Any) -> Features:
    reductions: list[int] = []
    try:
        module = timm.create_model(backbone, features_only=True, **options)
        reductions = module.feature_info.reduction()
        places = [reductions.index(stride) for stride in STRIDES]
        if len(reductions) > len(STRIDES):
            module = timm.create_model(backbone, features_only=True, out_indices=places, **options)
    except (RuntimeError, AttributeError, ValueError) as error:
        found = f"it has {', '.join(map(str, reductions))}" if reductions else error
        raise ValueError(f"{backbone} gives no features at strides 4, 8, 16 and 32: {found}") from None
    return Features(module, tuple(module.feature_info.channels()))
