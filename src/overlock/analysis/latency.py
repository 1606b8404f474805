"""How long networks take, in turns, so that a slow spell of the machine meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
CALLS = 3
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a call, over the rounds."""

    milliseconds: float
    """Median."""
    spread: float
    """Distance of the quartiles over the median, in percent."""


def take_turns(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, *, rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[Key, Timing]:  # fmt: skip
    """Time calls that take turns.

    Args:
        calls: without arguments.
        device: that they compute on.
        rounds: in each, every call has one turn: once for nothing, since the other runtimes' threads may still spin
            and the caches hold another network, then three times, of which the median counts.
        tick: called after each turn.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[key].append(_turn(call, device))
            tick()
    return {key: summarise(times) for key, times in seconds.items()}


def _turn(call: Callable[[], object], device: torch.device) -> float:
    call()
    times = []
    for _ in range(CALLS):
        _synchronise(device)
        started = time.perf_counter()
        call()
        _synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(seconds: Sequence[float]) -> Timing:
    """The timing of a call that took these seconds."""
    middle = statistics.median(seconds)
    first, _, third = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (middle, middle, middle)
    return Timing(milliseconds=1e3 * middle, spread=100 * (third - first) / middle)


def deviation_of(logits: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference value; infinite for other shapes and for what is no number."""
    if logits.shape != reference.shape or not logits.isfinite().all():
        return float("inf")
    return float((logits.float() - reference).abs().max() / reference.abs().max())


def describe_machine(device: torch.device) -> str:
    """What the figures belong to."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU with {capability}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
