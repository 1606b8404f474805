"""Which one of several processes this is, by the launchers that training takes: torchrun and SLURM's srun."""

from __future__ import annotations

import os
from typing import NamedTuple


class Process(NamedTuple):
    """One of those that share the work."""

    rank: int = 0
    """Its number, over all nodes."""
    world: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this node, which is that of its GPU."""


def this_process() -> Process:
    """As torchrun or srun says; alone without them."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return Process(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if "SLURM_STEP_NUM_TASKS" in environment:  # of srun alone: a script of sbatch is one process of no others
        return Process(*(int(environment[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID")))
    return Process()
