"""OverLoCK as timm models: ``timm.create_model("overlock_t", ...)`` after ``import overlock``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from overlock.network import VARIANTS, OverLoCK, Variant
from overlock.weights import RELEASE, translate

__all__: list[str] = []


def _cfg(name: str, url: str = "") -> dict[str, Any]:
    return dict(
        url=url,
        num_classes=1000,
        input_size=(3, 224, 224),
        min_input_size=(3, 32, 32),
        pool_size=(7, 7),
        crop_pct=VARIANTS[name].crop_pct,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="base_net.stages.0.embed.0.conv",
        classifier="head.fc",
        license="apache-2.0",
        paper_ids="arXiv:2502.20087",
        paper_name="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        origin_url="https://github.com/LMMMEng/OverLoCK",
    )


MERGED = "in1k_reparam"
"""Tag of the authors' files whose Dilated RepConvs are merged."""
_FILES = {"in1k": "in1k_224", MERGED: "in1k_224_reparam"}

# The authors publish weights of the four sizes of the paper, as trained and merged.
default_cfgs = generate_default_cfgs(
    {name: _cfg(name) for name, variant in VARIANTS.items() if not variant.paper}
    | {
        f"{name}.{tag}": _cfg(name, url=f"{RELEASE}{name}_{file}.pth")
        for name, variant in VARIANTS.items()
        if variant.paper
        for tag, file in _FILES.items()
    }
)


SHAPE = ("dims", "base_depths", "overview_depth", "focus_depths", "groups", "kernel_sizes", "head_width")
"""Fields of a variant that can be given as keywords of its model, as other families of timm take them."""


def _build(*, name: str, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> OverLoCK:
    """The network on a device and in a type from the start.

    Raises:
        ValueError: for what the network does not take, and for a shape of another length than the variant's.
    """
    variant = reshape(name, {key: kwargs.pop(key) for key in SHAPE if key in kwargs})
    with torch.device(device) if device is not None else contextlib.nullcontext():
        model = OverLoCK(variant, **kwargs)
    return model.to(dtype) if dtype is not None else model


def reshape(name: str, shape: Mapping[str, Any]) -> Variant:
    """A variant with some of its widths, depths and kernels changed.

    Raises:
        ValueError: for numbers that are not whole and above zero, or not as many as the variant has.
    """
    variant = VARIANTS[name]
    changes: dict[str, Any] = {}
    for key, value in shape.items():
        own = getattr(variant, key)
        if isinstance(own, int) != isinstance(value, int) or (not isinstance(own, int) and len(own) != len(value)):
            wanted = "one whole number" if isinstance(own, int) else f"{len(own)} whole numbers"
            raise ValueError(f"{key} must be {wanted}, as {own} of {name}, got {value!r}")
        if not all(isinstance(n, int) and n > 0 for n in ([value] if isinstance(value, int) else value)):
            raise ValueError(f"{key} must be whole and above zero, got {value!r}")
        changes[key] = value if isinstance(value, int) else tuple(value)
    return replace(variant, **changes)


class FeatureGetter(FeatureGetterNet):
    """timm's wrapper of ``features_only`` models, with the switch for gradient checkpointing of dense training."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    chosen = kwargs.get("pretrained_cfg")  # a tag, or a whole configuration, which has one
    tag = chosen.get("tag") if isinstance(chosen, Mapping) else getattr(chosen, "tag", chosen)
    if tag == MERGED:
        kwargs.setdefault("deploy", True)
    return build_model_with_cfg(
        _build,
        name,
        pretrained,
        pretrained_filter_fn=translate,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=FeatureGetter),
        name=name,
        **kwargs,
    )


@register_model
def overlock_atto(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """About 1 M parameters, for tests, edge devices and small images. No published weights."""
    return _create("overlock_atto", pretrained, **kwargs)


@register_model
def overlock_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """About 6 M parameters, for small data sets. No published weights."""
    return _create("overlock_nano", pretrained, **kwargs)


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """OverLoCK-XT, 16.4 M parameters, 82.7 % ImageNet-1K top-1 in the paper."""
    return _create("overlock_xt", pretrained, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """OverLoCK-T, 33.5 M parameters, 84.2 % ImageNet-1K top-1 in the paper."""
    return _create("overlock_t", pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """OverLoCK-S, 56.2 M parameters, 84.8 % ImageNet-1K top-1 in the paper."""
    return _create("overlock_s", pretrained, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """OverLoCK-B, 94.9 M parameters, 85.1 % ImageNet-1K top-1 in the paper."""
    return _create("overlock_b", pretrained, **kwargs)
