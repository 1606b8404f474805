"""ContMix's dynamic convolution as ordinary matrix products: runs, forward and backward, wherever PyTorch does.

The map is cut into tiles of tokens. All tokens of a border tile share one window, so their weighted sum is a plain
matrix product; in an interior tile the window moves with the token, and the kernels are laid as a band in a
(tokens x region) matrix whose other entries stay zero, again one matrix product. Extra memory is that of one tile, and
a key for each tap: it never grows with the map times K^2. The backward pass computes the kernels of a tile again.

The logits are weight @ (key^T query), computed as (weight @ key^T) query: each tap gets a key of its own, D numbers,
and the S^2 affinities of a token are never made, which takes a third of the multiply-adds where D is 16 and S^2 49.

Letters as in reference.py, and T the tokens of a tile, R the positions of its region.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers that the band of one interior tile may hold, over batch and groups: about the second-level cache of two cores.
BAND_NUMBERS = 1 << 19


class Span(NamedTuple):
    """Consecutive tokens of one axis whose windows all start at ``window`` (step 0) or move with the token (step 1)."""

    start: int
    stop: int
    window: int
    step: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def region(self, kernel_size: int) -> slice:
        """Positions that the windows of these tokens cover together."""
        return slice(self.window, self.window + kernel_size + self.step * (self.size - 1))

    def offset(self, kernel_size: int) -> int:
        """Row of the relative position bias at which the first token's window begins."""
        return self.window - self.start + kernel_size - 1


