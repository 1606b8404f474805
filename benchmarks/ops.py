"""ContMix's dynamic convolution: every backend that runs here, against unfold and a loop over shifts.

python benchmarks/ops.py [--shapes stage3_dense ...] [--repeats N] [--csv FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from timing import interleave, middle, report, spread
from torch import Tensor

from overlock.ops import BACKENDS, backend, contmix
from overlock.ops.reference import window_starts


class Shape(NamedTuple):
    batch: int
    groups: int
    depth: int
    channels: int
    height: int
    width: int
    kernel_size: int


# Focus-Net of OverLoCK-T: stages 3 and 4, large and small kernel, of a 224 x 224 and an 800 x 1280 image.
SHAPES = {
    "stage3_dense": Shape(1, 8, 16, 16, 50, 80, 13),
    "stage3_dense_small": Shape(1, 8, 16, 16, 50, 80, 5),
    "stage4_dense": Shape(1, 16, 16, 16, 25, 40, 7),
    "stage3": Shape(1, 8, 16, 16, 14, 14, 13),
    "stage3_small": Shape(1, 8, 16, 16, 14, 14, 5),
    "stage4": Shape(1, 16, 16, 16, 7, 7, 7),
    "stage3_batch8": Shape(8, 8, 16, 16, 14, 14, 13),
    "stage4_batch8": Shape(8, 16, 16, 16, 7, 7, 7),
}
REGIONS = 49


def make_inputs(shape: Shape, device: str) -> tuple[Tensor, ...]:
    """query, key, value, weight, bias, rpb with logits of a few units, as trained networks have them."""
    b, g, d, c, h, w, k = shape
    make = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make, device=device)

    query, key = normal(b, g, d, h, w) * d**-0.5, normal(b, g, d, REGIONS)
    weight = normal(k * k, REGIONS) * REGIONS**-0.5
    return query, key, normal(b, g, c, h, w), weight, normal(k * k), normal(g, 2 * k - 1, 2 * k - 1)


def make_kernels(query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor, k: int) -> Tensor:
    """The stored form: kernels (B, G, H, W, K, K) in memory, as the two comparisons below need them."""
    height, width = query.shape[3:]
    logits = torch.einsum("bgdhw,bgds->bghws", query, key) @ weight.t() + bias
    rows, columns = (window_starts(n, k)[:, None] + torch.arange(k) for n in (height, width))
    rows = (rows - torch.arange(height)[:, None] + k - 1).to(query.device)
    columns = (columns - torch.arange(width)[:, None] + k - 1).to(query.device)
    logits = logits + rpb[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3)
    return logits.softmax(dim=-1).unflatten(-1, (k, k))


def by_unfold(kernels: Tensor, value: Tensor) -> Tensor:
    """Weighted sum with every window copied out: the form that the authors' code falls back to."""
    k = kernels.shape[-1]
    windows = value.unfold(3, k, 1).unfold(4, k, 1)  # B, G, C, H-K+1, W-K+1, K, K
    rows, columns = (window_starts(n, k, value.device) for n in value.shape[3:])
    windows = windows[:, :, :, rows][:, :, :, :, columns].flatten(5)
    return torch.einsum("bghwn,bgchwn->bgchw", kernels.flatten(4), windows)


def by_shifts(kernels: Tensor, value: Tensor) -> Tensor:
    """Weighted sum as K^2 multiply-adds of shifted maps."""
    k = kernels.shape[-1]
    rows, columns = (window_starts(n, k, value.device) for n in value.shape[3:])
    out = torch.zeros_like(value)
    for i in range(k):
        stripe = value[:, :, :, rows + i]
        for j in range(k):
            out.addcmul_(kernels[:, :, None, :, :, i, j], stripe[:, :, :, :, columns + j])
    return out


def peak_extra_memory(run: Callable[[], object], device: str) -> float:
    """MiB that a call needs beyond its inputs."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    sizes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sizes:
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def main(shapes: list[str] | None = None, repeats: int = 20, csv: str | None = None, device: str = "cpu") -> None:
    """Time the operation and print medians.

    Args:
        shapes: names of shapes, all by default.
        repeats: interleaved calls of each candidate.
        csv: file for the table.
        device: cpu or cuda.
    """
    rows: list[dict[str, object]] = []
    for name in shapes or SHAPES:
        shape = SHAPES[name]
        inputs = make_inputs(shape, device)
        query, key, value, weight, bias, rpb = inputs
        k = shape.kernel_size
        kernels = make_kernels(query, key, weight, bias, rpb, k)
        stored = (query, key, weight, bias, rpb, k)
        candidates: dict[str, Callable[[], object]] = {
            "unfold, sum alone": lambda kernels=kernels, value=value: by_unfold(kernels, value),
            "shifts, sum alone": lambda kernels=kernels, value=value: by_shifts(kernels, value),
            "unfold": lambda s=stored, value=value: by_unfold(make_kernels(*s), value),
            "shifts": lambda s=stored, value=value: by_shifts(make_kernels(*s), value),
        }
        for option, implementation in BACKENDS.items():
            if option != "reference" and implementation.why_not(*inputs, k, k) is None:
                candidates[option] = _with_backend(option, inputs, k)
        with torch.inference_mode():
            seconds = interleave(candidates, repeats=repeats)
            slowest = middle(seconds["unfold"])
            for candidate, times in seconds.items():
                rows.append(
                    {
                        "shape": name,
                        "candidate": candidate,
                        "ms": middle(times),
                        "spread, %": spread(times),
                        "times faster than unfold": slowest / middle(times),
                        "extra memory, MiB": peak_extra_memory(candidates[candidate], device),
                    }
                )
    report("ContMix's dynamic convolution, float32, whole operation unless said", rows, csv)


def _with_backend(name: str, inputs: tuple[Tensor, ...], kernel_size: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with backend(name):
            return contmix(*inputs, kernel_size)

    return run


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
