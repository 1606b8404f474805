"""The two blocks of Figure 3."""

from overlock.blocks.basic_block import BasicBlock
from overlock.blocks.dynamic_block import ContMixBlock, DynamicBlock, MixerBlock

__all__ = ["BasicBlock", "ContMixBlock", "DynamicBlock", "MixerBlock"]
