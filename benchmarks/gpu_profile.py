"""Where a network's time goes on a GPU: its kernels by name, in inference and in a training step."""

from __future__ import annotations

from collections.abc import Iterator

import models
import torch
from gpu_networks import DRY_PAIRS, PAIRS
from gpu_run import Row, Run
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROWS, CALLS = 40, 3


def kernels(run: Run) -> Iterator[Row]:
    """The kernels that take the most, of ours and of ConvNeXt, at a batch of 128 in bfloat16."""
    pair, size = (DRY_PAIRS[0], (1, 3, 32, 32)) if run.dry else (PAIRS[0], (128, 3, 224, 224))
    for train in (False, True):
        for name in pair:
            with run.attempt(f"profile of {name}, train {train}"):
                yield from _profile(run, name, size, train)


def _profile(run: Run, name: str, size: tuple[int, ...], train: bool) -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    dtype = torch.float32 if train else torch.bfloat16
    images = torch.randn(size, device=run.device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    network = models.build(
        name, "torch" if run.dry else "auto", train=train, features=False, fused=not run.dry, device=run.device,
        dtype=torch.bfloat16, layout=torch.channels_last,
    )  # fmt: skip
    call = models.make_call(network, "eager", images, train=train, features=False, dtype=torch.bfloat16)
    for _ in range(1 if run.dry else 3):
        call()
    kinds = [ProfilerActivity.CPU] if run.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as found:
        for _ in range(CALLS):
            call()
        if not run.dry:
            torch.cuda.synchronize()
    wanted = DeviceType.CPU if run.dry else DeviceType.CUDA
    events = [event for event in found.key_averages() if event.device_type == wanted]
    taken = {event.key: event.self_cpu_time_total if run.dry else event.self_device_time_total for event in events}
    total = sum(taken.values()) or 1.0
    common = dict(model=name, train=train)
    yield common | dict(kernel="all", calls=sum(e.count for e in events) / CALLS, ms=total / 1e3 / CALLS, share=100.0)
    for event in sorted(events, key=lambda event: -taken[event.key])[:ROWS]:
        yield common | dict(
            kernel=event.key[:120], calls=event.count / CALLS, ms=taken[event.key] / 1e3 / CALLS,
            share=100 * taken[event.key] / total,
        )  # fmt: skip
