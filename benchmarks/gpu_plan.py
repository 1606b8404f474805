"""What the process that watches over the steps of benchmarks/gpu.py shares with the one that takes them."""

from __future__ import annotations

import json
from pathlib import Path

# Seconds of each step where all have eight minutes; what one leaves is for those after it.
SHARES = {
    "versions": 10,
    "correctness": 75,
    "gradients": 25,
    "finite": 35,
    "operators": 75,
    "kernels": 20,
    "inference": 90,
    "training": 40,
    "memory": 20,
    "tiles": 40,
    "cifar10": 45,
}


def limits(steps: list[str], start: float, seconds: float) -> dict[str, float]:
    """When each step is to have ended."""
    total, passed, ends = sum(SHARES[name] for name in steps), 0, {}
    for name in steps:
        passed += SHARES[name]
        ends[name] = start + seconds * passed / total
    return ends


class Progress:
    """Which steps have begun and ended, in a file that outlives the process."""

    def __init__(self, folder: Path):
        self.path = folder / "progress.jsonl"

    def clear(self) -> None:
        self.path.write_text("")

    def note(self, step: str, state: str, why: str = "") -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([step, state, why]) + "\n")

    def _lines(self) -> list[tuple[str, str, str]]:
        return [tuple(json.loads(line)) for line in self.path.read_text().splitlines()]

    def current(self) -> str | None:
        """The step that has begun and not ended."""
        lines = self._lines()
        return lines[-1][0] if lines and lines[-1][1] == "begun" else None

    def ended(self) -> dict[str, tuple[str, str]]:
        """State of each step that is over, done, skipped, failed or lost, and why."""
        return {step: (state, why) for step, state, why in self._lines() if state != "begun"}
