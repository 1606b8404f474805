"""The steps of benchmarks/gpu.py, which starts this file in a process of its own."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gpu_correctness
import gpu_networks
import gpu_operators
import gpu_profile
import gpu_tiles
import gpu_training
import numpy
import timm
import torch
import triton
from gpu_run import Row, Run
from timing import interleave_queued, middle

import overlock

GIB = 2**30


def versions(run: Run) -> Iterator[Row]:
    """Libraries and card, and what the card gives to the simplest of work: the ceilings of all else."""
    yield dict(
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(), triton=triton.__version__, timm=timm.__version__,
        numpy=numpy.__version__, overlock=overlock.__version__,
    )  # fmt: skip
    if run.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        yield dict(
            card=card.name, capability=f"{card.major}.{card.minor}", multiprocessors=card.multi_processor_count,
            memory_gib=card.total_memory / GIB, cores=torch.get_num_threads(),
        )  # fmt: skip
    size, side = (2**16, 64) if run.dry else (GIB, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    matrices = {
        name: torch.randn(side, side, device=run.device).to(getattr(torch, name))
        for name in ("float32", "bfloat16", "float16")
    }
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    calls |= {name: lambda x=x: x @ x for name, x in matrices.items()}
    times = {name: middle(seconds) for name, seconds in interleave_queued(calls, repeats=5, calls=5).items()}
    yield dict(what="copy", unit="TB/s", value=2 * size / times["copy"] / 1e9)
    for name in matrices:
        yield dict(what=f"matrix product, {name}", unit="TFLOP/s", value=2 * side**3 / times[name] / 1e9)


STEPS: dict[str, Callable[[Run], Iterable[Row]]] = {
    "versions": versions,
    "correctness": gpu_correctness.correctness,
    "gradients": gpu_training.gradients,
    "finite": gpu_training.finite,
    "operators": gpu_operators.operators,
    "kernels": gpu_profile.kernels,
    "inference": gpu_networks.inference,
    "training": gpu_networks.training,
    "memory": gpu_networks.memory,
    "tiles": gpu_tiles.tiles,
    "cifar10": gpu_training.cifar10,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ends", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    logging.basicConfig()
    logging.getLogger("timing").setLevel(logging.DEBUG)  # which tells the tracebacks of what is left out
    run = Run(options.out, options.dry_run, options.jobs, options.data)
    if run.dry:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # a compilation on CPU would say nothing of one on a GPU
    for item in options.ends.split(","):
        name, _, end = item.partition("=")
        run.take(name, STEPS[name], float(end))


if __name__ == "__main__":
    main()
