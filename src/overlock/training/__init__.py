"""Training on Lightning: configuration, task module, run."""

from overlock.training.config import TrainConfig

__all__ = ["TrainConfig"]
