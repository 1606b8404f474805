"""The table of what ``fuse`` does: each class of modules, its fused form, and the check that says why not.

``FOLDED`` is for any device: what is linear in evaluation goes into the convolution beside it, parts before wholes.
``ON_CPU`` is for float32 on CPU: stages, blocks and layers of our own kernels, wholes before parts, folded already.
``ON_CUDA`` is for CUDA, likewise: blocks and layers with kernels and products of our own between PyTorch's.

To fuse one more class, describe it in descriptions.py and add its row here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock
from overlock.blocks.dynamic_block import ContextUpdate
from overlock.fused import cuda_layers as cuda
from overlock.fused import descriptions
from overlock.fused.blocks import FusedBasicBlocks, FusedContMixBlock, FusedDynamicBlocks
from overlock.fused.conditions import TRITON_TYPES
from overlock.fused.layers import ConvStack, Depthwise, Pointwise
from overlock.fused.structure import Check
from overlock.layers import Aggregator, ConvFFN, ConvNorm, DilatedRepConv, LocalConv, NormConv
from overlock.layers.depthwise_conv import DepthwiseConv
from overlock.network.base_net import BlockStack, Stem
from overlock.network.focus_net import FocusStage
from overlock.network.heads import AuxiliaryHead


class Form(NamedTuple):
    """A row: modules of exactly this class become what ``make`` gives, where ``why_not`` has no objection."""

    of: type[nn.Module]
    make: Callable[[Any], nn.Module]
    why_not: Check


class Table(NamedTuple):
    """Rows, and what they are for.

    Attributes:
        forms: the rows.
        kinds: devices and types of the parameters that they are for, or None for all.
    """

    forms: tuple[Form, ...]
    kinds: frozenset[tuple[str, torch.dtype]] | None = None

    @property
    def parts_first(self) -> bool:
        """Whether a module takes its form after its parts; else a whole that has a form keeps its parts."""
        return self.kinds is None


FOLDED = Table(
    (
        Form(LocalConv, LocalConv.fold, descriptions.FOLDABLE_LOCAL_CONV),
        Form(ConvNorm, ConvNorm.fold, descriptions.FOLDABLE_CONV_NORM),
        Form(NormConv, NormConv.fold, descriptions.FOLDABLE_NORM_CONV),
        Form(DilatedRepConv, DilatedRepConv.fold, descriptions.FOLDABLE_REPCONV),
        Form(ConvFFN, ConvFFN.fold, descriptions.FOLDABLE_FFN),
        Form(ContextUpdate, ContextUpdate.fold, descriptions.FOLDABLE_UPDATE),
        Form(BasicBlock, BasicBlock.fold, descriptions.FOLDABLE_BASIC_BLOCK),
        Form(DynamicBlock, DynamicBlock.fold, descriptions.FOLDABLE_DYNAMIC_BLOCK),
        Form(ContMixBlock, ContMixBlock.fold, descriptions.FOLDABLE_CONTMIX_BLOCK),
        Form(AuxiliaryHead, AuxiliaryHead.fold, descriptions.FOLDABLE_AUXILIARY_HEAD),
    )
)

ON_CPU = Table(
    (
        Form(BlockStack, FusedBasicBlocks.of_stack, descriptions.BLOCK_STACK),
        Form(FocusStage, FusedDynamicBlocks.of_stage, descriptions.FOCUS_STAGE),
        Form(BasicBlock, FusedBasicBlocks.of_block, descriptions.BASIC_BLOCK),
        Form(DynamicBlock, FusedDynamicBlocks.of_block, descriptions.DYNAMIC_BLOCK),
        Form(ContMixBlock, FusedContMixBlock, descriptions.CONTMIX_BLOCK),
        Form(Stem, ConvStack, descriptions.STEM),
        Form(DepthwiseConv, Depthwise, descriptions.DEPTHWISE),
        Form(nn.Conv2d, Pointwise, descriptions.POINTWISE),
        Form(nn.Conv2d, ConvStack, descriptions.CONVOLUTION),
        Form(nn.Conv2d, Depthwise, descriptions.DEPTHWISE),
    ),
    frozenset({("cpu", torch.float32)}),
)

ON_CUDA = Table(
    (
        Form(BasicBlock, cuda.FusedBasicBlock, descriptions.BASIC_BLOCK),
        Form(DynamicBlock, cuda.FusedDynamicBlock, descriptions.DYNAMIC_BLOCK),
        Form(ContMixBlock, cuda.FusedContMixBlock, descriptions.CONTMIX_BLOCK),
        Form(ConvFFN, cuda.FusedConvFFN, descriptions.CONV_FFN),
        Form(Aggregator, cuda.FusedAggregator, descriptions.AGGREGATOR),
        Form(Stem, cuda.FusedStem, descriptions.STEM),
        Form(nn.Conv2d, cuda.PointwiseConv, descriptions.POINTWISE),
        Form(nn.Conv2d, cuda.BiasedConv, descriptions.CONVOLUTION),
    ),
    frozenset(("cuda", dtype) for dtype in TRITON_TYPES),
)
