"""What the package adds to PyTorch and to timm, as soon as a program has them and no sooner.

Programs that ask for nothing but a name need it too: ``timm.create_model`` of a variant, and ``torch.export.load`` or
``torch.jit.load`` of a graph with the package's operators.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from wrapt import register_post_import_hook


def install() -> None:
    """Add it now to what is imported already, and else right after the import."""
    register_post_import_hook(_define_operators, "torch")
    register_post_import_hook(_register_models, "timm")


def _define_operators(_: ModuleType) -> None:
    """Define ``torch.ops.overlock``; without timm, since timm's own import is often what brings PyTorch in."""
    for module in ("overlock.ops", "overlock.fused.layer_operators", "overlock.fused.stage_operators"):
        importlib.import_module(module)


def _register_models(_: ModuleType) -> None:
    importlib.import_module("overlock.tasks.classification")
