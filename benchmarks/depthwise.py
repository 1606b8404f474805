"""The large depthwise convolution by shape: our kernels against PyTorch's.

python benchmarks/depthwise.py [--shapes '[stage1,stage2]'] [--csv FILE]
python benchmarks/depthwise.py --device cuda --dtype bfloat16 --batch 64

Ours are Triton's on CUDA, where PyTorch's are cuDNN's, and numba's on CPU, where PyTorch's are oneDNN's.

Forward and the two gradients apart, as overlock.ops.depthwise chooses them. Results are compared before the timing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from timing import interleave, leave_out, middle, report, spread
from torch import Tensor

from overlock.ops.depthwise import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from overlock.ops.dispatch import TABLE, why_not

PARTS = {"forward": FORWARD, "input": INPUT_GRADIENT, "weight": WEIGHT_GRADIENT}

# (B, C, H, W) and K in OverLoCK-T: a batch (its size is an option) of 224 x 224 images, and one of 800 x 1280.
SHAPES = {
    "stage1": ((0, 64, 56, 56), 17),
    "stage2": ((0, 128, 28, 28), 15),
    "stage3": ((0, 256, 14, 14), 13),
    "stage4": ((0, 512, 7, 7), 7),
    "stage1_dense": ((1, 64, 200, 320), 17),
    "stage2_dense": ((1, 128, 100, 160), 15),
    "stage3_dense": ((1, 256, 50, 80), 13),
    "stage4_dense": ((1, 512, 25, 40), 7),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


def make_calls(
    part: str, shape: tuple[int, ...], size: int, device: str, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Callable[[], Tensor]]:
    """A call of each implementation that can run here."""
    make = torch.Generator(device=device).manual_seed(0)
    x, grad = (torch.randn(shape, generator=make, device=device).to(dtype, memory_format=layout) for _ in range(2))
    weight = (torch.randn(shape[1], 1, size, size, generator=make, device=device) / size).to(dtype)
    arguments = (x, weight, None) if part == "forward" else (grad, x, weight)
    name = "cpu" if device == "cpu" else "triton"
    ours, pytorch = (functools.partial(TABLE[PARTS[part]][key].forward, *arguments, 1) for key in (name, "torch"))
    reason = why_not(PARTS[part], name, *arguments, 1)
    if reason:
        leave_out("ours", reason)
        return {"PyTorch": pytorch}
    expected = pytorch().float()
    error = float((ours().float() - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        raise AssertionError(f"our {part} of {shape}, K {size}, is {error:.1e} from PyTorch's")
    return {"ours": ours, "PyTorch": pytorch}


def main(
    shapes: list[str] | None = None,
    repeats: int = 20,
    csv: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch: int = 8,
    channels_last: bool = True,
) -> None:
    """Time each part of the work and print medians.

    Args:
        shapes: names of shapes, all by default.
        repeats: interleaved calls of each implementation.
        csv: file for the table.
        device: cpu or cuda.
        dtype: of images and weights; on CPU float32.
        batch: images of 224 x 224.
        channels_last: memory layout of the images; contiguous otherwise.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rows: list[dict[str, object]] = []
    for name in shapes or SHAPES:
        (images, *rest), size = SHAPES[name]
        shape = (images or batch, *rest)
        for part in PARTS:
            with torch.inference_mode():
                calls = make_calls(part, shape, size, device, getattr(torch, dtype), layout)
                seconds = interleave(calls, repeats=repeats)
            times = {key: middle(values) for key, values in seconds.items()}
            rows.append(
                {
                    "shape": name,
                    "B x C x H x W": " x ".join(str(n) for n in shape),
                    "K": size,
                    "part": part,
                    **{f"{key}, ms": times.get(key, "") for key in ("ours", "PyTorch")},
                    "PyTorch over ours": times["PyTorch"] / times["ours"] if "ours" in times else "",
                    "largest spread, %": max(spread(values) for values in seconds.values()),
                }
            )
    report(f"Large depthwise convolution, {dtype}, {'channels last' if channels_last else 'contiguous'}", rows, csv)


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, so that others need not have it

    auto_cli(main, as_positional=False)
