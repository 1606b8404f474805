"""The blocks of the fused network on CPU: one operation each where its kernels run, elsewhere the folded block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from overlock.layers.packed import Packed
from overlock.ops import blocks as ops


class FusedBasicBlock(Packed):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: Any):
        ffn = block.ffn
        layers = ops.BasicLayers(
            local=block.local, norm=block.norm, large=block.large_kernel, reduce=block.se.fc1, excite=block.se.fc2,
            expand=ffn.expand, hidden=ffn.local.conv, response=ffn.norm, project=ffn.project, residual=block.residual,
        )  # fmt: skip
        super().__init__(block, ops.parameters_of(layers))
        self.eps = block.norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if ops.kernels_apply([x, self.packed]):
            return ops.basic_block(x, self.packed, self.layout, self.eps)
        return self.plain(x)


class _FusedMixer(Packed):
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
        rpbs = [rpb for rpb in (mix.rpb_small, mix.rpb_large) if rpb is not None]
        super().__init__(block, [*ops.parameters_of(layers), *rpbs])
        self.kernel_size, self.scale, self.region_grid = mix.kernel_size, mix.scale, mix.region_grid
        self.eps = block.norm1.eps

    def _mixed(self, x: Tensor, context: Tensor | None = None, prior: Tensor | None = None) -> Tensor | None:
        """The operation's result, where it applies; not to maps that are to be enlarged."""
        inputs = [y for y in (x, context, prior) if y is not None]
        if min(x.shape[2:]) < self.kernel_size or not ops.kernels_apply([*inputs, self.packed]):
            return None
        return ops.mixer_block(
            x, context, prior, self.packed, self.layout, self.scale, self.region_grid, self.eps
        )  # fmt: skip


class FusedContMixBlock(_FusedMixer):
    """(B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: Any):
        super().__init__(block, alpha=None, beta=None, fusion=None, fusion_project=None, fusion_norm=None)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self._mixed(x)
        return self.plain(x) if mixed is None else mixed


class FusedDynamicBlock(_FusedMixer):
    """Features (B, C, H, W), context and prior (B, Cc, H, W) to features and context of the same shapes."""

    def __init__(self, block: Any):
        fusion, update = block.mixer.fusion, block.context_update
        super().__init__(
            block, alpha=getattr(update, "alpha", None), beta=getattr(update, "beta", None), fusion=fusion.local,
            fusion_project=fusion.project, fusion_norm=fusion.norm,
        )  # fmt: skip
        self.split = block.split

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self._mixed(x, context, prior)
        if mixed is None:
            return self.plain(x, context, prior)
        features, context = mixed.split(self.split, dim=1)
        return features, context
