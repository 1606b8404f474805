"""Everything that is to be measured on a GPU, by one command: tables on the screen, a CSV file of each in a folder.

    python benchmarks/gpu.py [--folder docs]

In bfloat16: ContMix by all backends beside the compiled *torch* one and FlexAttention, forward and backward; the large
depthwise convolutions; inference and training step of OverLoCK-T beside ConvNeXt-T; and the memory of a training step
on an 800 x 1280 image by our kernels and by the *torch* backend. A measurement that fails is named, and the next one
taken.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import depthwise
import models
import ops
import torch
from jsonargparse import auto_cli
from timing import leave_out

PAIR = ["overlock_t", "convnext_tiny"]


def main(folder: str = "docs", repeats: int = 20, batch_size: int = 128) -> None:
    """Take all measurements.

    Args:
        folder: for the CSV files; their names have the date.
        repeats: interleaved calls of each candidate.
        batch_size: images of 224 x 224 in inference and in a training step.
    """
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; the other files of benchmarks/ run on CPU too")
    Path(folder).mkdir(parents=True, exist_ok=True)
    on_gpu = partial(partial, device="cuda", dtype="bfloat16", repeats=repeats)
    compiled = partial(on_gpu, models.main, form="compiled")
    measurements: dict[str, Callable[..., None]] = {
        "ops": on_gpu(ops.main, backward=True, compiled=True),
        "depthwise": on_gpu(depthwise.main, batch=64),
        "inference": compiled(models=PAIR, batch_sizes=[batch_size]),
        "training_step": compiled(models=PAIR, batch_sizes=[batch_size], mode="train"),
        "training_memory": on_gpu(
            models.main, models=PAIR[:1], sizes=[(800, 1280)], mode="train", features=True, backends=["auto", "torch"]
        ),
    }
    date = datetime.now(timezone.utc).date()
    for name, measure in measurements.items():
        try:
            measure(csv=f"{folder}/gpu_{name}_{date}.csv")
        except (RuntimeError, ValueError) as error:
            leave_out(name, str(error).strip().partition("\n")[0])
        torch.cuda.empty_cache()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
