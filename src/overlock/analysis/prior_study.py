"""What the top-down path contributes: the network with its own context prior and with others, over many images."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from overlock.analysis.dynamic_kernels import (
    Mixing,
    Replace,
    compare,
    kept_prior,
    other_prior,
    record_mixing,
    relative_change,
    replaced_prior,
    uniform_prior,
    zero_prior,
)
from overlock.network import OverLoCK

OUTPUT = "output"
"""The row of the network's own output, after those of the blocks."""


class PriorStudy:
    """Changes of kernels, affinities and output, image by image in constant memory.

    The prior is replaced by zeros, by its own mean at every place (uniform), and by that of the image before (other).

    Args:
        overlock: the network whose prior is replaced.
        call: images (B, C, H, W) to logits (B, N), or to a list of features; it itself, or what it is in.
    """

    def __init__(self, overlock: OverLoCK, call: nn.Module):
        self.overlock, self.call = overlock, call
        self.before: Tensor | None = None
        self.seen: dict[tuple[str, str, str], list[float]] = defaultdict(list)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Study an image (1, C, H, W)."""
        outputs: list[Tensor] = []

        def call() -> None:
            result = self.call(x)
            outputs.append(result if isinstance(result, Tensor) else list(result)[-1])

        with kept_prior(self.overlock) as priors:
            own = record_mixing(self.overlock, call)
        replacements = self.replacements()
        self.before = priors[0]
        for name, replace in replacements.items():
            with replaced_prior(self.overlock, replace):
                changed = record_mixing(self.overlock, call)
            self._note(name, own, changed, outputs[0], outputs.pop())

    def replacements(self) -> dict[str, Replace]:
        """What the prior is replaced by: the last of them, if an image has been studied, is that one's."""
        other = {} if self.before is None else {"other image's": other_prior(self.before)}
        return dict(zeros=zero_prior, uniform=uniform_prior, **other)

    def _note(self, name: str, own: list[Mixing], changed: list[Mixing], output: Tensor, other: Tensor) -> None:
        for first, second in zip(own, changed, strict=True):
            change = compare(first, second)
            self.seen[name, first.name, "kernels"].append(change.kernels)
            self.seen[name, first.name, "affinity"].append(change.affinity)
        self.seen[name, OUTPUT, "features"].append(relative_change(output, other))
        if output.dim() == 2:
            self.seen[name, OUTPUT, "same_class"].append(float(output.argmax() == other.argmax()))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each measure of each replacement and block: mean and deviation over the images."""
        return [
            dict(
                prior=prior, where=where, measure=measure, mean=sum(values) / len(values), deviation=_deviation(values),
                images=len(values),
            )
            for (prior, where, measure), values in self.seen.items()
        ]  # fmt: skip


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
