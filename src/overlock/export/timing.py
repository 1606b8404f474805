"""Calls timed in turns, so that a slow spell of the machine meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch

REST = 0.05  # seconds before each turn, in which the threads of the last runtime fall asleep; else they slow the next


def interleave(
    calls: Sequence[Callable[[], object]], rounds: int, track: Callable[[Iterable[int]], Iterable[int]] = iter
) -> list[list[float]]:
    """Seconds of each call in each round. In each turn it runs once for nothing, as in a stream of images.

    Args:
        calls: without arguments; they end when their work does.
        rounds: in each, every call has one turn.
        track: told of the rounds as they go.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for _ in track(range(rounds)):
            for call, own in zip(calls, seconds, strict=True):
                time.sleep(REST)
                call()
                started = time.perf_counter()
                call()
                own.append(time.perf_counter() - started)
    return seconds
