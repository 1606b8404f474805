"""ContMix's dynamic convolution the other ways: kernels made and stored, then a weighted sum over each window.

Letters as in overlock/kernels/torch/reference.py; N = K^2 taps. Kernels are (B, G, N, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from overlock.kernels.torch.contmix import Span, spans
from overlock.kernels.torch.reference import window_starts

WIDTH = 16  # of a head, the least that FlexAttention takes


def make_logits(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor) -> Tensor:
    """Logits of the kernels."""
    height, width = query.shape[3:]
    k = (rpb.shape[1] + 1) // 2
    affinity = key.transpose(2, 3) @ query.flatten(3)
    taps = torch.arange(k, device=query.device)

    def entries(size: int) -> Tensor:
        token = torch.arange(size, device=query.device)
        return (window_starts(size, k, query.device) - token + k - 1) + taps[:, None]  # K, size

    rows, columns = entries(height), entries(width)
    table = rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(1, 2)  # G, N, H, W
    return (weight @ affinity).unflatten(3, (height, width)) + (table + bias[:, None, None])


def make_kernels(*inputs: Tensor) -> Tensor:
    """Logits normalised over the taps."""
    return make_logits(*inputs).softmax(dim=2)


def by_unfold(kernels: Tensor, value: Tensor) -> Tensor:
    """Weighted sum with every window copied out: the form that the authors' code falls back to."""
    k = round(kernels.shape[2] ** 0.5)
    windows = value.unfold(3, k, 1).unfold(4, k, 1)  # B, G, C, H-K+1, W-K+1, K, K
    rows, columns = (window_starts(n, k, value.device) for n in value.shape[3:])
    windows = windows[:, :, :, rows][:, :, :, :, columns].flatten(5)
    return torch.einsum("bgnhw,bgchwn->bgchw", kernels, windows)


def by_shifts(kernels: Tensor, value: Tensor) -> Tensor:
    """Weighted sum as N multiply-adds of shifted slices of the map.

    At a border the windows stop moving: its tokens share rows or columns of the map, and are matrix products.
    """
    k = round(kernels.shape[2] ** 0.5)
    out = torch.empty_like(value)
    for rows, columns in product(*(spans(size, k, size) for size in value.shape[3:])):
        tokens = (..., slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        if rows.step and columns.step:
            total = out[tokens].zero_()
            for tap, (i, j) in enumerate(product(range(k), range(k))):
                shifted = value[:, :, :, _shifted(rows, i), _shifted(columns, j)]
                total.addcmul_(kernels[tokens][:, :, tap, None], shifted)
        else:
            out[tokens] = _by_shared_windows(
                kernels[tokens], value[..., rows.region(k), columns.region(k)], rows, columns
            )
    return out


def _shifted(span: Span, tap: int) -> slice:
    return slice(span.window + tap, span.window + tap + span.size)


def _by_shared_windows(kernels: Tensor, region: Tensor, rows: Span, columns: Span) -> Tensor:
    k = round(kernels.shape[2] ** 0.5)
    windows = region.unfold(3, k, 1).unfold(4, k, 1).flatten(5)  # B, G, C, H or 1, W or 1, N
    moving = "h" * rows.step + "w" * columns.step
    for dim, span in ((4, columns), (3, rows)):
        windows = windows if span.step else windows.squeeze(dim)
    return torch.einsum(f"bgnhw,bgc{moving}n->bgchw", kernels, windows)


def make_flex(height: int, width: int, kernel_size: int, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """FlexAttention between the positions of a map, called with (logits, value).

    Queries and keys are zero; the logits, which it looks up for each pair of token and position, are the scores.
    """
    rows, columns = (window_starts(size, kernel_size, torch.device(device)) for size in (height, width))

    def tap(token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        return position // width - rows[token // width], position % width - columns[token % width]

    def inside(_batch: Tensor, _group: Tensor, token: Tensor, position: Tensor) -> Tensor:
        row, column = tap(token, position)
        return (row >= 0) & (row < kernel_size) & (column >= 0) & (column < kernel_size)

    mask = create_block_mask(inside, None, None, height * width, height * width, device=device)

    def attend(logits: Tensor, value: Tensor) -> Tensor:
        table = logits.flatten(3)

        def score(_score: Tensor, batch: Tensor, group: Tensor, token: Tensor, position: Tensor) -> Tensor:
            row, column = (x.clamp(0, kernel_size - 1) for x in tap(token, position))
            return table[batch, group, row * kernel_size + column, token].float()

        nothing = value.new_zeros(*value.shape[:2], height * width, WIDTH)
        mixed = flex_attention(
            nothing, nothing, value.flatten(3).transpose(2, 3), score_mod=score, block_mask=mask, scale=1.0
        )
        return mixed.transpose(2, 3).reshape(value.shape)

    return torch.compile(attend, dynamic=False)
