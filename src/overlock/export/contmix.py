"""ContMix in few, large operations that every runtime has: the form of it that is exported.

The logits of all tokens are one matrix product, with a key for each tap (kernels/torch/contmix.py says why). Where a
map is hardly larger than the kernel, tokens share few windows: a product for each of them. Elsewhere all tokens of a
row share the window's rows, and their kernels are laid as a band in a (columns x window) matrix: a product for each
row. Positions are computed from the size of the map, so that one graph serves maps of any size.

Letters as in kernels/torch/reference.py, and c the value channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.kernels.torch.reference import averages, enlarged, window_rows, window_starts
from overlock.layers import ContMix

Size = tuple[int, int]


class Places:
    """What depends on the sizes of map and kernel alone: computed once in a graph, for all blocks.

    Computed before the graph is traced, for sizes that are fixed, it is the graph's constants.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[Tensor, ...]] = {}

    def forget(self) -> None:
        """Before another graph, which cannot take the traced tensors of this one."""
        self._known.clear()

    def _once(self, *key: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        name = tuple(map(str, key))  # a free size is an expression, which prints alike in all blocks
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def of_biases(self, height: int, width: int, k: int) -> tuple[Tensor, ...]:
        """Rows (H K) and columns (W K) of a relative position bias that the taps of all tokens read."""

        def axis(side: int) -> Tensor:
            return (window_rows(side, k) - torch.arange(side)[:, None] + k - 1).flatten()

        return self._once("biases", height, width, k, make=lambda: (axis(height), axis(width)))

    def of_bands(self, height: int, width: int, k: int) -> tuple[Tensor, ...]:
        """Of the matrix (columns, K x width) of a row, which holds a row of each kernel in its window's columns.

        Returns:
            For each column the matrix (W, K, W) that moves a row of its kernel to there, and the rows (H K) of all
            windows.
        """

        def make() -> tuple[Tensor, ...]:
            tap = torch.arange(width) - window_starts(width, k)[:, None]  # W, W
            moves = (tap[:, None, :] == torch.arange(k)[:, None]).to(torch.float32)
            return moves, window_rows(height, k).flatten()

        return self._once("bands", height, width, k, make=make)

    def of_windows(self, windows: Size, width: int, k: int) -> Tensor:
        """Places in a flat map of the taps of few windows, (A B K^2)."""

        def make() -> tuple[Tensor, ...]:
            rows, columns = (torch.arange(count)[:, None] + torch.arange(k) for count in windows)
            return ((rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(),)

        return self._once("windows", windows, width, k, make=make)[0]

    def average(self, x: Tensor, height: int, width: int) -> Tensor:
        """Means over a grid of regions, by the pooling that runtimes have where the regions are alike."""
        sides, parts = x.shape[-2:], (height, width)
        if parts == (1, 1):
            return x.mean(dim=(-2, -1), keepdim=True)
        if all(isinstance(side, int) and side % count == 0 for side, count in zip(sides, parts, strict=True)):
            return F.avg_pool2d(x, (sides[0] // height, sides[1] // width))
        rows, columns = (
            self._once("averages", side, count, x.dtype, make=lambda: (averages(side, count, x),))[0]  # noqa: B023
            for side, count in zip(sides, parts, strict=True)
        )
        return torch.matmul(torch.matmul(rows, x), columns.transpose(0, 1))


class PlainContMix(nn.Module):
    """A folded :class:`overlock.ContMix` by standard operations. Called as it, of the same shapes.

    Args:
        mix: whose projections are convolutions already (``overlock.fuse(..., kernels=False)``).
        places: shared by all of a network.
    """

    def __init__(self, mix: ContMix, places: Places):
        super().__init__()
        self.groups, self.region_grid, self.kernel_size = mix.groups, mix.region_grid, mix.kernel_size
        self.places = places
        self.query, self.key, self.value, self.out = mix.query, mix.key, mix.value, mix.out
        taps = mix.small_taps
        weight, bias = mix.kernels.weight.detach() * mix.scale, mix.kernels.bias.detach()
        self.parts = nn.ModuleList()
        if mix.small_kernel is not None and mix.rpb_small is not None:
            self.parts.append(_Kernel(mix.small_kernel, weight[:taps], bias[:taps], mix.rpb_small, places))
        self.parts.append(_Kernel(mix.kernel_size, weight[taps:], bias[taps:], mix.rpb_large, places))

    def forward(self, x: Tensor, query: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Mix ``x`` as :meth:`overlock.ContMix.forward` does."""
        context = x if context is None else context
        query = self.query(x if query is None else query)
        value = self.value(x)
        height, width = value.shape[2:]
        free = not (isinstance(height, int) and isinstance(width, int))  # sizes that are free have room
        size = None if free else enlarged(height, width, self.kernel_size)
        if size is not None:
            query, value, context = (F.interpolate(y, size=size, mode="bilinear") for y in (query, value, context))
        key = self.key(self.places.average(context, self.region_grid, self.region_grid))
        key = key.flatten(2).unflatten(1, (self.groups, -1))  # B, G, D, S^2
        query = query.unflatten(1, (self.groups, -1))
        value = value.unflatten(1, (len(self.parts), self.groups, -1)).permute(1, 0, 2, 4, 5, 3)
        mixed = torch.cat(
            [part(query, key, own).flatten(1, 2) for part, own in zip(self.parts, value.unbind(), strict=True)], dim=1
        )
        return self.out(mixed if size is None else self.places.average(mixed, height, width))


class _Kernel(nn.Module):
    """The dynamic convolution of one kernel size.

    Args:
        size: K.
        weight: (K^2, S^2), with the scale of the affinities.
        bias: (K^2,).
        rpb: (G, 2K-1, 2K-1).
        places: shared by all of a network.
    """

    weight: Tensor
    bias: Tensor
    rpb: Tensor

    def __init__(self, size: int, weight: Tensor, bias: Tensor, rpb: Tensor, places: Places):
        super().__init__()
        self.size, self.places = size, places
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("rpb", rpb.detach())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query (B, G, D, H, W), key (B, G, D, S^2), value (B, G, H, W, c) -> (B, G, c, H, W)."""
        height, width = value.shape[2:4]
        windows = (height - self.size + 1, width - self.size + 1)
        if all(isinstance(side, int) and side in (1, 2) for side in windows):
            return self._by_windows(query, self._tap_keys(key), value, windows)
        return self._by_rows(query, self._tap_keys(key), value)

    def kernels(self, query: Tensor, key: Tensor) -> Tensor:
        """Those of all tokens, (B, G, H W, N)."""
        biases = self._biases(*query.shape[3:]).flatten(1, 2)
        return self._kernels(query.flatten(3).transpose(2, 3), self._tap_keys(key), biases)

    def _by_windows(self, query: Tensor, tap_keys: Tensor, value: Tensor, windows: Size) -> Tensor:
        """All tokens of a block of the map share one window. Images and groups are one dimension: XNNPACK has six."""
        (a, b), (height, width), groups = windows, value.shape[2:4], query.shape[1]
        blocks = query.flatten(0, 1).unflatten(3, (b, -1)).unflatten(2, (a, -1))
        blocks = blocks.permute(0, 2, 4, 3, 5, 1).flatten(1, 4).unflatten(0, (-1, groups))  # B, G, T, D
        table = self._biases(height, width)  # G, H, W, N
        table = table.unflatten(2, (b, -1)).unflatten(1, (a, -1)).permute(0, 1, 3, 2, 4, 5)
        kernels = self._kernels(blocks, tap_keys, table.flatten(1, 4)).unflatten(2, (a * b, -1))
        places = self.places.of_windows(windows, width, self.size)
        inside = value.flatten(2, 3).index_select(2, places).unflatten(2, (a * b, -1))
        mixed = torch.matmul(kernels, inside).flatten(0, 1).unflatten(2, (height // a, -1)).unflatten(1, (a, b))
        mixed = mixed.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # B G, c, H, W
        return mixed.unflatten(0, (-1, groups))

    def _by_rows(self, query: Tensor, tap_keys: Tensor, value: Tensor) -> Tensor:
        """All tokens of a row share the rows of their windows.

        Kernels are laid in place by products, since runtimes gather single numbers slowly. Tokens come column by
        column, each of which has its own place.
        """
        k, (height, width) = self.size, value.shape[2:4]
        moves, window = self.places.of_bands(height, width, k)
        columns = query.transpose(3, 4).flatten(3).transpose(2, 3)  # B, G, W H, D
        kernels = self._kernels(columns, tap_keys, self._biases(height, width).transpose(1, 2).flatten(1, 2))
        kernels = kernels.unflatten(3, (k, k)).flatten(2, 3).unflatten(2, (width, -1))  # B, G, W, H K, K
        band = torch.matmul(kernels, moves).unflatten(3, (height, k)).transpose(2, 3).flatten(4)  # B, G, H, W, K W
        rows = value.index_select(2, window).unflatten(2, (height, k))
        mixed = torch.matmul(band, rows.flatten(3, 4))  # B, G, H, W, c
        return mixed.permute(0, 1, 4, 2, 3)

    def _tap_keys(self, key: Tensor) -> Tensor:
        """A key for each tap, (B, G, N, D)."""
        return torch.matmul(self.weight, key.transpose(2, 3))

    def _kernels(self, query: Tensor, tap_keys: Tensor, biases: Tensor) -> Tensor:
        """Query (B, G, T, D), a key for each tap (B, G, N, D) and biases (G, T, N) -> kernels (B, G, T, N)."""
        return (torch.matmul(query, tap_keys.transpose(2, 3)) + biases).softmax(dim=-1)

    def _biases(self, height: int, width: int) -> Tensor:
        """The biases of all logits, (G, H, W, N)."""
        k = self.size
        rows, columns = self.places.of_biases(height, width, k)
        table = self.rpb.index_select(1, rows).index_select(2, columns)
        table = table.unflatten(2, (width, k)).unflatten(1, (height, k)).permute(0, 1, 3, 2, 4)
        return table.flatten(3) + self.bias
