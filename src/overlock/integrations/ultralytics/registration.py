"""What ultralytics learns of the rows: their names, how their arguments are filled in, what they cost, how they fuse.

ultralytics has no table that others may add to: ``parse_model`` makes its own at each call, and finds all names among
those of its module. So that is where they are put.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import C2f, Conv
from ultralytics.utils import torch_utils

from overlock import blocks
from overlock.analysis.cost import count_call
from overlock.fused.fuse import fuse
from overlock.integrations.ultralytics.rows import (
    C2fContMix,
    ContMixBlock,
    DynamicBlocks,
    FeatureLevel,
    OverLoCKBackbone,
)
from overlock.layers import DilatedRepConv
from overlock.tasks.pyramid import Pyramid

REPEATED = frozenset({C2fContMix, DynamicBlocks})
"""Rows that make their blocks themselves, from the number of repeats."""
ROWS = REPEATED | {ContMixBlock, FeatureLevel, OverLoCKBackbone}
FUSED = (blocks.ContMixBlock, blocks.DynamicBlock, Pyramid)
"""What the rows are made of, as far as :func:`overlock.fuse` knows it."""


def register() -> None:
    """Let YOLO files name the rows of this package, and ultralytics count and fuse them. A second call does nothing."""
    for row in ROWS:
        setattr(tasks, row.__name__, row)
    tasks.frozenset = _make_table
    if not hasattr(torch_utils.get_flops, "__wrapped__"):
        torch_utils.get_flops = _with_contmix(torch_utils.get_flops)
        tasks.BaseModel.fuse = _with_parts(tasks.BaseModel.fuse)


def _make_table(modules: Iterable[Any] = ()) -> frozenset[Any]:
    """``frozenset`` where ``parse_model`` calls it: the tables of rows with channels, and of those with repeats, get
    ours too."""
    table = frozenset(modules)
    if Conv in table:
        return table | ROWS
    return table | REPEATED if C2f in table else table


def _with_contmix(get_flops: Callable[..., float]) -> Callable[..., float]:
    @wraps(get_flops)
    def count(model: nn.Module, imgsz: Any = 640) -> float:
        """GFLOPs of any model; of one with our rows, with those of ContMix."""
        network = torch_utils.unwrap_model(model)
        return count_gflops(network, imgsz) if _has_rows(network) else get_flops(model, imgsz)

    return count


def count_gflops(model: nn.Module, image_size: int | Sequence[int] = 640) -> float:
    """Twice the multiply-adds in G of one image: of convolutions, products, and all of ContMix.

    ultralytics' own counter sees modules only. So it misses the affinities, kernels and sums of ContMix, and counts the
    branches of Dilated RepConvs, which are merged for inference. It also extrapolates from images of 32 pixels, on
    which ContMix works otherwise. Counted here on shapes alone, without memory or time for the values.

    Args:
        model: of ultralytics.
        image_size: side, or height and width.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    network: Any = copy.deepcopy(model).eval().to("meta")
    for module in network.modules():
        if isinstance(module, DilatedRepConv):
            module.reparameterize()
    network.model[-1].training = True  # the head then ends with its convolutions, and decodes no boxes
    images = torch.empty(1, network.yaml.get("channels", 3), height, width, device="meta")
    cost = count_call("total", [network], network, images)
    return 2 * (cost.macs + cost.mixing) / 1e9


def _has_rows(model: nn.Module) -> bool:
    return any(type(module) in ROWS for module in model.modules())


def _with_parts(fuse_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @wraps(fuse_model)
    def fuse_all(self: Any, *arguments: Any, **options: Any) -> nn.Module:
        """Fuse in place, as ultralytics does, and the parts of this package too."""
        if not self.is_fused():
            _fuse_parts(self.model)
        return fuse_model(self, *arguments, **options)

    return fuse_all


def _fuse_parts(module: nn.Module) -> None:
    for name, part in module.named_children():
        if type(part) in FUSED:
            setattr(module, name, fuse(part))
        else:
            _fuse_parts(part)
