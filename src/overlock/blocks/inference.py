"""The blocks of the fused network on CPU: one operation each where its kernels run, elsewhere the folded block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from overlock.ops import blocks as ops


class FusedBlock(nn.Module):
    """A folded block, and its layers in the order in which the operation takes their parameters."""

    def __init__(self, block: nn.Module, layers: ops.BasicLayers | ops.MixerLayers, eps: float):
        super().__init__()
        self.block, self._layers, self.eps = block, layers, eps

    def for_cpu(self) -> FusedBlock:
        return self


class FusedBasicBlock(FusedBlock):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: Any):
        ffn = block.ffn
        layers = ops.BasicLayers(
            local=block.local, norm=block.norm, large=block.large_kernel, reduce=block.se.fc1, excite=block.se.fc2,
            expand=ffn.expand, hidden=ffn.local.conv, response=ffn.norm, project=ffn.project, residual=block.residual,
        )  # fmt: skip
        super().__init__(block, layers, block.norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        parameters = ops.parameters_of(self._layers)
        if ops.kernels_apply([x], parameters):
            return ops.basic_block(x, parameters, self.eps)
        return self.block(x)


class _FusedMixer(FusedBlock):
    def __init__(self, block: Any, alpha: Any, beta: Any, fusion: Any, fusion_project: Any, fusion_norm: Any):
        aggregator, ffn = block.mixer.aggregator, block.ffn
        mix = aggregator.mixer
        layers = ops.MixerLayers(
            alpha=alpha, beta=beta, local1=block.local1, norm1=block.norm1, fusion=fusion,
            fusion_project=fusion_project, fusion_norm=fusion_norm, query=mix.query, key=mix.key, value=mix.value,
            kernels=mix.kernels, out=mix.out, large=aggregator.large_kernel, reduce=aggregator.se.fc1,
            excite=aggregator.se.fc2, gate=aggregator.gate, project=aggregator.proj, residual1=block.residual1,
            local2=block.local2, norm2=block.norm2, expand=ffn.expand, hidden=ffn.local.conv, response=ffn.norm,
            ffn_project=ffn.project, residual2=block.residual2,
        )  # fmt: skip
        super().__init__(block, layers, block.norm1.eps)
        self._mix = mix

    def _mixed(self, x: Tensor, context: Tensor | None = None, prior: Tensor | None = None) -> Tensor | None:
        """The operation's result, where it applies; not to maps that are to be enlarged."""
        mix, parameters = self._mix, ops.parameters_of(self._layers)
        inputs = [y for y in (x, context, prior) if y is not None]
        if min(x.shape[2:]) < mix.kernel_size or not ops.kernels_apply(inputs, parameters):
            return None
        rpbs = [rpb for rpb in (mix.rpb_small, mix.rpb_large) if rpb is not None]
        return ops.mixer_block(x, context, prior, parameters, rpbs, mix.scale, mix.region_grid, self.eps)


class FusedContMixBlock(_FusedMixer):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: Any):
        super().__init__(block, alpha=None, beta=None, fusion=None, fusion_project=None, fusion_norm=None)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self._mixed(x)
        return self.block(x) if mixed is None else mixed


class FusedDynamicBlock(_FusedMixer):
    """Features (B, C, H, W), context and prior (B, Cc, H, W) to features and context of the same shapes."""

    def __init__(self, block: Any):
        fusion, update = block.mixer.fusion, block.context_update
        super().__init__(
            block, alpha=getattr(update, "alpha", None), beta=getattr(update, "beta", None), fusion=fusion.local,
            fusion_project=fusion.project, fusion_norm=fusion.norm,
        )  # fmt: skip

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self._mixed(x, context, prior)
        if mixed is None:
            return self.block(x, context, prior)
        features, context = mixed.split(self.block.split, dim=1)
        return features, context
