"""Dilated RepConv: a large depthwise kernel trained with dilated small ones beside it (UniRepLKNet's block)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers.arguments import check_count
from overlock.layers.conv_norm import (
    BatchNorm2d,
    ConvNorm,
    fold_norm_into_conv,
    go_by_batch,
    has_hooks,
    move_statistics,
)
from overlock.layers.depthwise_conv import DepthwiseConv
from overlock.ops.dispatch import trains_by_kernels
from overlock.ops.repconv import dilated_repconv

# (kernel size, dilation) of the branches beside each large kernel, as the released weights have them.
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def branches_of(kernel_size: int) -> tuple[tuple[int, int], ...]:
    """Branches for a kernel size; above 19 those of 19, whose widest reaches over 17 positions."""
    if not isinstance(kernel_size, int) or kernel_size % 2 == 0 or kernel_size < 3:
        raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size!r}")
    return BRANCHES.get(kernel_size, BRANCHES[19] if kernel_size > 19 else ())


@torch.fx.wrap
def away_from_channels_last(x: Tensor) -> Tensor:
    """Contiguous images where a bfloat16 weight gradient is to be computed on CPU; others pass.

    oneDNN's bfloat16 weight gradient of a dilated depthwise convolution reads memory that it has not written, where the
    images are channels_last and the channels no multiple of 16: now and then a NaN (seen with PyTorch 2.15.0).
    """
    if not torch.jit.is_scripting():
        low = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if low and x.device.type == "cpu" and torch.is_grad_enabled():
            return x.contiguous()
    return x


class DilatedRepConv(nn.Module):
    """Depthwise K x K convolution; in training a sum of a K x K one and dilated smaller ones, each batch-normed.

        y = BN(conv_KxK(x)) + sum over the branches (k, r) of BN(conv_kxk dilated by r (x))

    All terms are linear in evaluation, and a k x k kernel dilated by r is a sparse one of side r (k - 1) + 1 <= K, so
    :meth:`reparameterize` merges them into one K x K kernel with bias. (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: odd K, 3 or more.
        deploy: build the merged form.

    Raises:
        ValueError: for an even or too small kernel.
    """

    def __init__(self, channels: int, kernel_size: int, *, deploy: bool = False):
        super().__init__()
        check_count("channels", channels)
        branches = branches_of(kernel_size)
        self.large = DepthwiseConv(channels, kernel_size, bias=deploy)
        self.norm = nn.Identity() if deploy else BatchNorm2d(channels)
        self.branches = nn.ModuleDict()
        if not deploy:
            for k, r in branches:
                self.branches[f"k{k}_r{r}"] = ConvNorm(DepthwiseConv(channels, k, dilation=r, bias=False), channels)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.branches) > 0:
            if not torch.jit.is_scripting():  # noqa: SIM102 - scripts only as a condition of its own
                if self._trains_at_once(x):
                    return self._train(x)
            x = away_from_channels_last(x)
        y = self.norm(self.large(x))
        for branch in self.branches.values():
            y = y + branch(x)
        return y

    def _parts(self) -> list[Any]:
        """Convolutions and their norms."""
        return [(self.large, self.norm), *self.branches.values()]

    def _trains_at_once(self, x: Tensor) -> bool:
        """Whether the operator for all branches computes what the modules would: they are as they were built."""
        if type(x) is not Tensor or x.numel() == x.size(1):
            return False
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return False
        branches = list(self.branches.values())
        if any(type(branch) is not ConvNorm for branch in branches):
            return False
        convs, norms = zip(*self._parts(), strict=True)
        return (
            all(type(conv) is DepthwiseConv and conv.bias is None for conv in convs)
            and go_by_batch(norms)
            and not any(map(has_hooks, (*convs, *norms, *branches)))
            and trains_by_kernels(x, *(conv.weight for conv in convs))
        )

    def _train(self, x: Tensor) -> Tensor:
        convs, norms = zip(*self._parts(), strict=True)
        y, means, variances = dilated_repconv(
            x, [conv.weight for conv in convs], [norm.weight for norm in norms], [norm.bias for norm in norms],
            [conv.dilation[0] for conv in convs], norms[0].eps,
        )  # fmt: skip
        move_statistics(norms, means, variances, x.numel() // x.size(1))
        return y

    @property
    @torch.jit.unused
    def merged(self) -> bool:
        return isinstance(self.norm, nn.Identity)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge in place into one convolution with bias (timm's hook for ``reparameterize_model``).

        Raises:
            ValueError: for batch norms without running statistics; nothing is merged then.
        """
        if self.merged:
            return
        training = self.training
        self.eval()  # merging is by running statistics, whatever the mode
        try:
            merged: Any = fold_norm_into_conv(self.large, self.norm)  # type: ignore[arg-type]
            for branch in self.branches.values():
                conv: Any = branch.fold() if isinstance(branch, ConvNorm) else branch
                merged.weight += _dilate(conv.weight, conv.dilation[0], merged.kernel_size[0])
                merged.bias += conv.bias
            self.large, self.norm = merged.requires_grad_(self.large.weight.requires_grad), nn.Identity()
            self.branches = nn.ModuleDict()
        finally:
            self.train(training)

    def fold(self) -> nn.Conv2d:
        """The merged convolution itself, as fast on CUDA."""
        self.reparameterize()
        return self.large


def _dilate(weight: Tensor, dilation: int, kernel_size: int) -> Tensor:
    """A dilated kernel (C, 1, k, k) as a dense one (C, 1, K, K), zeros between its taps, centred."""
    k = weight.shape[-1]
    reach = dilation * (k - 1) + 1
    dense = weight.new_zeros(*weight.shape[:2], reach, reach)
    dense[:, :, ::dilation, ::dilation] = weight
    margin = (kernel_size - reach) // 2
    return F.pad(dense, [margin] * 4)
