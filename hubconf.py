"""``torch.hub``: ``torch.hub.load("path/to/overlock", "overlock_t", source="local", num_classes=10)``."""

import sys
from pathlib import Path

dependencies = ["numba", "safetensors", "timm", "torch", "torchvision", "wrapt"]

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # the package may not be installed

from overlock.tasks.classification import (  # noqa: E402
    overlock_atto,
    overlock_b,
    overlock_nano,
    overlock_s,
    overlock_t,
    overlock_xt,
)

__all__ = ["overlock_atto", "overlock_b", "overlock_nano", "overlock_s", "overlock_t", "overlock_xt"]
