"""Convolutions with their batch norm, and the fold of one into the other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import fuse_conv_bn_eval


@torch.fx.wrap
def batch_norm(  # noqa: PLR0913, PLR0917 - those of F.batch_norm and its module
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """What ``nn.BatchNorm2d`` computes, on running statistics where a batch has a single value a channel.

    Such a batch has no variance. It counts for no statistics either.
    """
    if training and x.numel() == x.size(1) and running_mean is not None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    factor = 0.0 if momentum is None else momentum
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, running_mean is None, factor, eps)
    if not track_running_stats:
        return F.batch_norm(x, None, None, weight, bias, True, factor, eps)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches
            factor = 1.0 / float(num_batches_tracked)
    return F.batch_norm(x, running_mean, running_var, weight, bias, True, factor, eps)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that also trains on one 32x32 image, whose last maps are 1x1."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.num_batches_tracked, self.training,
            self.track_running_stats, self.momentum, self.eps,
        )  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches a module's calls, so that it has to be called."""
    return (
        bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        or _has_any_global_hook()
    )


def go_by_batch(norms: Sequence[nn.Module]) -> bool:
    """Whether batch norms have scale and shift, normalise by their batch alike, and move their statistics alike.

    Those of other classes, which know of statistics elsewhere, do not count.
    """
    first = norms[0]
    return isinstance(first, BatchNorm2d) and all(
        type(norm) is BatchNorm2d
        and norm.training
        and norm.weight is not None
        and norm.running_mean is not None
        and norm.momentum is not None
        and (norm.momentum, norm.eps) == (first.momentum, first.eps)
        for norm in norms
    )


@torch.no_grad()
def move_statistics(norms: Sequence[BatchNorm2d], means: Tensor, variances: Tensor, count: int) -> None:
    """Move the running statistics of norms that :func:`go_by_batch`, as they do themselves.

    Args:
        norms: N of them.
        means, variances: (N, C), of ``count`` values a channel; variances without correction.
        count: of the values, more than one.
    """
    share: Any = norms[0].momentum
    for name, numbers in (("running_mean", means), ("running_var", variances * (count / (count - 1)))):
        running = [getattr(norm, name) for norm in norms]
        torch._foreach_mul_(running, 1 - share)
        torch._foreach_add_(running, numbers.unbind(), alpha=share)
    torch._foreach_add_([getattr(norm, "num_batches_tracked") for norm in norms], 1)  # noqa: B009 - for mypy


class ConvNorm(nn.Sequential):
    """A convolution (any module with a ``Conv2d`` as its folded form) and the batch norm after it.

    (B, Cin, H, W) -> (B, Cout, H', W').
    """

    def __init__(self, conv: nn.Module, out_channels: int):
        super().__init__(OrderedDict(conv=conv, norm=BatchNorm2d(out_channels)))

    def fold(self) -> nn.Conv2d:
        """One convolution with bias that equals this module in evaluation."""
        return fold_norm_into_conv(self.conv, self.norm)  # type: ignore[arg-type]


class NormConv(nn.Sequential):
    """A batch norm and the 1x1 convolution after it. (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            OrderedDict(norm=BatchNorm2d(in_channels), conv=nn.Conv2d(in_channels, out_channels, kernel_size=1))
        )

    def fold(self) -> nn.Conv2d:
        """One convolution with bias that equals this module in evaluation."""
        fold_norm_into_next(self.norm, self.conv)  # type: ignore[arg-type]
        return self.conv  # type: ignore[return-value]


def fold_norm_into_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that does the work of the batch norm after it too.

    Raises:
        ValueError: where the norm goes by its batch in evaluation too.
    """
    if norm.running_mean is None:
        raise ValueError("only a batch norm with running statistics folds into a convolution; this one has none")
    return fuse_conv_bn_eval(conv, norm)


@torch.no_grad()
def fold_norm_into_next(norm: nn.BatchNorm2d, layer: nn.Conv2d | nn.Linear) -> None:
    """Make ``layer``, a 1x1 convolution or linear layer, do the work of the batch norm before it too.

    Raises:
        ValueError: where the norm goes by its batch in evaluation too, or the layer has no bias.
    """
    if norm.running_mean is None or norm.running_var is None or layer.bias is None:
        raise ValueError("only a batch norm with running statistics folds into a layer, and the layer needs a bias")
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    layer.bias += layer.weight.flatten(1) @ shift
    layer.weight *= scale.view(1, -1, *[1] * (layer.weight.dim() - 2))
