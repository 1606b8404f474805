"""The device that a network runs on, its form there, and the precision of its arithmetic."""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import nn

from overlock.checkpoints import Record
from overlock.export.runtimes import ExportedNetwork
from overlock.fused.fuse import fuse
from overlock.network import VARIANTS

Precision = Literal["fp32", "bf16", "fp16"]
_TYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)


def choose_device(name: str | None = None) -> torch.device:
    """A device by its name; a GPU where there is one, unless named.

    Raises:
        ValueError: for a device that PyTorch does not know, or that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the second without CUDA
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"device {name!r} cannot be used ({reason}); cpu always can") from None
    return device


def autocast_to(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which a network computes in a precision.

    Raises:
        ValueError: for another precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be {', '.join(get_args(Precision))}, got {precision!r}")
    return torch.autocast(device.type, _TYPES.get(precision), enabled=precision != "fp32")


def not_finite(precision: Precision) -> ValueError:
    """The sentence for a network that gives infinities, or what is no number."""
    mend = "try --precision bf16 or fp32" if precision == "fp16" else "check its weights"
    return ValueError(f"the network's output is no finite number in {precision}; {mend}")


def inference_copy(network: nn.Module, record: Record, device: torch.device) -> nn.Module:
    """An inference copy of a network on a device: moved first and fused there, in the form that is fastest on it."""
    if isinstance(network, ExportedNetwork):
        return network
    if any(parameter.device != device for parameter in network.parameters()):
        network = copy.deepcopy(network).to(device)
    if record.head is None and record.model.partition(".")[0] not in VARIANTS:
        return network.eval()
    return fuse(network)
