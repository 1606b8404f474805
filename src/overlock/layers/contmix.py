"""ContMix: the context-mixing dynamic convolution of section 3.2 and Figure 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overlock.layers.arguments import check_count
from overlock.layers.conv_norm import ConvNorm
from overlock.ops import contmix, region_centres

torch.fx.wrap("contmix")
torch.fx.wrap("region_centres")
torch.fx.wrap("join_halves")


class ContMix(nn.Module):
    """Dynamic convolution whose kernel at every position mixes the context of the whole map (section 3.2).

    With X the query features, Z the context features, V the values, and per group g:

        Q = W_q X,   K = W_k AvgPool_SxS(Z)                          query, region centres
        A = scale * Q^T K                                           affinities, S^2 a position
        D = softmax(A W_d + bias + relative position bias)          one k x k kernel a position
        Y = sum over the window of D * V,   output = W_o Y

    Half of the value channels are mixed with a small kernel, the other half with the large one; both kernels come from
    the same affinities. Maps with a side below the kernel are enlarged for the mixing and averaged back. The released
    weights rule where the text is silent: the scale is that of twice the head width, W_d is shared by the groups.
    (Query and value are projected before a small map is enlarged, the released code does it after: the same in
    evaluation, since interpolation passes through 1x1 convolutions, and cheaper.)

    Args:
        channels: C of the values and the output; also of query and context features unless given.
        groups: G, groups per kernel size; divides C / 2 (C without a small kernel).
        kernel_size: K of the large kernel.
        small_kernel: K of the small kernel, or None for the large one alone on all channels.
        region_grid: S.
        query_channels: channels of the query features, C by default.
        context_channels: channels of the context features, C by default.
        value_proj: project the values by a 1x1 convolution and batch norm first, as in the plug-in block.

    Raises:
        ValueError: where the groups do not divide the channels or a kernel does not fit.

    Example:
        >>> mix = ContMix(64, groups=2, kernel_size=7)
        >>> mix(torch.randn(1, 64, 14, 20)).shape
        torch.Size([1, 64, 14, 20])
    """

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        kernel_size: int = 7,
        small_kernel: int | None = 5,
        region_grid: int = 7,
        query_channels: int | None = None,
        context_channels: int | None = None,
        value_proj: bool = False,
    ):
        super().__init__()
        query_channels = channels if query_channels is None else query_channels
        context_channels = channels if context_channels is None else context_channels
        for name, count in dict(
            channels=channels, groups=groups, kernel_size=kernel_size, region_grid=region_grid,
            query_channels=query_channels, context_channels=context_channels,
        ).items():  # fmt: skip
            check_count(name, count)
        if small_kernel is not None:
            check_count("small_kernel", small_kernel)
            if small_kernel >= kernel_size:
                raise ValueError(f"small_kernel must lie below kernel_size {kernel_size}, got {small_kernel}")
        half = channels // 2
        if channels % (2 * groups):
            raise ValueError(
                f"channels must be a multiple of 2 x groups = {2 * groups} (queries take half of them), got {channels}"
            )
        self.groups = groups
        self.kernel_size = kernel_size
        self.small_kernel = small_kernel
        self.small_taps = 0 if small_kernel is None else small_kernel**2
        self.region_grid = region_grid
        self.scale = (channels // groups) ** -0.5
        self.query = ConvNorm(nn.Conv2d(query_channels, half, kernel_size=1, bias=False), half)
        self.key = ConvNorm(nn.Conv2d(context_channels, half, kernel_size=1, bias=False), half)
        self.value = (
            ConvNorm(nn.Conv2d(channels, channels, kernel_size=1, bias=False), channels)
            if value_proj
            else nn.Identity()
        )
        self.kernels = nn.Linear(region_grid**2, self.small_taps + kernel_size**2)
        self.rpb_small = None if small_kernel is None else _make_rpb(groups, small_kernel)
        self.rpb_large = _make_rpb(groups, kernel_size)
        self.out = ConvNorm(nn.Conv2d(channels, channels, kernel_size=1, bias=False), channels)

    def forward(self, x: Tensor, query: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Mix ``x``.

        Args:
            x: values (B, C, H, W).
            query: features (B, Cq, H, W) that ask; ``x`` by default.
            context: features (B, Cc, H', W') that are summarised into S x S region centres; ``x`` by default.

        Returns:
            (B, C, H, W).
        """
        return self.out(self.mix(x, x if query is None else query, x if context is None else context))

    def mix(self, x: Tensor, query: Tensor, context: Tensor) -> Tensor:
        """The mixed values before the last projection, of arguments as :meth:`forward` has them."""
        value = self.value(x)
        query = self._split(self.query(query))
        key = self.key(region_centres(context, self.region_grid, self.kernel_size))
        key = key.flatten(2).unflatten(1, (self.groups, -1)) * self.scale  # B, G, D, S^2
        weight, bias, taps, large = self.kernels.weight, self.kernels.bias, self.small_taps, self.kernel_size
        if self.small_kernel is None:
            mixed = contmix(query, key, self._split(value), weight, bias, self.rpb_large, large, large)
            return mixed.flatten(1, 2)
        first, second = value.chunk(2, dim=1)  # slices would each have a whole map of zeros as their gradient
        first, second = self._split(first), self._split(second)
        first = contmix(query, key, first, weight[:taps], bias[:taps], self.rpb_small, self.small_kernel, large)
        second = contmix(query, key, second, weight[taps:], bias[taps:], self.rpb_large, large, large)
        return join_halves(first, second)

    def _split(self, value: Tensor) -> Tensor:
        """(B, C', H, W) -> (B, G, C' / G, H, W)."""
        return value.unflatten(1, (self.groups, -1))


def join_halves(first: Tensor, second: Tensor) -> Tensor:
    """Two (B, G, C, H, W) as one (B, 2GC, H, W), in their layout.

    Of one image that is channels-last ``torch.cat`` alone would make one that is not: it goes by the stride of the
    batch, which is arbitrary there.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102 - scripts only as a condition of its own
        if not torch.compiler.is_compiling() and len(first) == 1 and first.stride(2) == 1:
            by_position = [x.permute(0, 3, 4, 1, 2).flatten(3) for x in (first, second)]  # B, H, W, GC
            return torch.cat(by_position, dim=3).permute(0, 3, 1, 2)
    return torch.cat([first.flatten(1, 2), second.flatten(1, 2)], dim=1)


def _make_rpb(groups: int, kernel_size: int) -> nn.Parameter:
    """Relative position bias, one table a group."""
    return nn.Parameter(torch.zeros(groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
