"""Networks and exported files timed in turns: latency, images a second, memory and start-up."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overlock.checkpoints import Record
from overlock.deploy.models import Source, is_file, load_network, load_untrained
from overlock.deploy.runtime import choose_device, inference_copy
from overlock.export.runtimes import ExportedNetwork
from overlock.export.timing import interleave
from overlock.figures import encode_figure, new_figure
from overlock.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured of a network."""

    name: str
    """Of the file or model."""
    runtime: str
    """'pytorch', or the format of a file."""
    precision: str
    batch: int
    p50_ms: float
    """Median latency of a batch."""
    p90_ms: float
    p99_ms: float
    images_per_second: float
    """At the median."""
    startup_s: float
    """From the name to the first result."""
    memory_mb: float
    """By which that made the process grow, in MB of resident memory."""
    top1: float | None = None
    """On labelled images, where some are given."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A network that is ready to be timed."""

    name: str
    record: Record
    module: nn.Module
    images: Tensor
    startup_s: float
    memory_mb: float

    @property
    def runtime(self) -> str:
        return self.module.spec.format if isinstance(self.module, ExportedNetwork) else "pytorch"

    @property
    def precision(self) -> str:
        return self.module.spec.precision if isinstance(self.module, ExportedNetwork) else "fp32"

    @property
    def source(self) -> Source:
        """What an evaluation takes: a file that is open already, else the name."""
        return self.module if isinstance(self.module, ExportedNetwork) else self.name


def open_contender(source: str, *, batch: int, image_size: tuple[int, int] | None = None) -> Contender:
    """Load a network, in its fastest form on the CPU, and give it a first batch of noise.

    Args:
        source: as :func:`overlock.deploy.models.load_network` takes it; a model of timm's without a file has the
            weights that its training starts from, which take as long.
        batch: images.
        image_size: height and width in pixels, the network's own unless given.

    Raises:
        ValueError: for what cannot be loaded, and for a batch or size that a file does not take.
    """
    memory, started = resident_memory(), time.perf_counter()
    network, record = _load(source)
    exported = isinstance(network, ExportedNetwork)
    size = image_size or (network.spec.image_size if exported else record.preprocessing["input_size"][1:])
    images = torch.randn(batch, record.channels, *size, generator=torch.Generator().manual_seed(0))
    if exported:
        network.spec.check_images(images.shape)
        if network.spec.with_preprocessing:
            images = (images.abs() * 64).clamp(max=255).to(torch.uint8)
    module = inference_copy(network, record, choose_device("cpu"))
    with torch.inference_mode():
        module(images)
    return Contender(
        name=source, record=record, module=module, images=images,
        startup_s=time.perf_counter() - started, memory_mb=max(0.0, resident_memory() - memory),
    )  # fmt: skip


def _load(source: str) -> tuple[Any, Record]:
    return load_network(source) if is_file(source) else load_untrained(source)


def resident_memory() -> float:
    """Of this process, in MB; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def take_turns(
    contenders: Sequence[Contender], rounds: int, track: Callable[[Iterable[int]], Iterable[int]] = iter
) -> list[Timing]:
    """Time all contenders, one batch of each a round.

    Args:
        contenders: at least one.
        rounds: batches of each.
        track: told of the rounds as they go.
    """
    seconds = interleave([functools.partial(one.module, one.images) for one in contenders], rounds, track)
    timings = []
    for one, own in zip(contenders, seconds, strict=True):
        p50, p90, p99 = (1e3 * float(x) for x in np.percentile(own, (50, 90, 99)))
        timings.append(
            Timing(
                name=one.name, runtime=one.runtime, precision=one.precision, batch=len(one.images),
                p50_ms=p50, p90_ms=p90, p99_ms=p99, images_per_second=1e3 * len(one.images) / p50,
                startup_s=one.startup_s, memory_mb=one.memory_mb,
            )
        )  # fmt: skip
    return timings


def draw_timings(timings: Sequence[Timing], path: Path) -> None:
    """Median latencies as bars, up to the 90th percentile as lines.

    Raises:
        ImportError: without matplotlib.
    """
    figure = new_figure(8, 1.2 + 0.4 * len(timings))
    axes = figure.subplots()
    places = range(len(timings))
    rise = [[0.0] * len(timings), [one.p90_ms - one.p50_ms for one in timings]]
    axes.barh(places, [one.p50_ms for one in timings], xerr=rise, capsize=3)
    axes.set_yticks(places, [f"{Path(one.name).name}\n{one.runtime}, {one.precision}" for one in timings])
    axes.invert_yaxis()
    axes.set_xlabel("latency of a batch, ms: median, and up to the 90th percentile")
    write_atomically(path, encode_figure(figure, path.suffix))
