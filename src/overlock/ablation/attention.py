"""Attention over windows, as mixers of Table 7: shifted windows, neighbourhoods, VOLO's outlook."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from timm.models.volo import OutlookAttention
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.kernels.torch.reference import window_starts

HEAD_WIDTH = 32
"""Channels of a head, as the papers of all three have it."""


class ShiftedWindow(nn.Module):
    """Swin's attention within windows, timm's (arXiv:2103.14030). (B, C, H, W) -> (B, C, H, W).

    A side that is no multiple of the window is padded, and padding is not looked at. A side of one window is not
    shifted.

    Args:
        channels: C.
        window: side of a window.
        shift: of the windows' grid, in positions.
    """

    def __init__(self, channels: int, *, window: int = 7, shift: int = 0):
        super().__init__()
        self.window, self.shift = window, shift
        self.attention = WindowAttention(channels, channels // HEAD_WIDTH, window_size=window)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, *sides = x.shape
        padded = [-side // self.window * -self.window for side in sides]
        shifts = [self.shift if side > self.window else 0 for side in sides]
        tokens = F.pad(x, [0, padded[1] - sides[1], 0, padded[0] - sides[0]]).permute(0, 2, 3, 1)
        tokens = torch.roll(tokens, [-shift for shift in shifts], dims=(1, 2))
        windows = window_partition(tokens.contiguous(), (self.window, self.window)).flatten(1, 2)
        mask = None if padded == sides and not any(shifts) else self._mask(sides, padded, shifts, x)
        windows = self.attention(windows, mask).unflatten(1, (self.window, self.window))
        tokens = window_reverse(windows, (self.window, self.window), padded[0], padded[1])
        tokens = torch.roll(tokens.view(batch, *padded, -1), shifts, dims=(1, 2))
        return tokens[:, : sides[0], : sides[1]].permute(0, 3, 1, 2)

    def _mask(self, sides: list[int], padded: list[int], shifts: list[int], like: Tensor) -> Tensor:
        """(windows, N, N): 0 for two tokens of one region, -inf else; a shifted grid cuts windows at the borders."""
        regions = []
        for side, whole, shift in zip(sides, padded, shifts, strict=True):
            position = (torch.arange(whole, device=like.device) + shift) % whole
            region = (position - shift).div(self.window, rounding_mode="floor") + 1
            regions.append(region.where(position < side, whole))  # padding is a region of its own
        grid = regions[0][:, None] * (padded[1] + 1) + regions[1][None, :]
        windows = window_partition(grid[None, :, :, None], (self.window, self.window)).flatten(1)
        apart = windows[:, :, None] != windows[:, None, :]
        return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, float("-inf"))


class NeighbourhoodAttention(nn.Module):
    """Attention of each position to the K x K window around it (NAT, arXiv:2204.07143). (B, C, H, W) -> same.

    The window is shifted at the borders to lie inside the map, as ContMix's. Exact, by a gather: keys and values take
    K^2 times the memory of the map.

    Args:
        channels: C.
        kernel_size: K.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7):
        super().__init__()
        self.heads, self.kernel_size = channels // HEAD_WIDTH, kernel_size
        self.scale = HEAD_WIDTH**-0.5
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1)
        self.rpb = nn.Parameter(torch.empty(self.heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        projected = self.qkv(x).unflatten(1, (3, self.heads, HEAD_WIDTH)).flatten(4).transpose(3, 4)
        query, key, value = projected.unbind(1)  # B, G, HW, D
        rows, row_offsets = self._window(height, x.device)
        columns, column_offsets = self._window(width, x.device)
        places = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # HW, Kh * Kw
        bias = self.rpb[:, row_offsets[:, None, :, None], column_offsets[None, :, None, :]].view(-1, *places.shape)
        logits = (_gather(key, places) @ (query * self.scale)[..., None]).squeeze(-1) + bias
        mixed = (logits.softmax(dim=-1)[..., None, :] @ _gather(value, places)).squeeze(-2)
        return self.proj(mixed.transpose(2, 3).reshape(batch, -1, height, width))

    def _window(self, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of each position the rows (or columns) of its window, and the places of their biases: (side, K)."""
        size = min(self.kernel_size, side)
        inside = window_starts(side, size, device)[:, None] + torch.arange(size, device=device)
        return inside, inside - torch.arange(side, device=device)[:, None] + self.kernel_size - 1


def _gather(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, G, N, D) at places (M, K^2) to (B, G, M, K^2, D).

    As rows of an embedding: its gradient is a sum of rows, where that of an index goes number by number.
    """
    batch, groups, count, width = tokens.shape
    first = torch.arange(batch * groups, device=tokens.device) * count
    rows = F.embedding(first[:, None, None] + places, tokens.reshape(-1, width))
    return rows.unflatten(0, (batch, groups))


class Outlook(nn.Module):
    """VOLO's outlook attention, timm's (arXiv:2106.13112): 3 x 3 weights of 3 x 3 values, made from the centre alone.

    (B, C, H, W) -> (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.attention = OutlookAttention(channels, channels // HEAD_WIDTH, kernel_size=3, padding=1, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
