"""The kernels that ContMix makes of an image, and what of them comes from the context prior (Figure 4, section 3.1).

All is taken from the network's own modules while it runs: a recorder sees each call of the operator, and a hook puts
another prior in the place of Overview-Net's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from overlock.layers import ContMix
from overlock.network import OverLoCK
from overlock.ops import contmix_kernels

Replace = Callable[[Tensor], Tensor]
"""From a prior (B, Cc, H, W) to another of the same shape."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Those of one size, of one ContMix. Where the map is shorter than the large kernel, of the enlarged map."""

    taps: Tensor
    """(B, G, H, W, Kh, Kw); those of a position sum to 1."""
    value: Tensor
    """What they were applied to, (B, G, C, H, W) of the map itself."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What one ContMix did with a batch."""

    stage: int
    """3 or 4."""
    block: int
    """From 1 on."""
    affinity: Tensor
    """Of each position to the region centres, (B, G, H, W, S, S)."""
    kernels: tuple[Kernels, ...]
    """The small and the large ones, or the large ones alone."""

    @property
    def name(self) -> str:
        """Stage and block."""
        return f"stage {self.stage}, block {self.block}"


class _Recorder(TorchDispatchMode):
    """Keeps the inputs of all calls of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.overlock.contmix.default:
            names = [argument.name for argument in func._schema.arguments]
            defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
            self.calls.append(defaults | dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def record_mixing(network: OverLoCK, call: Callable[[], Any]) -> list[Mixing]:
    """The kernels of each ContMix of the Focus-Net, in the order of the blocks.

    Args:
        network: whose modules are recorded; not fused.
        call: runs it once, by itself or within a detector or segmenter.
    """
    calls: dict[nn.Module, list[dict[str, Any]]] = {}
    recorder = _Recorder()

    def note(module: nn.Module, *_: Any) -> None:
        calls[module], recorder.calls = recorder.calls, []

    stages: dict[int, Any] = {3: network.focus_net.stage3, 4: network.focus_net.stage4}
    mixers: list[tuple[int, int, Any]] = [
        (stage, number, block.mixer.aggregator.mixer)
        for stage, blocks in stages.items()
        if blocks is not None
        for number, block in enumerate(blocks.blocks, start=1)
    ]
    hooks = [mixer.register_forward_hook(note) for *_, mixer in mixers]
    try:
        with recorder:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return [_mixing_of(stage, number, mixer, calls[mixer]) for stage, number, mixer in mixers]


def _mixing_of(stage: int, block: int, mixer: ContMix, calls: Sequence[dict[str, Any]]) -> Mixing:
    kernels = []
    for inputs in calls:
        value = inputs.pop("value")
        affinity, taps = contmix_kernels(**inputs)
        kernels.append(Kernels(taps=taps, value=value))
    grid = (mixer.region_grid, mixer.region_grid)
    return Mixing(stage=stage, block=block, affinity=affinity.unflatten(-1, grid), kernels=tuple(kernels))


@contextmanager
def replaced_prior(network: OverLoCK, replace: Replace) -> Iterator[None]:
    """Inside, the Focus-Net is given another context prior than Overview-Net's."""

    def swap(_: nn.Module, __: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        overview, prior = outputs
        return overview, replace(prior)

    hook = network.overview_net.register_forward_hook(swap)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def kept_prior(network: OverLoCK) -> Iterator[list[Tensor]]:
    """Inside, the list that it gives takes the context prior (B, Cc, H, W) of each call."""
    priors: list[Tensor] = []

    def keep(prior: Tensor) -> Tensor:
        priors.append(prior)
        return prior

    with replaced_prior(network, keep):
        yield priors


def zero_prior(prior: Tensor) -> Tensor:
    """No prior at all."""
    return torch.zeros_like(prior)


def uniform_prior(prior: Tensor) -> Tensor:
    """The same everywhere: each channel's mean over the map. What the image is stays, where things are goes."""
    return prior.mean(dim=(2, 3), keepdim=True).expand_as(prior).contiguous()


def other_prior(other: Tensor) -> Replace:
    """Another image's, resized where the images differ in size."""

    def replace(prior: Tensor) -> Tensor:
        if other.shape == prior.shape:
            return other
        return F.interpolate(other, size=prior.shape[2:], mode="bilinear", align_corners=False)

    return replace


@dataclass(frozen=True, kw_only=True)
class Change:
    """How far one ContMix's kernels and affinities differ between two calls, as means over groups and positions."""

    kernels: float
    """Total variation: the share of a kernel's weight that moved to other taps, 0 to 1; of the large kernels."""
    affinity: float
    """Norm of the difference over the norm of the first."""


def compare(first: Mixing, second: Mixing) -> Change:
    """Two calls of one ContMix with images of one size."""
    taps, others = first.kernels[-1].taps, second.kernels[-1].taps
    moved = (taps - others).abs().sum(dim=(-2, -1)) / 2
    return Change(kernels=float(moved.mean()), affinity=relative_change(first.affinity, second.affinity))


def relative_change(first: Tensor, second: Tensor) -> float:
    """Norm of the difference over the norm of the first."""
    return float((first.float() - second.float()).norm() / first.float().norm().clamp_min(1e-12))
