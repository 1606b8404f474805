"""The module that had ``fuse`` in version 0.1."""

from __future__ import annotations

import importlib
import sys

import pytest

import overlock


def test_former_place_of_fuse():
    """It is there, and says where it has gone."""
    sys.modules.pop("overlock.fusion", None)
    with pytest.warns(DeprecationWarning, match="take overlock.fuse"):
        assert importlib.import_module("overlock.fusion").fuse is overlock.fuse