@functools.lru_cache(maxsize=256)
def spans(size: int, kernel_size: int, longest: int) -> tuple[Span, ...]:
    """Cut an axis into its two borders and interior spans of at most ``longest`` tokens."""
    half, last = kernel_size // 2, size - kernel_size
    if last == 0:
        return (Span(0, size, 0, 0),)
    first_moving, first_stuck = half + 1, last + half
    moving = first_stuck - first_moving
    pieces = -(-moving // longest)
    cuts = [first_moving + moving * i // pieces for i in range(pieces + 1)] if pieces else []
    interior = [Span(a, b, a - half, 1) for a, b in pairwise(cuts)]
    return (Span(0, first_moving, 0, 0), *interior, Span(first_stuck, size, last, 0))


class Tile(NamedTuple):
    rows: Span
    columns: Span

    @property
    def tokens(self) -> tuple[slice, slice]:
        return slice(self.rows.start, self.rows.stop), slice(self.columns.start, self.columns.stop)

    def region(self, kernel_height: int, kernel_width: int) -> tuple[slice, slice]:
        return self.rows.region(kernel_height), self.columns.region(kernel_width)


def tiles(height: int, width: int, kernel: tuple[int, int], batch: int) -> Iterator[Tile]:
    """Tiles that cover the map, interior ones sized so that their band stays in the cache."""
    side = 1
    while batch * (side + 1) ** 2 * (side + kernel[0]) * (side + kernel[1]) <= BAND_NUMBERS:
        side += 1
    for rows in spans(height, kernel[0], side):
        for columns in spans(width, kernel[1], side):
            yield Tile(rows, columns)


class Mixing:
    """What forward and backward share: flattened inputs, and the kernels of a tile."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
        kernel_height: int, kernel_width: int,
    ):  # fmt: skip
        self.batch, self.groups, _, self.height, self.width = query.shape
        self.kernel = (kernel_height, kernel_width)
        exact = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.query = query.permute(0, 1, 3, 4, 2).flatten(0, 1).to(exact)  # BG, H, W, D
        self.key = key.flatten(0, 1).to(exact)  # BG, D, S^2
        self.value = value.permute(0, 1, 3, 4, 2).flatten(0, 1).to(exact)  # BG, H, W, C
        self.weight = weight.to(exact)
        self.bias = None if bias is None else bias.to(exact)
        self.rpb = None if rpb is None else rpb.to(exact)
        self.tap_keys = torch.bmm(self.weight.expand(len(self.key), -1, -1), self.key.transpose(1, 2))  # BG, N, D
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._bands: dict[tuple[int, ...], Tensor] = {}

    def tiles(self) -> Iterator[Tile]:
        return tiles(self.height, self.width, self.kernel, self.batch * self.groups)

    def bias_indices(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Rows (T_h, 1, Kh, 1) and columns (1, T_w, 1, Kw) of the relative position bias that a tile reads."""

        def axis(span: Span, kernel_size: int) -> Tensor:
            token = torch.arange(span.size, device=self.value.device)[:, None] * (span.step - 1)
            return span.offset(kernel_size) + token + torch.arange(kernel_size, device=self.value.device)

        rows, columns = axis(tile.rows, self.kernel[0]), axis(tile.columns, self.kernel[1])
        return rows[:, None, :, None], columns[None, :, None, :]

    def bias_key(self, tile: Tile) -> tuple[int, ...]:
        """Tiles with the same key read the same biases; interior tiles of one size all do."""
        rows, columns = tile
        return (
            rows.size, rows.step, rows.offset(self.kernel[0]),
            columns.size, columns.step, columns.offset(self.kernel[1]),
        )  # fmt: skip

    def bias_table(self, tile: Tile) -> Tensor | None:
        """Bias plus relative position bias of a tile's logits: (1 or G, 1 or T, N)."""
        if self.rpb is None:
            return None if self.bias is None else self.bias[None, None]
        identity = self.bias_key(tile)
        if identity not in self._tables:
            rows, columns = self.bias_indices(tile)
            table = self.rpb[:, rows, columns].flatten(1, 2).flatten(2)
            self._tables[identity] = table if self.bias is None else table + self.bias
        return self._tables[identity]

    def kernels(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Queries (BG, T, D) and normalised kernels (BG, T, N) of a tile."""
        rows, columns = tile.tokens
        query = self.query[:, rows, columns].flatten(1, 2)
        logits = torch.bmm(query, self.tap_keys.transpose(1, 2))
        table = self.bias_table(tile)
        if table is not None:
            logits.unflatten(0, (self.batch, self.groups)).add_(table)
        return query, logits.softmax(dim=-1)

    def band(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """A (BG, T, R) matrix that is zero outside the taps, and the view (BG, T_h, T_w, Kh, Kw) of its taps.

        Tiles of one shape use the same memory: the taps are written anew each time, the rest stays zero.
        """
        rows, columns = tile
        region = [extent.stop - extent.start for extent in tile.region(*self.kernel)]
        shape = (rows.size, columns.size, region[0], region[1])
        if shape not in self._bands:
            self._bands[shape] = self.value.new_zeros(self.batch * self.groups, *shape)
        band = self._bands[shape]
        stride = list(band.stride())
        stride[1] += rows.step * stride[3]
        stride[2] += columns.step * stride[4]
        taps = band.as_strided((band.shape[0], rows.size, columns.size, *self.kernel), stride)
        return band.flatten(3).flatten(1, 2), taps

    def to_band(self, kernels: Tensor, tile: Tile) -> Tensor:
        """Kernels (BG, T, N) as the matrix (BG, T, R) over the positions of the tile's region."""
        if tile.rows.step == tile.columns.step == 0:
            return kernels
        matrix, taps = self.band(tile)
        taps.copy_(kernels.view(taps.shape))
        return matrix

    def from_band(self, matrix: Tensor, tile: Tile) -> Tensor:
        """The taps (BG, T, N) of a matrix (BG, T, R): the transpose of :meth:`to_band`."""
        if tile.rows.step == tile.columns.step == 0:
            return matrix
        rows, columns = tile
        region = [extent.stop - extent.start for extent in tile.region(*self.kernel)]
        stride = list(matrix.view(-1, rows.size, columns.size, *region).stride())
        stride[1] += rows.step * stride[3]
        stride[2] += columns.step * stride[4]
        taps = matrix.as_strided((matrix.shape[0], rows.size, columns.size, *self.kernel), stride)
        return taps.flatten(3).flatten(1, 2)

    def region(self, tile: Tile) -> Tensor:
        """Values (BG, R, C) of a tile's region."""
        rows, columns = tile.region(*self.kernel)
        return self.value[:, rows, columns].flatten(1, 2)


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See kernels/torch/reference.py. Returns (B, G, C, H, W) in the layout and dtype of ``value``."""
    mixing = Mixing(query, key, value, weight, bias, rpb, kernel_height, kernel_width)
    out = torch.empty_like(value)
    channels_last = out.permute(0, 1, 3, 4, 2)
    for tile in mixing.tiles():
        _, kernels = mixing.kernels(tile)
        mixed = torch.bmm(mixing.to_band(kernels, tile), mixing.region(tile))
        rows, columns = tile.tokens
        channels_last[:, :, rows, columns] = mixed.view(*value.shape[:2], tile.rows.size, tile.columns.size, -1)
    return out


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, weight, bias and rpb, each in the dtype of its input.

    With P the kernels of a tile and dP = grad . value their gradients, the softmax gives dL = P (dP - sum_n P dP), and
    each input's gradient is the product of dL with what multiplied it (``kernels`` above, read backwards).
    """
    mixing = Mixing(query, key, value, weight, bias, rpb, kernel_height, kernel_width)
    grad = grad.permute(0, 1, 3, 4, 2).flatten(0, 1).to(mixing.value.dtype)  # BG, H, W, C
    grad_query = torch.empty_like(mixing.query, memory_format=torch.contiguous_format)
    grad_value = torch.zeros_like(mixing.value, memory_format=torch.contiguous_format)
    grad_tap_keys = torch.zeros_like(mixing.tap_keys)
    grad_bias = None if mixing.bias is None else torch.zeros_like(mixing.bias)
    grad_rpb = None if mixing.rpb is None else torch.zeros_like(mixing.rpb)

    for tile in mixing.tiles():
        tile_query, kernels = mixing.kernels(tile)
        rows, columns = tile.tokens
        grad_out = grad[:, rows, columns].flatten(1, 2)  # BG, T, C
        grad_kernels = mixing.from_band(torch.bmm(grad_out, mixing.region(tile).transpose(1, 2)), tile)
        region_rows, region_columns = tile.region(*mixing.kernel)
        grad_region = torch.bmm(mixing.to_band(kernels, tile).transpose(1, 2), grad_out)
        target = grad_value[:, region_rows, region_columns]
        target += grad_region.view(target.shape)

        delta = (kernels * grad_kernels).sum(dim=-1, keepdim=True)
        grad_logits = kernels * (grad_kernels - delta)
        grad_query[:, rows, columns] = torch.bmm(grad_logits, mixing.tap_keys).view(
            -1, tile.rows.size, tile.columns.size, tile_query.shape[-1]
        )
        grad_tap_keys.baddbmm_(grad_logits.transpose(1, 2), tile_query)
        if grad_bias is not None:
            grad_bias += grad_logits.sum(dim=(0, 1))
        if grad_rpb is not None:
            by_group = grad_logits.unflatten(0, (mixing.batch, mixing.groups)).sum(dim=0)
            table = by_group.view(mixing.groups, tile.rows.size, tile.columns.size, *mixing.kernel)
            index_rows, index_columns = mixing.bias_indices(tile)
            grad_rpb.permute(1, 2, 0).index_put_(
                (index_rows, index_columns), table.permute(1, 2, 3, 4, 0), accumulate=True
            )

    grad_key = torch.matmul(grad_tap_keys.transpose(1, 2), mixing.weight)
    grad_weight = grad_tap_keys.transpose(0, 1).flatten(1) @ mixing.key.flatten(0, 1)
    shape = (mixing.batch, mixing.groups, mixing.height, mixing.width, -1)
    return (
        torch.empty_like(query).copy_(grad_query.view(shape).permute(0, 1, 4, 2, 3)),
        grad_key.view(key.shape).to(key.dtype),
        torch.empty_like(value).copy_(grad_value.view(shape).permute(0, 1, 4, 2, 3)),
        grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        None if grad_rpb is None or rpb is None else grad_rpb.to(rpb.dtype),
    )
