"""Devices, processes and precision, through Lightning Fabric."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from overlock.data.loaders import Share
from overlock.training.config import MachineConfig, TrainConfig

PRECISIONS = dict(fp32="32-true", bf16="bf16-mixed", fp16="16-mixed")


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint to its path and sees that it is on the disk; reads one without running code in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with Path(path).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


def make_fabric(config: MachineConfig) -> Fabric:
    """Lightning's Fabric for the devices that the settings, torchrun or SLURM name.

    Raises:
        ValueError: for devices that are not there.
    """
    cuda = config.accelerator == "cuda" or (config.accelerator == "auto" and torch.cuda.is_available())
    devices, nodes = count_processes(config)
    if cuda and devices > torch.cuda.device_count():
        raise ValueError(f"machine.devices is {devices}, but this machine has {torch.cuda.device_count()} GPUs")
    several = devices * nodes > 1
    strategy: Any = "auto"
    if config.strategy == "fsdp":
        strategy = FSDPStrategy(state_dict_type="full", sharding_strategy="FULL_SHARD")
    elif several or config.strategy == "ddp":
        # Norms over all processes have the same statistics on each, so that none need be sent around.
        strategy = DDPStrategy(broadcast_buffers=not config.sync_norm, gradient_as_bucket_view=True)
    plugins: list[Any] = [CheckpointFile()]
    precision: Any = PRECISIONS[config.precision]
    if config.precision == "fp16" and not cuda:
        # Fabric would take bfloat16 on a CPU without being asked.
        plugins.append(MixedPrecision("16-mixed", device="cpu"))
        precision = None
    if SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ:
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        return Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision=precision,
            plugins=plugins,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"machine: {' '.join(str(error).split())}") from None


def count_processes(config: MachineConfig) -> tuple[int, int]:
    """Devices a node and nodes: those of the settings, or else of torchrun, of SLURM, or one."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment["WORLD_SIZE"]) // devices
    elif SLURMEnvironment.detect():
        nodes = int(environment.get("SLURM_NNODES", 1))
        devices = int(environment["SLURM_NTASKS"]) // nodes
    else:
        return config.devices or 1, config.nodes or 1
    for name, given, found in (("devices", config.devices, devices), ("nodes", config.nodes, nodes)):
        if given not in (None, found):
            raise ValueError(f"machine.{name} is {given}, but the launcher has started {found}; leave it out")
    return devices, nodes


def make_share(fabric: Fabric, config: TrainConfig) -> Share:
    """How a batch is cut for the processes and, on each, for forward passes.

    Raises:
        ValueError: for a batch that cannot be cut evenly, or mixing in odd parts.
    """
    world = fabric.world_size
    each, rest = divmod(config.batch_size, world)
    if rest:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {world} devices; choose a multiple")
    limit = min(config.machine.micro_batch or each, each)
    accumulate = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= limit)
    micro_batch = each // accumulate
    if config.loss.mixes and micro_batch % 2:
        raise ValueError(
            f"mixup and cutmix join images by pairs, but one device takes {micro_batch} at a time; choose a batch_size "
            f"or machine.micro_batch that makes it even"
        )
    return Share(rank=fabric.global_rank, world=world, micro_batch=micro_batch, accumulate=accumulate)


def full_state(network: nn.Module, *, sharded: bool) -> dict[str, Any]:
    """The weights of a network that may be spread over devices, on the CPU; empty but on the first process if so."""
    if not sharded:
        return {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # noqa: PLC0415

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options)
