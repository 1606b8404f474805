"""A module whose parameters are one tensor.

Each tensor costs Python, guards and dispatch some microseconds a call, with what a long kernel has left in the caches;
for the fifty of each block that came to 3 of XT's 165 ms at 512 x 512.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakIdKeyDictionary

from overlock.fused.conditions import is_watched
from overlock.fused.packing import pack, unpack

# Not attributes, since copies and files would hold them too.
_modules: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Packed(nn.Module):
    """A module in evaluation, its parameters and buffers held as one frozen parameter ``packed``.

    Args:
        module: is copied without its memory.
        tensors: all its parameters and buffers, in the order in which an operation takes them, None for what it lacks.
    """

    in_bf16 = False  # whether its operation rounds to bfloat16 what its products take

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor | None]):
        super().__init__()
        names = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
        given = [tensor for tensor in tensors if tensor is not None]
        self.names = [names.pop(id(tensor)) for tensor in given]
        if names:
            raise ValueError(f"an operation takes no {sorted(names.values())}, which the module holds")
        packed, self.layout = pack(tensors)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self._module = [_without_memory(module)]  # in a list, so that its parameters are not this module's

    def plain(self, *inputs: Tensor) -> Any:
        """What the module itself gives."""
        if torch.compiler.is_compiling():
            return functional_call(self._module[0], self._tensors(), inputs)
        if is_watched() or (self.packed.requires_grad and torch.is_grad_enabled()):
            return _module_of(self._module[0], self._tensors())(*inputs)
        return self._kept()(*inputs)

    def _tensors(self) -> dict[str, Tensor]:
        """Views of the packed one, by their names in the module."""
        tensors = [tensor for tensor in unpack(self.packed, self.layout) if tensor is not None]
        return dict(zip(self.names, tensors, strict=True))

    def _kept(self) -> nn.Module:
        """The module over the memory of the packed tensor, made anew when that moves."""
        key = self.packed.data_ptr(), self.packed.dtype
        known = _modules.get(self.packed)
        if known is None or known[0] != key:
            with torch.inference_mode(mode=False), torch.no_grad():
                known = _modules[self.packed] = key, _module_of(self._module[0], self._tensors())
        return known[1]

    def extra_repr(self) -> str:
        products = ", products in bfloat16" if self.in_bf16 else ""
        return f"{type(self._module[0]).__name__}, {self.packed.numel()} parameters{products}"


def _without_memory(module: nn.Module) -> nn.Module:
    """A copy on the device meta; the module itself may have other users."""
    named = (*module.named_parameters(), *module.named_buffers())
    return _module_of(module, {name: nn.Parameter(x.to("meta"), requires_grad=False) for name, x in named})


def _module_of(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
    """A copy of a module with other tensors in the places of its parameters and buffers, given by their names."""
    copied = copy.copy(module)
    for own in ("_parameters", "_buffers"):
        held = getattr(module, own)
        setattr(copied, own, {key: None if x is None else tensors[prefix + key] for key, x in held.items()})
    copied._modules = {
        key: None if part is None else _module_of(part, tensors, f"{prefix}{key}.")
        for key, part in module._modules.items()
    }
    return copied
