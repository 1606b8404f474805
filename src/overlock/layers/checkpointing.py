"""Activations computed again in the backward pass, in which batch norms do not count the same batch again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from timm.models import checkpoint
from torch import nn


def checkpoint_block(block: nn.Module, *inputs: Any) -> Any:
    """Call a block that keeps its inputs alone for the backward pass, in which it runs a second time.

    With PyTorch's function alone, that second time moves running statistics once more. A graph of ``torch.compile``
    computes anew just what gradients need, so that nothing is to be done there.
    """
    if torch.compiler.is_compiling():
        return checkpoint(block, *inputs)
    ran = False

    def run(*inputs: Any) -> Any:
        nonlocal ran
        with _restored_buffers(block) if ran else contextlib.nullcontext():
            ran = True
            return block(*inputs)

    return checkpoint(run, *inputs)


@contextlib.contextmanager
def _restored_buffers(module: nn.Module) -> Iterator[None]:
    """Leave the buffers as they were, whatever a call does to them.

    A norm that were told to keep them would save other tensors for its gradients than at the first time.
    """
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)  # as data: autograd, which saves the buffers too, sees no change
