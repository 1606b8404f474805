"""The rows as timm models: ``timm.create_model("overlock_roadmap_plain", size="small")`` after ``import overlock``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from overlock.ablation.mixers import MIXERS, Maker, make_row
from overlock.ablation.roadmap import ROADMAP
from overlock.tasks.classification import FeatureGetter

Build = Callable[..., nn.Module]
default_cfgs: dict[str, Any] = {}
"""Where timm looks for the configurations of the models of this file."""


def model_name(table: str, row: str) -> str:
    """timm's name of a row.

    Args:
        table: 'roadmap' or 'mixer'.
        row: its key.
    """
    return f"overlock_{table}_{row}"


def register(name: str, build: Build, *, first_conv: str) -> None:
    """Make a network one of timm's models.

    Args:
        name: timm's.
        build: the network, of timm's keywords.
        first_conv: name of its first convolution.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            _build, name, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls=FeatureGetter),
            build=build, **kwargs,
        )  # fmt: skip

    create.__name__ = name
    default_cfgs.update(generate_default_cfgs({name: _cfg(first_conv)}))
    vars(sys.modules[__name__])[name] = create
    register_model(create)


def _build(*, build: Build, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> nn.Module:
    """The network on a device and in a type from the start."""
    with torch.device(device) if device is not None else contextlib.nullcontext():
        network = build(**kwargs)
    return network.to(dtype) if dtype is not None else network


def _cfg(first_conv: str) -> dict[str, Any]:
    return dict(
        url="", num_classes=1000, input_size=(3, 224, 224), min_input_size=(3, 32, 32), pool_size=(7, 7),
        crop_pct=0.925, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        first_conv=first_conv, classifier="head.fc", license="apache-2.0", paper_ids="arXiv:2502.20087",
    )  # fmt: skip


def add_mixer(name: str, make: Maker, *, title: str | None = None) -> None:
    """Put a mixer of one's own into the frame of Table 7, as a row of it and a model of timm's.

    Args:
        name: of the row; the model is ``overlock_mixer_NAME``.
        make: gives a mixer, (B, C, H, W) -> (B, C, H, W), for C and the number of its block in the stage.
        title: in tables; the name unless given.

    Raises:
        ValueError: for a name that is taken, or is none.

    Example:
        >>> from torch import nn
        >>> add_mixer("pooling", lambda channels, _: nn.AvgPool2d(3, stride=1, padding=1))
        >>> timm.create_model("overlock_mixer_pooling", size="small")(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    if not name.isidentifier():
        raise ValueError(f"name must be letters, digits and underscores, got {name!r}")
    if name in MIXERS:
        raise ValueError(f"there is a mixer {name!r} already; choose another name")
    MIXERS[name] = make_row(make, title or name)
    _register_mixer(name)


def _register_mixer(name: str) -> None:
    register(model_name("mixer", name), MIXERS[name].build, first_conv="stages.0.embed.0.conv")


for _name in MIXERS:
    _register_mixer(_name)
for _name, _row in ROADMAP.items():
    register(model_name("roadmap", _name), _row.build, first_conv="base_net.stages.0.embed.0.conv")

TRAINED_WITH_AUX_HEAD = frozenset(model_name("roadmap", name) for name, row in ROADMAP.items() if row.has_aux_head)
"""Models of the rows that the paper trains with the auxiliary loss."""
