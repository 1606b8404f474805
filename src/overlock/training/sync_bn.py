"""Batch norm over the images of all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes on CPUs, where torch's own does not run. (B, C, H, W) -> (B, C, H, W).

    The sums pass through two differentiable all-reduces, so the gradient is that of the norm of the joint batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = (0, 2, 3)
        count = x.new_tensor([x.numel() / x.size(1)])
        first = all_reduce(torch.cat([x.sum(dims), count]))
        total = first[-1].detach()
        mean = first[:-1] / total
        centred = x - mean.view(1, -1, 1, 1)
        var = all_reduce(centred.square().sum(dims)) / total
        if self.track_running_stats:
            self._keep(mean.detach(), var.detach() * total / (total - 1).clamp_min(1))
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    @torch.no_grad()
    def _keep(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


def synchronise_norms(network: nn.Module, *, cuda: bool) -> nn.Module:
    """Replace all batch norms of a network by ones over all processes; their weights stay."""
    if cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = CpuSyncBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            new.load_state_dict(child.state_dict())
            for parameter, old in zip(new.parameters(), child.parameters(), strict=True):
                parameter.requires_grad_(old.requires_grad)
            setattr(network, name, new.train(child.training))
        else:
            synchronise_norms(child, cuda=False)
    return network
