"""Tile sizes of ContMix's and the depthwise convolution's Triton kernels, each timed by turns with the one in use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import depthwise
import ops
import torch
from gpu_run import Row, Run
from timing import interleave_queued, middle, ratio

from overlock.kernels.triton import contmix as mixing
from overlock.kernels.triton import contmix_tiles
from overlock.kernels.triton import depthwise as filtering
from overlock.kernels.triton.contmix_prepared import by_token

BATCH = 128
MIXES = {
    "stage3_batch128": ops.SHAPES["stage3"]._replace(batch=BATCH),
    "stage4_batch128": ops.SHAPES["stage4"]._replace(batch=BATCH),
    "stage3_small_batch128": ops.SHAPES["stage3_small"]._replace(batch=BATCH),
    "stage3_dense": ops.SHAPES["stage3_dense"],
}
FILTERS = {name: depthwise.SHAPES[name] for name in ("stage1", "stage2", "stage3", "stage4", "stage1_dense")}
DRY_MIXES = {"tiny": ops.Shape(1, 1, 4, 4, 3, 4, 3), "tiny_bands": ops.Shape(1, 1, 4, 4, 6, 6, 3)}
DRY_FILTERS = {"tiny": ((1, 2, 3, 4), 7)}

# What is tried of each kernel of ContMix: size, chunk, warps, stages.
MIX_CHOICES = {
    "bands forward": [(2, 4, 8), (0,), (1, 2, 4), (1, 2, 3)],
    "bands query": [(1, 2, 4), (0,), (1, 2, 4), (1, 2)],
    "bands value": [(2, 4), (16, 32, 64), (2, 4), (1,)],
    "bands taps": [(1, 2, 4), (0,), (1, 2, 4), (1,)],
    "windows forward": [(32, 64), (32, 64), (2, 4), (1, 2, 3)],
    "windows query": [(32, 64), (16, 32, 64), (2, 4), (1, 2)],
    "windows value": [(32, 64), (16, 32, 64), (2, 4), (1,)],
    "windows taps": [(32, 64), (16, 32), (2, 4), (1,)],
}
# Of the depthwise kernels: blocks, rows, columns, warps, stages.
FILTER_CHOICES = {
    "forward": [(16, 32, 64), (2, 4, 8), (4, 8, 16), (4, 8), (1, 2, 3)],
    "weight": [(16, 32), (2, 4), (8, 16), (4, 8), (1,)],
}


class Candidate(NamedTuple):
    """A kernel with a tile, on a shape. ``tile`` None is the one in use."""

    kernel: str
    shape: str
    tile: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"{self.kernel}, {self.shape}, {self.tile or 'in use'}"


# ---- ContMix --------------------------------------------------------------------------------------------------------


def lay_out(shape: ops.Shape, device: str, dtype: str) -> tuple[Any, dict[str, Callable[[], object]]]:
    """A call of ContMix, and its kernels by name, each a function without arguments."""
    query, key, weight, bias, rpb, value = ops.make_inputs(shape, device, dtype, layout="network")
    size = shape.kernel_size
    forward = mixing._lay_out(query, key, value, weight, bias, rpb, size, size, gradients=False)
    backward = mixing._lay_out(query, key, value, weight, bias, rpb, size, size, gradients=True)
    backward.start_backward(torch.ones_like(value))
    out, grad_query, grad_value = (by_token(torch.empty_like(x)) for x in (value, query, value))
    kind = "bands" if isinstance(forward, mixing.Bands) else "windows"
    return forward, {
        f"{kind} forward": lambda: forward.forward(out),
        f"{kind} query": lambda: backward.query_gradient(grad_query),
        f"{kind} value": lambda: backward.value_gradient(grad_value),
        f"{kind} taps": backward.tap_gradients,
    }


def mix_tiles(kernel: str) -> list[tuple[int, ...]]:
    """Tiles to try; only those that differ from the one in use in at most two sizes."""
    used = contmix_tiles.TILES[kernel]
    return [
        tile
        for tile in itertools.product(*MIX_CHOICES[kernel])
        if tile != tuple(used) and sum(a != b for a, b in zip(tile, used, strict=True)) <= 2
    ]


def _with_mix_tile(kernel: str, tile: tuple[int, ...], call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with contmix_tiles.use_tiles({kernel: contmix_tiles.Tile(*tile)}):
            return call()

    return run


def mix_calls(shape: ops.Shape, name: str, device: str, dtype: str) -> Iterator[tuple[Candidate, Callable[[], object]]]:
    """Kernels in the order in which they can run, each first with the tile in use."""
    _, calls = lay_out(shape, device, dtype)
    for kernel, call in calls.items():
        yield Candidate(kernel, name, None), call
        for tile in mix_tiles(kernel):
            yield Candidate(kernel, name, tile), _with_mix_tile(kernel, tile, call)


# ---- depthwise convolution ------------------------------------------------------------------------------------------


def filter_tiles(part: str, size: int, dtype: torch.dtype) -> list[tuple[int, ...]]:
    """Tiles to try: (blocks, rows, window, columns, warps, stages), of at most 64 sums a thread."""
    found, used = [], filtering.tile_for(size, dtype)
    for blocks, rows, columns, warps, stages in itertools.product(*FILTER_CHOICES[part]):
        window = max(16, filtering.triton.next_power_of_2(size + columns - 1))
        sums = 8 * (blocks if part == "forward" else window) * rows * columns // (32 * warps)
        tile = filtering.Tile(blocks, rows, window, columns, warps, stages)
        changes = sum(a != b for a, b in zip(tile, used, strict=True)) - (window != used.window)
        if 16 <= rows * columns <= 128 and window <= 32 and 16 <= sums <= 64 and 1 <= changes <= 2:
            found.append(tuple(tile))
    return found


def _with_filter_tile(tile: tuple[int, ...], call: Callable[[], object]) -> Callable[[], object]:
    chosen = filtering.Tile(*tile)

    def run() -> object:
        with patch.object(filtering, "tile_for", lambda *_: chosen):
            return call()

    return run


def filter_calls(
    given: tuple[int, ...], size: int, name: str, device: str, dtype: torch.dtype
) -> Iterator[tuple[Candidate, Callable[[], object]]]:
    """Forward, whose kernel the input's gradient is too, and the weight's gradient, each first with the tile in use."""
    shape = (given[0] or BATCH, *given[1:])
    x, grad = (
        torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last) for _ in range(2)
    )  # fmt: skip
    weight = (torch.randn(shape[1], 1, size, size, device=device) / size).to(dtype)
    calls = {
        "forward": lambda: filtering.convolve(x, weight),
        "weight": lambda: filtering.weight_gradient(grad, x, weight),
    }
    for part, call in calls.items():
        yield Candidate(f"depthwise {part}", name, None), call
        for tile in filter_tiles(part, size, dtype):
            yield Candidate(f"depthwise {part}", name, tile), _with_filter_tile(tile, call)


# ---- the step -------------------------------------------------------------------------------------------------------


def all_calls(device: str, dry: bool) -> Iterator[tuple[Candidate, Callable[[], object]]]:
    """Everything that is tried, in bfloat16."""
    for name, (given, size) in (DRY_FILTERS if dry else FILTERS).items():
        yield from filter_calls(given, size, name, device, torch.bfloat16)
    for name, shape in (DRY_MIXES if dry else MIXES).items():
        yield from mix_calls(shape, name, device, "bfloat16")


def tiles(run: Run) -> Iterator[Row]:
    """A row for each, best first of its kernel and shape."""
    by_kernel: dict[tuple[str, str], dict[str, Callable[[], object]]] = {}
    for candidate, call in all_calls(run.device, run.dry):
        group = by_kernel.setdefault((candidate.kernel, candidate.shape), {})
        if run.dry and len(group) >= 2:
            continue
        with run.attempt(str(candidate)), torch.no_grad():
            call()
            group[str(candidate.tile or "in use")] = call
    for (kernel, shape), calls in by_kernel.items():
        if not calls:
            continue  # each was told when it failed
        with run.attempt(f"{kernel}, {shape}"), torch.no_grad():
            seconds = interleave_queued(calls, repeats=2 if run.dry else 5, calls=3)
            used = next(iter(calls))
            for name in sorted(seconds, key=lambda name: middle(seconds[name])):
                yield dict(
                    kernel=kernel, shape=shape, tile=name, ms=middle(seconds[name]),
                    over_used=ratio(seconds[name], seconds[used]),
                )  # fmt: skip
