"""The paper's ablations as networks that can be trained: the roadmap of Table 6, and the token mixers of Table 7."""

from overlock.ablation.mixers import MIXERS
from overlock.ablation.models import add_mixer
from overlock.ablation.roadmap import ROADMAP, SIZES, Published, Row

__all__ = ["MIXERS", "ROADMAP", "SIZES", "Published", "Row", "add_mixer"]
