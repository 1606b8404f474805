"""Training on Lightning Fabric: configuration, recipes, the loop, the run."""

from overlock.training.config import TrainConfig
from overlock.training.recipes import RECIPES

__all__ = ["RECIPES", "TrainConfig"]
