"""The parameters of blocks as the operations take them: weight and bias of each layer, in a fixed order.

Graphs that are exported hold the parameters in this order, so it must not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Parameters(NamedTuple):
    """Of a layer; None is what it has not, both where a block lacks the layer."""

    weight: Tensor | None
    bias: Tensor | None

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Of a layer that is there; zeros stand for a bias that is not."""
        if self.weight is None:
            raise ValueError("the block lacks this layer")
        return self.weight, self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias


class BasicParameters(NamedTuple):
    """Those of a folded basic block."""

    local: Parameters
    norm: Parameters
    large: Parameters
    reduce: Parameters
    excite: Parameters
    expand: Parameters
    hidden: Parameters
    response: Parameters
    project: Parameters
    residual: Parameters


class MixerParameters(NamedTuple):
    """Those of a folded mixer block, which may lack the context's update, the fusion and the value."""

    alpha: Parameters
    beta: Parameters
    local1: Parameters
    norm1: Parameters
    fusion: Parameters
    fusion_project: Parameters
    fusion_norm: Parameters
    query: Parameters
    key: Parameters
    value: Parameters
    kernels: Parameters
    out: Parameters
    large: Parameters
    reduce: Parameters
    excite: Parameters
    gate: Parameters
    project: Parameters
    residual1: Parameters
    local2: Parameters
    norm2: Parameters
    expand: Parameters
    hidden: Parameters
    response: Parameters
    ffn_project: Parameters
    residual2: Parameters
    position_biases: Parameters  # not of a layer: the tables of the small and of the large kernel


def parameters_of(module: nn.Module, path: str) -> Parameters:
    """Those of a part of a module, which may be absent."""
    part: object = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return Parameters(getattr(part, "weight", None), getattr(part, "bias", None))


def in_order(layers: Iterable[Parameters]) -> list[Tensor | None]:
    """Weights and biases one after another."""
    return [tensor for layer in layers for tensor in layer]


def by_layer(tensors: list[Tensor | None]) -> Iterator[Parameters]:
    """The inverse of :func:`in_order`."""
    return map(Parameters, tensors[::2], tensors[1::2])
