"""ContMix's dynamic convolution for CUDA, by Triton kernels.

Letters: B batch, G groups, D query and key channels of a group, C value channels of a group, H x W the map, M = HW its
tokens, S^2 region centres, K x K the kernel, N = K^2 taps, T the tokens of a tile.

Forward is a kernel that folds W_d and the key (contmix_prepared.py), and one that mixes. It holds the queries of T
tokens and walks over the taps: logits and weighted sum are products of matrices on tensor cores, the softmax between
them is kept up to date in float32, and kernel weights never reach memory. Where tokens share windows this is attention
(contmix_windows.py); elsewhere a row of taps makes a band (contmix_bands.py). See docs/architecture.md.

Backward is three more kernels. Each computes the kernels of its tokens again. The first, of the query's gradient, finds
the log-sum-exp on its way and leaves it to the others. (Forward could store it, but the operator has one result, and
a logit costs D multiply-adds.) Every sum has one owner and a fixed order, and tile sizes follow from shapes alone
(contmix_tiles.py): the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from overlock.kernels.triton import contmix_bands as bands
from overlock.kernels.triton import contmix_windows as windows
from overlock.kernels.triton.contmix_kernels import INTERPRETED
from overlock.kernels.triton.contmix_prepared import (
    PROGRAMS,
    Prepared,
    by_token,
    fit,
    padded,
    settle,
    strides_of,
    unfold_table,
    unit_of,
)
from overlock.kernels.triton.contmix_tiles import Tile, tile_of

LARGEST = 128  # channels of a group
LARGEST_KEY = 8192  # numbers of the padded key of a group: 64 regions of 128 channels
LARGEST_KERNEL = 32  # side of a kernel: the table of biases takes the fourth power of it
COLUMNS = 16  # tokens of a band: the rows of the smallest matrix product


class Bands(Prepared):
    """A call on a map with many windows. Gradients take products over the taps of a row, which must be 16 or more."""

    def __init__(self, call: tuple[Any, ...], gradients: bool):
        kernel_height, kernel_width = call[-2:]
        pitch = padded(kernel_width, 16 if gradients else 8)
        super().__init__(call, gradients, pitch, kernel_height * pitch)
        positions = padded(min(COLUMNS + kernel_width - 1, self.width), 16)
        self.sizes |= {"pitch": pitch, "columns": COLUMNS}
        self.band = {"positions": positions}
        self.across = triton.cdiv(self.width, COLUMNS)

    def _tile(self, kernel: str) -> tuple[Tile, int]:
        """The tile of a kernel, with fewer rows where the map would leave a large GPU without programs, and these."""
        tile = tile_of(f"bands {kernel}", self.exact)
        rows = fit(min(tile.size, padded(self.height)), 1, self.band["positions"] * self.widest)
        while rows > 1 and self.pairs * triton.cdiv(self.height, rows) * self.across < PROGRAMS:
            rows //= 2
        tile = tile._replace(size=rows, warps=max(tile.warps * rows // tile.size, 1))
        return tile, self.pairs * triton.cdiv(self.height, rows) * self.across

    def forward(self, out: Tensor) -> None:
        """Write the result into ``out`` (B, G, HW, C)."""
        tile, programs = self._tile("forward")
        unit, out_unit = unit_of(self.query, self.value), unit_of(out)
        bands.forward_kernel[(programs,)](
            self.query, self.keys, self.value, self.table, out,
            *strides_of(self.query, self.value, unit=unit), *strides_of(out, unit=out_unit), out.stride(3),
            self.half, self.groups, self.height, self.width,
            **self.sizes, **self.band, rows=tile.size, unit=unit, out_unit=out_unit,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def query_gradient(self, out: Tensor) -> None:
        """Write the gradient into ``out`` (B, G, HW, D), and log-sum-exp and delta for the other gradients."""
        tile, programs = self._tile("query")
        out_unit = unit_of(out)
        bands.query_kernel[(programs,)](
            self.grad, self.query, self.keys, self.value, self.table, self.lse, self.delta, out,
            *strides_of(self.grad, self.query, self.value, unit=self.unit),
            *strides_of(out, unit=out_unit), out.stride(3), self.half, self.groups, self.height, self.width,
            **self.sizes, **self.band, rows=tile.size, unit=self.unit, out_unit=out_unit,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def value_gradient(self, out: Tensor) -> None:
        """Write the gradient into ``out`` (B, G, HW, C)."""
        tile, programs = self._tile("value")
        out_unit = unit_of(out)
        bands.value_kernel[(programs,)](
            self.grad, self.query, self.keys, self.table, self.lse, out,
            *strides_of(self.grad, self.query, unit=self.unit), *strides_of(out, unit=out_unit), out.stride(3),
            self.half, self.groups, self.height, self.width,
            **self.sizes, rows=tile.size, tokens=min(tile.chunk, padded(self.width, 16)),
            unit=self.unit, out_unit=out_unit, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def tap_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the folded keys (BG, taps_p, D) and of the table (G, Kh, Kw, Kh, Kw)."""
        tile = tile_of("bands taps", self.exact)
        images = fit(min(tile.size, padded(self.batch)), 1, self.band["positions"] * self.widest)
        owners = self.kernel_height * self.groups
        splits = _even(triton.cdiv(self.batch, images), triton.cdiv(2 * PROGRAMS, owners))
        pieces = _even(self.height, triton.cdiv(2 * PROGRAMS, owners * splits))
        grad_keys = self.empty(pieces, *self.keys.shape[1:])
        # of rows of tokens whose windows are centred each piece has a sum of its own
        slots = self.kernel_height - 1 + pieces
        grad_table = self.empty(splits, self.groups, slots, *self.table.shape[2:]).zero_()
        bands.taps_kernel[(owners * splits * pieces,)](
            self.grad, self.query, self.keys, self.value, self.table, self.lse, self.delta, grad_keys, grad_table,
            *strides_of(self.grad, self.query, self.value, unit=self.unit),
            self.half, self.batch, self.groups, self.height, self.width, splits, pieces,
            **self.sizes, **self.band, images=images, shifts_p=padded(self.kernel_width, 16), unit=self.unit,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        table, centre = grad_table.sum(0), (self.kernel_height - 1) // 2
        centred = table[:, centre : centre + pieces].sum(1, keepdim=True)
        table = torch.cat([table[:, :centre], centred, table[:, centre + pieces :]], dim=1)
        return grad_keys.sum(0), self.taps(table)


def _even(items: int, most: int) -> int:
    """Into how many parts to cut items, at most so many that all are nearly equal."""
    return triton.cdiv(items, triton.cdiv(items, most))


class Windows(Prepared):
    """A call on a map with at most two rows and two columns of windows."""

    def __init__(self, call: tuple[Any, ...], gradients: bool):
        kernel_height, kernel_width = call[-2:]
        taps = kernel_height * kernel_width
        self.block = min(64, padded(taps, 16))
        super().__init__(call, gradients, kernel_width, triton.cdiv(taps, self.block) * self.block)
        one = (self.height == kernel_height, self.width == kernel_width)
        # tokens of the first window, which no other exceeds
        self.rows = self.height if one[0] else kernel_height // 2 + 1
        self.columns = self.width if one[1] else kernel_width // 2 + 1
        self.count = (2 - one[0], 2 - one[1])
        self.sizes |= {"height": self.height, "width": self.width, "rows": self.rows, "columns": self.columns}

    def _tile(self, kernel: str) -> tuple[Tile, int, int]:
        """The tile of a kernel, how many each window takes, and all of them."""
        tile = tile_of(f"windows {kernel}", self.exact)
        together = tile.warps if kernel == "taps" else 1
        tokens = fit(min(tile.size, padded(self.rows * self.columns, 16)), 16, self.widest * together)
        parts = triton.cdiv(self.rows * self.columns, tokens)
        chunk = fit(min(tile.chunk, self.block), 16, 2 * self.widest)
        return tile._replace(size=tokens, chunk=chunk), parts, self.count[0] * self.count[1] * parts

    def forward(self, out: Tensor) -> None:
        """Write the result into ``out`` (B, G, HW, C)."""
        tile, parts, tiles = self._tile("forward")
        unit, out_unit = unit_of(self.query, self.value), unit_of(out)
        windows.forward_kernel[(self.pairs * tiles,)](
            self.query, self.keys, self.value, self.table, out,
            *strides_of(self.query, self.value, unit=unit), *strides_of(out, unit=out_unit), out.stride(3),
            self.half, self.batch, self.groups, tiles,
            **self.sizes, parts=parts, tokens=tile.size, chunk=tile.chunk, unit=unit, out_unit=out_unit,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def query_gradient(self, out: Tensor) -> None:
        """Write the gradient into ``out`` (B, G, HW, D), and log-sum-exp and delta for the other gradients."""
        tile, parts, tiles = self._tile("query")
        out_unit = unit_of(out)
        windows.query_kernel[(self.pairs * tiles,)](
            self.grad, self.query, self.keys, self.value, self.table, self.lse, self.delta, out,
            *strides_of(self.grad, self.query, self.value, unit=self.unit),
            *strides_of(out, unit=out_unit), out.stride(3), self.half, self.batch, self.groups, tiles,
            **self.sizes, parts=parts, tokens=tile.size, chunk=tile.chunk, unit=self.unit, out_unit=out_unit,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def value_gradient(self, out: Tensor) -> None:
        """Write the gradient into ``out`` (B, G, HW, C)."""
        tile, parts, tiles = self._tile("value")
        out_unit = unit_of(out)
        windows.value_kernel[(self.pairs * triton.cdiv(self.height * self.width, tile.chunk),)](
            self.grad, self.query, self.keys, self.table, self.lse, out,
            *strides_of(self.grad, self.query, unit=self.unit), *strides_of(out, unit=out_unit), out.stride(3),
            self.half, self.batch, self.groups, tiles,
            **self.sizes, parts=parts, tokens=tile.size, chunk=tile.chunk, unit=self.unit, out_unit=out_unit,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def tap_gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the folded keys (BG, taps_p, D) and of the table (G, Kh, Kw, Kh, Kw)."""
        tile, parts, tiles = self._tile("taps")
        together = min(padded(tiles), tile.warps)
        groups_of_tiles = triton.cdiv(tiles, together)
        owners = self.taps_p // tile.chunk * groups_of_tiles * self.groups
        splits = _even(self.batch, triton.cdiv(4 * PROGRAMS, owners * together))
        grad_keys = self.empty(groups_of_tiles, *self.keys.shape[1:])
        grad_biases = self.empty(splits, self.groups, tiles * tile.size, self.taps_p)
        windows.taps_kernel[(owners * splits,)](
            self.grad, self.query, self.keys, self.value, self.table, self.lse, self.delta, grad_keys, grad_biases,
            *strides_of(self.grad, self.query, self.value, unit=self.unit),
            self.half, self.batch, self.groups, tiles, splits,
            **self.sizes, parts=parts, tokens=tile.size, chunk=tile.chunk, together=together, unit=self.unit,
            num_warps=together, num_stages=tile.stages,
        )  # fmt: skip
        return grad_keys.sum(0), self._by_shift(self.taps(grad_biases.sum(0)))

    def _by_shift(self, x: Tensor) -> Tensor:
        """Sum (G, tiles x T, Kh, Kw) by the shifts of the tokens' windows, (G, Kh, Kw, Kh, Kw)."""
        x = x.unflatten(1, (*self.count, -1))[:, :, :, : self.rows * self.columns]
        x = x.unflatten(3, (self.rows, self.columns))
        table = x.new_zeros(self.groups, self.kernel_height, self.kernel_width, *x.shape[-2:])
        for i, rows in enumerate(_shifts(self.height, self.kernel_height, self.rows)):
            for j, columns in enumerate(_shifts(self.width, self.kernel_width, self.columns)):
                part = x[:, i, j, : rows.stop - rows.start, : columns.stop - columns.start]
                table[:, rows, columns] += part.flip(1, 2)  # a shift falls from token to token
        return table


def _shifts(size: int, kernel: int, first: int) -> list[slice]:
    """Shifts of the tokens that see the first window of an axis, and of those that see the second."""
    return [slice(kernel - first, kernel), slice(0, kernel - first + 1)][: size - kernel + 1]


def _lay_out(*call: Any, gradients: bool) -> Bands | Windows:
    query, kernel_height, kernel_width = call[0], *call[-2:]
    few = query.shape[3] - kernel_height <= 1 and query.shape[4] - kernel_width <= 1
    return (Windows if few else Bands)(call, gradients)


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See kernels/torch/reference.py. Returns (B, G, C, H, W) in the layout and dtype of ``value``."""
    mixing = _lay_out(query, key, value, weight, bias, rpb, kernel_height, kernel_width, gradients=False)
    out = torch.empty_like(value)
    target = by_token(out)
    with mixing.device():
        mixing.forward(target)
    return settle(out, target)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, weight, bias and rpb, each in the dtype of its input."""
    mixing = _lay_out(query, key, value, weight, bias, rpb, kernel_height, kernel_width, gradients=True)
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    query_target, value_target = by_token(grad_query), by_token(grad_value)
    mixing.start_backward(grad)
    with mixing.device():
        mixing.query_gradient(query_target)
        mixing.value_gradient(value_target)
        grad_keys, grad_table = mixing.tap_gradients()
    grad_key, grad_weight = mixing.unfold_keys(grad_keys)
    grad_bias, grad_rpb = unfold_table(grad_table)
    return (
        settle(grad_query, query_target),
        grad_key.to(key.dtype),
        settle(grad_value, value_target),
        grad_weight.to(weight.dtype),
        None if bias is None else grad_bias.to(bias.dtype),
        None if rpb is None else grad_rpb.to(rpb.dtype),
    )


def _spans(x: Tensor) -> int:
    """Numbers from the first of an image to its last."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) + 1


def why_not(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> str | None:  # fmt: skip
    """Reason why these kernels cannot run a call, or None."""
    tensors = [x for x in (query, key, value, weight, bias, rpb) if x is not None]
    depth, channels, regions = query.shape[2], value.shape[2], key.shape[3]
    dtypes = {x.dtype for x in tensors} - {torch.float32, torch.bfloat16, torch.float16}
    reason = None
    if not (value.is_cuda or INTERPRETED.value):
        reason = f"it needs tensors on a CUDA device, not on {value.device.type}"
    elif not hasattr(triton.language, "gather"):
        reason = f"it needs Triton 3.3 or newer, which comes with PyTorch 2.7, not {triton.__version__}"
    elif dtypes:
        reason = f"it takes float32, bfloat16 and float16, not {str(dtypes.pop()).removeprefix('torch.')}"
    elif value.is_cuda and torch.cuda.get_device_capability(value.device) < (8, 0):
        reason = "it needs a GPU of compute capability 8.0 or above"
    elif max(depth, channels) > LARGEST:
        reason = f"it takes at most {LARGEST} channels a group, which a program keeps in registers"
    elif padded(depth, 16) * padded(regions, 16) > LARGEST_KEY:
        reason = f"{regions} region centres of {depth} channels do not fit into a program's registers"
    elif max(kernel_height, kernel_width) > LARGEST_KERNEL:
        most = f"{LARGEST_KERNEL} x {LARGEST_KERNEL}"
        reason = f"it takes kernels of at most {most}, not {kernel_height} x {kernel_width}"
    elif max(_spans(query), _spans(value)) >= 2**31:
        reason = "it counts the numbers of an image in 32 bits, and one of the maps spans 2^31 or more"
    return reason
