"""The inference form: everything that is linear in evaluation folded into the convolutions beside it."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def fuse(model: Module) -> Module:
    """An inference copy of a model, or of any part of one, with fewer and cheaper layers and the same outputs.

    Dilated RepConvs are merged; batch norms, residual depthwise convolutions, layer scales and the response norms'
    biases are folded into convolutions. Works in any dtype and on any device; ``model`` stays as it is.

    Each layer that can be simplified has a ``fold`` method that returns its simpler form; parts fold before wholes.

    Returns:
        The copy, in evaluation mode, its parameters frozen.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    return _fold(copied)  # type: ignore[return-value]


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        folded = _fold(child)
        if folded is not child:
            setattr(module, name, folded)
    fold = getattr(module, "fold", None)
    return module if fold is None else fold().eval().requires_grad_(False)
