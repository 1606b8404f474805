"""Arguments of constructors, refused in one sentence where they cannot be meant."""

from __future__ import annotations

from numbers import Integral

from timm.layers import DropPath
from torch import nn


def check_count(name: str, count: object, least: int = 1) -> None:
    """That an argument is a whole number, and not too small.

    Raises:
        ValueError: where it is not.
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {count!r}")


def check_rate(name: str, rate: float) -> None:
    """That what is dropped at some rate is not dropped always.

    Raises:
        ValueError: where it is, and for what is no rate.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {rate!r}")


def make_drop_path(rate: float) -> nn.Module:
    """Stochastic depth of a branch."""
    check_rate("drop_path", rate)
    return DropPath(rate) if rate > 0 else nn.Identity()
