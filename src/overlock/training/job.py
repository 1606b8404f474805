"""What a run is about: the part of it that differs from task to task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from overlock.checkpoints import Record
from overlock.data import ImageData
from overlock.data.loaders import Join, Prepare, stack
from overlock.training.trainer import Task


@dataclass(frozen=True, kw_only=True)
class Job:
    """Data, network and task of a run."""

    task: Task
    """The loss and the measures."""
    data: ImageData
    """To learn from and to test on."""
    network: nn.Module
    """On the CPU, its initial weights drawn or loaded."""
    record: Record
    """What goes with the weights."""
    prepare_train: Prepare
    """Of images and labels to learn from."""
    prepare_test: Prepare
    """Of those to test on."""
    join_train: Join = stack
    """Of a batch to learn from."""
    join_test: Join = stack
    """Of a batch to test on."""
    test_batch: int | None = None
    """Images of a batch to test on; twice those of a forward pass in training unless given."""
    repeats: int = 1
    """Versions of each image in an epoch."""
    only_training: tuple[str, ...] = ()
    """Beginnings of the names of weights that are of no use after training."""
    finish: Callable[[Path, nn.Module], None]
    """Write what else the run's folder is for, given it and the network."""
