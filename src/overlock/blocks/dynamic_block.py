"""The Dynamic Block of Focus-Net (Figure 3), and its plug-in form without a context."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from overlock.layers import GDSA, AffineScale, Aggregator, ContMix, ConvFFN, LocalConv
from overlock.layers.arguments import make_drop_path
from overlock.layers.conv_ffn import ScaledResidual, fold_residual, make_residual


class ContextUpdate(nn.Module):
    """The context flow P(i+1) = alpha P'(i) + beta P(0) (equation 1).

    The text's alpha and beta are scalars; the released weights have one, and a bias, for each channel.
    (B, Cc, H, W) twice -> (B, Cc, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = ScaledResidual(channels)
        self.beta = AffineScale(channels)

    def forward(self, context: Tensor, prior: Tensor) -> Tensor:
        return self.alpha(context, self.beta(prior))

    def fold(self) -> ContextUpdate:
        self.alpha = fold_residual(self.alpha, self.beta)  # type: ignore[assignment]
        return self


class MixerBlock(nn.Module):
    """What both blocks below share: local convolution and token mixer, local convolution and ConvFFN, with residuals.

        x = x + conv3x3(x);   x = scale(x) + mixer(LN(x))
        x = x + conv3x3(x);   x = scale(x) + ConvFFN(LN(x))

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        hidden_channels: of the ConvFFN.
        mixer: token mixer, (B, C, H, W) -> (B, C, H, W).
        scaled: scale the identities.
        drop_path: stochastic depth rate of both branches.
    """

    def __init__(
        self, channels: int, *, hidden_channels: int, mixer: nn.Module, scaled: bool = True, drop_path: float = 0.0
    ):
        super().__init__()
        self.local1 = LocalConv(channels)
        self.norm1 = LayerNorm2d(channels, eps=1e-6)
        self.mixer = mixer
        self.residual1 = make_residual(channels, scaled)
        self.local2 = LocalConv(channels)
        self.norm2 = LayerNorm2d(channels, eps=1e-6)
        self.ffn = ConvFFN(channels, hidden_channels)
        self.residual2 = make_residual(channels, scaled)
        self.drop_path = make_drop_path(drop_path)

    def mix(self, x: Tensor) -> Tensor:
        x = self.local1(x)
        x = self.residual1(x, self.drop_path(self.mixer(self.norm1(x))))
        x = self.local2(x)
        return self.residual2(x, self.drop_path(self.ffn(self.norm2(x))))

    def fold(self) -> MixerBlock:
        self.residual2 = fold_residual(self.residual2, self.ffn.project)  # type: ignore[assignment]
        last = _last_conv(self.mixer)
        if last is not None:
            self.residual1 = fold_residual(self.residual1, last)  # type: ignore[assignment]
        return self


def _last_conv(mixer: nn.Module) -> nn.Conv2d | None:
    """The convolution that ends a folded mixer, where there is one to take over the residual's bias."""
    aggregator = getattr(mixer, "aggregator", mixer)
    conv = getattr(aggregator, "proj", None)
    return conv if isinstance(conv, nn.Conv2d) else None


class DynamicBlock(MixerBlock):
    """A :class:`MixerBlock` over features and context side by side, with GDSA as the mixer.

    Args:
        channels: C of the features.
        context_channels: Cc of the context.
        groups: of ContMix, per kernel size.
        kernel_size: K of ContMix's large kernel.
        ffn_ratio: hidden width of the ConvFFN over C (not over C + Cc).
        first: the first block of Focus-Net, whose context is the prior itself.
        drop_path: stochastic depth rate.
        deploy: build the Dilated RepConv merged.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        *,
        groups: int,
        kernel_size: int,
        ffn_ratio: int = 3,
        first: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ):
        super().__init__(
            channels + context_channels,
            hidden_channels=ffn_ratio * channels,
            mixer=GDSA(channels, context_channels, groups=groups, kernel_size=kernel_size, deploy=deploy),
            drop_path=drop_path,
        )
        self.split = [channels, context_channels]
        self.context_update = None if first else ContextUpdate(context_channels)

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """One closer look.

        Args:
            x: features (B, C, H, W).
            context: running context P'(i) (B, Cc, H, W).
            prior: context prior P(0) (B, Cc, H, W).

        Returns:
            Features and context, of the same shapes.
        """
        if self.context_update is not None:
            context = self.context_update(context, prior)
        y = self.mix(torch.cat([x, context], dim=1))
        x, context = y.split(self.split, dim=1)
        return x, context


class SelfMixer(nn.Module):
    """The aggregator on features that ask about themselves: query, context and gate all come from one map."""

    def __init__(self, channels: int, *, groups: int, kernel_size: int, small_kernel: int | None = 5,
                 region_grid: int = 7, deploy: bool = False):  # fmt: skip
        super().__init__()
        mixer = ContMix(
            channels,
            groups=groups,
            kernel_size=kernel_size,
            small_kernel=small_kernel,
            region_grid=region_grid,
            value_proj=True,
        )
        self.aggregator = Aggregator(channels, channels, kernel_size=kernel_size, mixer=mixer, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregator(x, x, x)


class ContMixBlock(MixerBlock):
    """ContMix as a whole residual block for any network: the authors' stand-alone plug-in.

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        groups: per kernel size (the authors' ``num_heads`` times two).
        kernel_size: K of the large kernel of :class:`overlock.ContMix`.
        small_kernel: K of the small kernel, or None for the large one alone.
        region_grid: S: the context is pooled to S x S regions.
        ffn_ratio: hidden width of the ConvFFN over C.
        scaled: scale the identities ("residual scale").
        drop_path: stochastic depth rate.
        deploy: build the Dilated RepConv merged.
    """

    def __init__(  # noqa: PLR0913 - public keywords
        self,
        channels: int,
        *,
        groups: int = 4,
        kernel_size: int = 7,
        small_kernel: int | None = 5,
        region_grid: int = 7,
        ffn_ratio: int = 4,
        scaled: bool = False,
        drop_path: float = 0.0,
        deploy: bool = False,
    ):
        mixer = SelfMixer(
            channels, groups=groups, kernel_size=kernel_size, small_kernel=small_kernel, region_grid=region_grid,
            deploy=deploy,
        )  # fmt: skip
        super().__init__(
            channels, hidden_channels=ffn_ratio * channels, mixer=mixer, scaled=scaled, drop_path=drop_path
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)
