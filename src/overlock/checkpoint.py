"""The former name of :mod:`overlock.checkpoints`."""

from overlock.checkpoints import *  # noqa: F403
from overlock.checkpoints import __all__  # noqa: F401
