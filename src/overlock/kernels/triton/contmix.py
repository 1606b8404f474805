"""ContMix's dynamic convolution for CUDA: one fused Triton kernel forward, and three more backward.

Letters: B batch, G groups, D query and key channels of a group, C value channels of a group, H x W the map, M = HW its
tokens, S^2 region centres, K x K the kernel, N = K^2 taps, T the tokens of a tile, n a chunk of taps.

A program holds the affinities of T tokens, (T, S^2), and walks over the taps in chunks: logits (T, n) by a matrix
product with that chunk's rows of the weight, softmax kept up to date in float32, values (T, n, C) read straight from
the shifted windows. Nothing of size M N reaches memory. Backward computes the kernels again, from the log-sum-exp of
each token. Every sum has one owner and a fixed order, and tile sizes follow from shapes alone: the same call gives the
same bits.

Cost of a (batch, group) pair, against the bytes that must move (each map once, b bytes a number):

    forward     M S^2 (D + N) + M N C  multiply-adds        M (D + 2 C) b + D S^2 b + N S^2 b
    backward    M (S^2 (5 D + 5 N + K D) + 5 N C)           M (2 D + 3 C) b, and partial sums of a few MB

(backward: the forward's kernels once for the log-sum-exp and once for each of query, weight and value; two more
products with S^2 N for the gradients of affinity and weight; for the value, affinities again for each row of taps.)

At 50 x 80, G = 8, D = C = 16, K 13 the forward is 0.4 GMAC and 3 MB in bfloat16: microseconds of arithmetic on a
current GPU and one of memory, so what counts is instructions. Hence: channels last, so that one load brings 8 channels
of a tap; chunks of 16 taps summed into a (T, n, C) accumulator that is reduced over n only once, at the end, because
the taps of a chunk lie in different lanes and a reduction costs more than the chunk's arithmetic; T as large as that
accumulator allows at 64 numbers a thread, since the weight is read once a tile. Triton's own autotuning is left out on
purpose: it would tie the last bits of a result to a race of timings, and cannot run inside a CUDA graph.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from overlock.kernels.triton import contmix_kernels as kernels

LARGEST = 128  # channels of a group
LARGEST_KEY = 8192  # numbers of the padded key of a group: 64 regions of 128 channels
PROGRAMS = 264  # fewer leave a large GPU idle: two for each of 132 multiprocessors


class Tile(NamedTuple):
    """Tokens of a program, taps of a chunk, and warps, such that (T, n, C) is about 64 float32 numbers a thread.

    The loops are not pipelined through shared memory but for the forward's two stages: with three, Triton copies the
    gathered values ahead and asks for up to 180 KB a program, more than most GPUs have.
    """

    tokens: int
    chunk: int
    warps: int


def padded(size: int, least: int = 1) -> int:
    """Next power of two, as tensors of a kernel must be, and at least what a matrix product takes."""
    return max(least, triton.next_power_of_2(size))


def tile_for(pairs: int, tokens: int, channels: int, regions: int) -> Tile:
    """Tile sizes from shapes alone, smaller where the map would leave a large GPU without programs."""
    chunk, wide = 16, padded(channels)
    largest = max(16, min(64, 16384 // (chunk * wide), 4096 // padded(regions), padded(tokens)))
    while largest > 16 and pairs * triton.cdiv(tokens, largest) < PROGRAMS:
        largest //= 2
    return Tile(largest, chunk, min(max(largest * chunk * wide // 2048, 4), 16))


def by_token(x: Tensor) -> Tensor:
    """(B, G, C, H, W) -> (B, G, HW, C): a view where the strides allow, a copy elsewhere."""
    return x.permute(0, 1, 3, 4, 2).flatten(2, 3)


def channels_together(x: Tensor) -> Tensor:
    """As :func:`by_token`, with the channels of a token side by side: what makes one load of several channels."""
    x = by_token(x)
    return x if x.stride(3) == 1 else x.contiguous()


class Mixing:
    """What forward and backward share: inputs as the kernels take them, and the sizes compiled into the kernels."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
        kernel_height: int, kernel_width: int,
    ):  # fmt: skip
        self.batch, self.groups, depth, self.height, self.width = query.shape
        self.depth, self.channels, self.regions = depth, value.shape[2], key.shape[3]
        self.kernel = (kernel_height, kernel_width)
        self.pairs, self.tokens = self.batch * self.groups, self.height * self.width
        self.dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        self.query = channels_together(query.to(self.dtype))
        self.key = key.to(self.dtype).contiguous()
        self.value = channels_together(value.to(self.dtype))
        self.weight = weight.contiguous()
        self.bias = self.weight if bias is None else bias.contiguous()  # never read where there is none
        self.rpb = self.weight if rpb is None else rpb.contiguous()
        self.sizes = {
            "depth": depth, "channels": self.channels, "regions": self.regions,
            "kernel_height": kernel_height, "kernel_width": kernel_width,
            "depth_p": padded(depth, 16), "channels_p": padded(self.channels), "regions_p": padded(self.regions, 16),
            "has_bias": bias is not None, "has_rpb": rpb is not None, "exact": self.dtype == torch.float32,
        }  # fmt: skip
        self.tile = tile_for(self.pairs, self.tokens, self.channels, self.regions)

    def device(self) -> contextlib.AbstractContextManager:
        """Triton launches on the current device, which need not be the tensors'."""
        return torch.cuda.device(self.value.device) if self.value.is_cuda else contextlib.nullcontext()

    def forward(self, out: Tensor, lse: Tensor | None) -> None:
        """Write the result into ``out`` (B, G, HW, C) and each token's log-sum-exp into ``lse`` (BG, HW)."""
        tokens, chunk, warps = self.tile
        kernels.forward_kernel[(self.pairs * triton.cdiv(self.tokens, tokens),)](
            self.query, self.key, self.value, self.weight, self.bias, self.rpb, out, out if lse is None else lse,
            *self.query.stride()[:3], *self.value.stride()[:3], *out.stride(), self.groups, self.height, self.width,
            **self.sizes, tokens=tokens, chunk=chunk, keep_lse=lse is not None, num_warps=warps, num_stages=2,
        )  # fmt: skip

    def sums(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.value.device)

    def start_backward(self, grad: Tensor) -> None:
        """Compute the result and each token's log-sum-exp again, and set up what the gradient kernels share."""
        self.grad = channels_together(grad.to(self.dtype))
        self.mixed = self.sums(self.batch, self.groups, self.tokens, self.channels)
        self.lse = self.sums(self.pairs, self.tokens)
        self.delta = torch.empty_like(self.lse)
        self.forward(self.mixed, self.lse)
        self.strides = (*self.grad.stride()[:3], *self.query.stride()[:3])
        self.biases = (self.weight, self.bias, self.rpb)

    def query_gradients(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of query and key; leaves ``delta`` for the weight's."""
        tokens, chunk, warps = self.tile
        splits = min(triton.cdiv(self.tokens, tokens), triton.cdiv(4 * PROGRAMS, self.pairs))
        grad_query = torch.empty_like(like)
        target = by_token(grad_query)
        parts = self.sums(self.batch, self.groups, splits, self.depth, self.regions)
        kernels.query_kernel[(self.pairs * splits,)](
            self.grad, self.mixed, self.query, self.key, self.value, *self.biases, self.lse, self.delta, target, parts,
            *self.strides, *self.value.stride()[:3], *target.stride(), self.groups, self.height, self.width, splits,
            **self.sizes, tokens=tokens, chunk=chunk, num_warps=warps, num_stages=1,
        )  # fmt: skip
        return settle(grad_query, target), parts.sum(2)

    def value_gradient(self, like: Tensor) -> Tensor:
        side = min(padded(self.width, 16), 32, self.tile.tokens)
        grad_value = torch.empty_like(like)
        target = by_token(grad_value)
        kernels.value_kernel[(self.pairs * self.height * triton.cdiv(self.width, side),)](
            self.grad, self.query, self.key, *self.biases, self.lse, target,
            *self.strides, *target.stride(), self.groups, self.height, self.width,
            **self.sizes | {"channels_p": padded(self.channels, 16)},
            chunk=padded(self.kernel[1], 16), tokens=side, positions=side, num_warps=4, num_stages=1,
        )  # fmt: skip
        return settle(grad_value, target)

    def weight_gradients(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of weight, bias and rpb."""
        (kernel_height, kernel_width), taps = self.kernel, self.kernel[0] * self.kernel[1]
        tokens, chunk, warps = self.tile
        tokens = min(tokens, padded(self.width, 16))  # a slot at the border has one row
        inner, chunks = self.height - kernel_height + 1, triton.cdiv(taps, chunk)
        wanted = triton.cdiv(8 * PROGRAMS, self.groups * chunks)
        pieces = min(inner, max(1, wanted - kernel_height + 1))
        slots = kernel_height - 1 + pieces
        splits = min(self.batch, triton.cdiv(wanted, slots))
        grad_weight = self.sums(self.groups, splits, slots, taps, self.regions)
        grad_bias = self.sums(self.groups, splits, slots, taps)
        grad_shift = self.sums(self.groups, splits, slots, kernel_width, *self.kernel)
        kernels.weight_kernel[(self.groups * splits * slots * chunks,)](
            self.grad, self.query, self.key, self.value, *self.biases, self.lse, self.delta,
            grad_weight, grad_bias, grad_shift, *self.strides, *self.value.stride()[:3],
            self.batch, self.groups, self.height, self.width, splits, slots, pieces,
            **self.sizes, shifts_p=padded(kernel_width, 16), tokens=tokens, chunk=chunk, num_warps=warps, num_stages=1,
        )  # fmt: skip
        return (
            grad_weight.sum((0, 1, 2)),
            grad_bias.sum((0, 1, 2)) if self.sizes["has_bias"] else None,
            sum_shifts(grad_shift.sum(1), pieces) if self.sizes["has_rpb"] else None,
        )


def settle(out: Tensor, by_tokens: Tensor) -> Tensor:
    """``out``, whose numbers a kernel wrote through the view ``by_tokens``; they are copied if it is no view."""
    if by_tokens.data_ptr() != out.data_ptr():
        out.copy_(by_tokens.unflatten(2, out.shape[3:]).permute(0, 1, 4, 2, 3))
    return out


def sum_shifts(parts: Tensor, pieces: int) -> Tensor:
    """Gradient of the relative position bias, from dL summed by the windows' shifts (G, slots, Kw, Kh, Kw).

    With the shift counted as s = win(t) - t + K - 1, a tap n reads the entry s + n: a sum over anti-diagonals. Slots
    come by descending shift, those of centred rows in ``pieces``.
    """
    half = parts.shape[3] // 2
    centred = parts[:, half : half + pieces].sum(1, keepdim=True)
    by_shift = torch.cat([parts[:, :half], centred, parts[:, half + pieces :]], dim=1).flip(1)
    return _antidiagonals(_antidiagonals(by_shift.permute(0, 2, 4, 1, 3)).permute(0, 3, 1, 2))


def _antidiagonals(x: Tensor) -> Tensor:
    """(..., K, K) -> (..., 2K - 1): rows lengthened by K and read as rows of 2K - 1 have moved one more step each."""
    size = x.shape[-1]
    skewed = F.pad(x, (0, size)).flatten(-2)[..., : size * (2 * size - 1)]
    return skewed.unflatten(-1, (size, 2 * size - 1)).sum(-2)


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See kernels/torch/reference.py. Returns (B, G, C, H, W) in the layout and dtype of ``value``."""
    mixing = Mixing(query, key, value, weight, bias, rpb, kernel_height, kernel_width)
    out = torch.empty_like(value)
    target = by_token(out)
    with mixing.device():
        mixing.forward(target, None)
    return settle(out, target)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, weight, bias and rpb, each in the dtype of its input."""
    mixing = Mixing(query, key, value, weight, bias, rpb, kernel_height, kernel_width)
    with mixing.device():
        mixing.start_backward(grad)
        grad_query, grad_key = mixing.query_gradients(query)
        grad_value = mixing.value_gradient(value)
        grad_weight, grad_bias, grad_rpb = mixing.weight_gradients()
    return (
        grad_query,
        grad_key.to(key.dtype),
        grad_value,
        grad_weight.to(weight.dtype),
        None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
        None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype),
    )


def why_not(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> str | None:  # fmt: skip
    """Reason why these kernels cannot run a call, or None."""
    tensors = [x for x in (query, key, value, weight, bias, rpb) if x is not None]
    depth, channels, regions = query.shape[2], value.shape[2], key.shape[3]
    dtypes = {x.dtype for x in tensors} - {torch.float32, torch.bfloat16, torch.float16}
    reason = None
    if not (value.is_cuda or kernels.INTERPRETED.value):
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
    elif max(kernel_height, kernel_width) > 64:
        reason = f"it takes kernels of at most 64 x 64, not {kernel_height} x {kernel_width}"
    return reason
