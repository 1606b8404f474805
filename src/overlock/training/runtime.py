"""Devices, processes and precision, through Lightning Fabric."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, TorchCheckpointIO
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from overlock.data.loaders import Share
from overlock.training.config import RunConfig, RuntimeConfig

MIXED: dict[str, Any] = dict(bf16="bf16-mixed", fp16="16-mixed")


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its path; reads one without running code in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with Path(path).open("wb") as file:  # whose errors say what is wrong, unlike those of torch's own writer
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


class Mixed(MixedPrecision):
    """Arithmetic in half precision; what the network is given stays as it is, since boxes need their digits."""

    def convert_input(self, data: Any) -> Any:
        return data


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees for its next step.

    What a step on a CPU frees, the system would take back and give again page by page, which took 6 to 39 % of the step
    (docs/training.md). For glibc alone; elsewhere nothing happens.
    """
    no_separate_blocks, nothing_returned = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return
    for setting in (no_separate_blocks, nothing_returned):
        adjust(*setting)


def make_fabric(config: RuntimeConfig) -> Fabric:
    """Lightning's Fabric for the devices that the settings, torchrun or SLURM name.

    Raises:
        ValueError: for devices that are not there.
    """
    cuda = config.accelerator == "cuda" or (config.accelerator == "auto" and torch.cuda.is_available())
    devices, nodes = count_processes(config)
    if cuda and devices > torch.cuda.device_count():
        raise ValueError(f"runtime.devices is {devices}, but this machine has {torch.cuda.device_count()} GPUs")
    several = devices * nodes > 1
    strategy: Any = "auto"
    plugins: list[Any] = [CheckpointFile()]
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            shard, data_parallel_size=devices * nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        plugins = []  # it writes its own files
    elif several or config.strategy == "ddp":
        # Norms over all processes have the same statistics on each, so that none need be sent around.
        strategy = DDPStrategy(broadcast_buffers=not config.sync_bn, gradient_as_bucket_view=True)
    if config.precision != "fp32":
        mps = config.accelerator in ("auto", "mps") and torch.backends.mps.is_available()
        plugins.append(Mixed(MIXED[config.precision], device="cuda" if cuda else "mps" if mps else "cpu"))
    if SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ:
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        return Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy=strategy,
            precision="32-true" if config.precision == "fp32" else None,
            plugins=plugins,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"runtime: {' '.join(str(error).split())}") from None


def count_processes(config: RuntimeConfig) -> tuple[int, int]:
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
            raise ValueError(f"runtime.{name} is {given}, but the launcher has started {found}; leave it out")
    return devices, nodes


def make_share(fabric: Fabric, config: RunConfig) -> Share:
    """How a batch is cut for the processes and, on each, for forward passes.

    Raises:
        ValueError: for a batch that cannot be cut evenly, or mixing in odd parts.
    """
    world = fabric.world_size
    each, rest = divmod(config.batch_size, world)
    if rest:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared by {world} devices; choose a multiple")
    limit = min(config.runtime.micro_batch or each, each)
    accumulate = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= limit)
    micro_batch = each // accumulate
    if config.joins_pairs and micro_batch % 2:
        raise ValueError(
            f"mixup and cutmix join images by pairs, but one device takes {micro_batch} at a time; choose a batch_size "
            f"or runtime.micro_batch that makes it even"
        )
    return Share(rank=fabric.global_rank, world=world, micro_batch=micro_batch, accumulate=accumulate)


def shard(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the parameters over the processes, block by block; each block's are brought together while it runs."""
    for name, module in network.named_modules():
        if re.search(r"\bblocks\.\d+$", name):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return network


@contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """All parameters of a sharded network on each process, so that each can pass as many batches through it as it has.

    A network that is not sharded stays as it is.
    """
    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not network, recurse=False)
            module.reshard()


def full_state(network: nn.Module) -> dict[str, Any]:
    """The weights on the CPU; of a sharded network only on the first process, and empty on the others."""
    if isinstance(network, FSDPModule):
        return get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
