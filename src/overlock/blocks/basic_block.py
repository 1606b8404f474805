"""The Basic Block of Base-Net and Overview-Net (Figure 3)."""

from __future__ import annotations

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from overlock.layers import ConvFFN, ConvNorm, DilatedRepConv, LocalConv
from overlock.layers.arguments import make_drop_path
from overlock.layers.conv_ffn import fold_residual, make_residual
from overlock.layers.gdsa import make_squeeze_excite


class BasicBlock(nn.Module):
    """Local convolution, then one residual branch: LayerNorm, Dilated RepConv, squeeze-excite, ConvFFN.

        x = x + conv3x3(x)
        x = scale(x) + ConvFFN(SE(BN(DilatedRepConv(LN(x)))))

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: K of the Dilated RepConv.
        ffn_ratio: hidden width of the ConvFFN over C.
        scaled: scale the identity (the released weights do from stage 3 on).
        drop_path: stochastic depth rate of the branch.
        deploy: build the Dilated RepConv merged.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int,
        ffn_ratio: int = 4,
        scaled: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ):
        super().__init__()
        self.local = LocalConv(channels)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.large_kernel = ConvNorm(DilatedRepConv(channels, kernel_size, deploy=deploy), channels)
        self.se = make_squeeze_excite(channels)
        self.ffn = ConvFFN(channels, ffn_ratio * channels)
        self.drop_path = make_drop_path(drop_path)
        self.residual = make_residual(channels, scaled)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x)
        branch = self.norm(x)
        branch = self.large_kernel(branch)
        branch = self.se(branch)
        branch = self.ffn(branch)
        return self.residual(x, self.drop_path(branch))

    def fold(self) -> BasicBlock:
        self.residual = fold_residual(self.residual, self.ffn.project)  # type: ignore[assignment]
        return self
