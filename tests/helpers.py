"""Random weights and images, the same at every run, and the measure of a difference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from overlock.layers import AffineScale, ContMix, GlobalResponseNorm
from overlock.network import OverLoCK, Variant

SCALES = (nn.BatchNorm2d, LayerNorm2d, AffineScale)


def _draw(module: nn.Module, name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """One tensor: of order one where it scales, variance-keeping where it mixes, never at its initial value."""
    normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    if name == "num_batches_tracked":
        return torch.zeros_like(like)
    if isinstance(module, GlobalResponseNorm) or name.startswith("rpb"):
        return 0.5 * normal
    if name == "running_var" or (name == "weight" and isinstance(module, SCALES)):
        return 0.5 + uniform
    return 0.1 * normal if like.dim() <= 1 else normal / math.sqrt(math.prod(like.shape[1:]))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer of a model a reproducible random value, and return the model in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
            for name, tensor in own.items():
                tensor.copy_(_draw(module, name, tensor, generator))
            if isinstance(module, ContMix):  # kernels far from flat
                module.kernels.weight.mul_(4)
    return model.eval()


TINY = Variant(
    dims=(8, 12, 16, 24), base_depths=(1, 1, 1), overview_depth=1, focus_depths=(2, 1), groups=(2, 3),
    kernel_sizes=(7, 5, 9, 7), head_width=16,
)  # fmt: skip


# Arguments of timm.create_model, for a network whose parts are each there once: a checkpoint takes time by the tensor.
FEWEST: dict[str, Any] = dict(
    dims=[8, 8, 16, 16], base_depths=[1, 1, 1], overview_depth=1, focus_depths=[1, 1], groups=[1, 1],
    kernel_sizes=[7, 7, 7, 7], head_width=16,
)  # fmt: skip


def tiny(**kwargs) -> OverLoCK:
    """The smallest network that has every part, for tools that are slow with every layer."""
    return OverLoCK(TINY, **{"num_classes": 5, **kwargs})


def meta(name: str, **kwargs) -> nn.Module:
    """A model without memory; its initialisation, slow on tensors without memory, is left out."""
    with patch("overlock.network.overlock.trunc_normal_"):
        return timm.create_model(name, device="meta", **kwargs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the deviation of what is expected."""
    return float((actual - expected).detach().abs().max() / expected.detach().std().clamp_min(1e-30))


def as_double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float64, its counters as they are."""
    return {name: x.double() if x.is_floating_point() else x for name, x in state.items()}


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run_interpreted(*arguments: str) -> None:
    """Run tests with Triton's interpreter, in a process of its own, since it is chosen when Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
