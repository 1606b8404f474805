"""The paper's ablations as networks that can be trained: the roadmap of Table 6."""

from overlock.ablation.roadmap import ROADMAP, SIZES, Published, Row

__all__ = ["ROADMAP", "SIZES", "Published", "Row"]
