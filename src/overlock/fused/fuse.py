"""The inference form: what is linear in evaluation folded into the convolutions beside it, and the device's own layers.

On CPU, a block becomes one operation of our own kernels, over channels_last maps.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from overlock.fused.layers import cpu_form
from overlock.kernels.numba.contmix import numba_installed

Module = TypeVar("Module", bound=nn.Module)


def fuse(model: Module, *, kernels: bool = True) -> Module:
    """An inference copy of a model, or of any part of one, with fewer and cheaper layers and the same outputs.

    Dilated RepConvs are merged; batch norms, residual depthwise convolutions, layer scales and the response norms'
    biases are folded into convolutions. Then, where the model is in float32 on CPU and numba is installed, layers take
    the form that is fastest there. Works in any dtype and on any device; ``model`` stays as it is. Fuse on the device
    of use: the copy runs elsewhere too, slower.

    Each layer that can be simplified has a ``fold`` method that returns its simpler form, parts before wholes; one that
    has a form for the CPU has a ``for_cpu`` method, wholes before parts.

    Args:
        kernels: take the CPU's own layers. False leaves plain PyTorch ones, which TorchScript and fx trace too, and
            which export for any size of the image.

    Returns:
        The copy, in evaluation mode, its parameters frozen.
    """
    copied = _fold(copy.deepcopy(model).eval().requires_grad_(False))
    fits = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in copied.parameters())
    if kernels and fits and numba_installed():
        copied = _for_cpu(copied).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied  # type: ignore[return-value]


def _fold(module: nn.Module) -> nn.Module:
    """The module in its folded form, its children folded before it."""
    for name, child in module.named_children():
        form = _fold(child)
        if form is not child:
            setattr(module, name, form)
    fold = getattr(module, "fold", None)
    return module if fold is None else fold().eval().requires_grad_(False)


def _for_cpu(module: nn.Module) -> nn.Module:
    """The module in its form for the CPU, or else with its children in theirs."""
    make = getattr(module, "for_cpu", None)
    form = cpu_form(module) if make is None else make()
    if form is module:
        for name, child in module.named_children():
            setattr(module, name, _for_cpu(child))
    return form.eval()
