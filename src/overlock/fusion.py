"""The former place of :func:`overlock.fuse`."""

import warnings

from overlock.fused.fuse import fuse

__all__ = ["fuse"]

warnings.warn(
    "overlock.fusion is now overlock.fused.fuse; take overlock.fuse", DeprecationWarning, stacklevel=2
)  # fmt: skip
