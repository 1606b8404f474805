"""The mixers of Table 7 position by position, as their papers have them: slow, in plain sums, on a module's weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock import ops


def positions(x: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor]) -> Tensor:
    """query (B, G, D), a key (B, G, D), value and bias (G,) for each position seen."""
    logits = torch.stack(
        [(query * key).sum(-1) / math.sqrt(query.shape[-1]) + bias for key, bias in zip(keys, biases, strict=True)], -1
    )
    return (logits.softmax(-1)[:, :, None] * torch.stack(values, -1)).sum(-1)


def attend_all(x: Tensor, qkv: Tensor, heads: int, sees, bias) -> Tensor:
    """sees(t): the positions that t looks at; bias(row, column): of an offset, (G,). x gives the size."""
    query, key, value = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    out = {}
    for i, j in positions(x):
        seen = sees((i, j))
        offsets = [bias(a - i, b - j) for a, b in seen]
        keys, values = ([y[..., a, b] for a, b in seen] for y in (key, value))
        out[i, j] = attend(query[..., i, j], keys, values, offsets).flatten(1)
    return torch.stack([out[t] for t in positions(x)], -1).view_as(x)


def on_channels(linear, x: Tensor) -> Tensor:
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def window(mixer, x: Tensor) -> Tensor:
    attention, side = mixer.attention, mixer.window
    shifts = [mixer.shift if n > side else 0 for n in x.shape[2:]]

    def region(t):
        return tuple((n - shift) // side for n, shift in zip(t, shifts, strict=True))

    def bias(rows, columns):  # of a key relative to the query; timm's table goes by query minus key
        return attention.relative_position_bias_table[(side - 1 - rows) * (2 * side - 1) + side - 1 - columns]

    mixed = attend_all(
        x, on_channels(attention.qkv, x), attention.num_heads,
        lambda t: [s for s in positions(x) if region(s) == region(t)], bias,
    )  # fmt: skip
    return on_channels(attention.proj, mixed)


def natten(mixer, x: Tensor) -> Tensor:
    size = mixer.kernel_size

    def around(place, side):
        count = min(size, side)
        first = min(max(place - count // 2, 0), side - count)
        return range(first, first + count)

    mixed = attend_all(
        x, mixer.qkv(x), mixer.heads,
        lambda t: [(a, b) for a in around(t[0], x.shape[2]) for b in around(t[1], x.shape[3])],
        lambda rows, columns: mixer.rpb[:, rows + size - 1, columns + size - 1],
    )  # fmt: skip
    return mixer.proj(mixed)


def volo(mixer, x: Tensor) -> Tensor:
    attention = mixer.attention
    value = on_channels(attention.v, x).unflatten(1, (attention.num_heads, -1))
    weights = on_channels(attention.attn, x).unflatten(1, (attention.num_heads, 9, 9)) * attention.scale
    weights = weights.softmax(3)
    window = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    places, sums = set(positions(x)), dict.fromkeys(positions(x), 0.0)
    for i, j in positions(x):
        for n, (a, b) in enumerate(window):
            if (i + a, j + b) in places:
                for m, (c, d) in enumerate(window):
                    if (i + c, j + d) in places:
                        share = weights[:, :, n, m, i, j, None]
                        sums[i + a, j + b] = sums[i + a, j + b] + share * value[..., i + c, j + d]
    mixed = torch.stack([sums[t].flatten(1) for t in positions(x)], -1).view_as(x)
    return on_channels(attention.proj, mixed)


def dcnv3(mixer, x: Tensor) -> Tensor:
    local = mixer.local(x)
    size, groups = mixer.kernel_size, mixer.groups
    value = mixer.value(x).unflatten(1, (groups, -1))
    offset = mixer.offset(local).unflatten(1, (groups, size**2, 2))
    share = mixer.mask(local).unflatten(1, (groups, size**2)).softmax(2)
    rows, columns = (torch.arange(n, dtype=x.dtype) for n in x.shape[2:])
    mixed = torch.zeros_like(value)
    for tap in range(size**2):
        row = rows[:, None] + tap // size - size // 2 + offset[:, :, tap, 0]
        column = columns[None, :] + tap % size - size // 2 + offset[:, :, tap, 1]
        mixed = mixed + share[:, :, tap, None] * bilinear(value, row, column)
    return mixer.proj(mixed.flatten(1, 2))


def bilinear(value: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """value (B, G, C, H, W) at places (B, G, H, W), zero outside: a sum over all positions of their tents."""
    height, width = value.shape[3:]
    tents_of_rows = (1 - (row[..., None] - torch.arange(height)).abs()).clamp(min=0)
    tents_of_columns = (1 - (column[..., None] - torch.arange(width)).abs()).clamp(min=0)
    return torch.einsum("bghwi,bghwj,bgcij->bgchw", tents_of_rows, tents_of_columns, value)


def by_taps(x: Tensor, kernel_of, size: int) -> Tensor:
    """Sum over the taps of kernel_of(tap), (B, C, H, W) or to be broadcast, times the map moved, zero outside."""
    padded, half = F.pad(x, [size // 2] * 4), range(size)
    moved = {(a, b): padded[:, :, a : a + x.shape[2], b : b + x.shape[3]] for a in half for b in half}
    return sum(kernel_of(a * size + b) * y for (a, b), y in moved.items())


def dyconv(mixer, x: Tensor) -> Tensor:
    first, operator, last = mixer
    x = first(x)
    _, squeeze, _, expand = operator.attention
    pooled = x.mean((2, 3), keepdim=True)
    shares = expand(squeeze(pooled).clamp(min=0))[:, :, 0, 0].softmax(1)
    kernels = sum(shares[:, n, None, None] * operator.weight[n].flatten(1) for n in range(4))
    return last(by_taps(x, lambda tap: kernels[:, :, tap, None, None], 7))


def odconv(mixer, x: Tensor) -> Tensor:
    first, operator, last = mixer
    x = first(x)
    hidden = operator.squeeze[2](operator.squeeze[1](x.mean((2, 3), keepdim=True))).clamp(min=0)
    shares = operator.kernel(hidden)[:, :, 0, 0].softmax(1)
    taps = operator.spatial(hidden).flatten(1).sigmoid()
    kernels = sum(shares[:, n, None, None] * taps[:, None] * operator.weight[n].flatten(1) for n in range(4))
    return last(by_taps(operator.channel(hidden).sigmoid() * x, lambda tap: kernels[:, :, tap, None, None], 7))


def involution(mixer, x: Tensor) -> Tensor:
    first, operator, last = mixer
    x = first(x)
    kernels = operator.span(operator.reduce(x).clamp(min=0)).unflatten(1, (operator.groups, 49))
    width = x.shape[1] // operator.groups
    return last(by_taps(x, lambda tap: kernels[:, :, tap].repeat_interleave(width, 1), 7))


def contmix(mixer, x: Tensor) -> Tensor:
    with ops.backend("reference"):
        mixed = mixer.mixer(x)
    branches = sum(branch(x) for branch in mixer.large_kernel.conv.branches.values())
    large = F.conv2d(x, mixer.large_kernel.conv.large.weight, padding=3, groups=x.shape[1])
    mixed = mixed + mixer.large_kernel.norm(mixer.large_kernel.conv.norm(large) + branches)
    excite = mixer.se.fc2(F.gelu(mixer.se.fc1(mixed.mean((2, 3), keepdim=True))))
    return mixed * excite.sigmoid()
