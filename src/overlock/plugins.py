"""What the package adds to PyTorch and to timm, as soon as a program has them and no sooner.

Programs that ask for nothing but a name need it too: ``timm.create_model`` of a variant, and ``torch.export.load`` or
``torch.jit.load`` of a graph with the package's operators.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from wrapt import register_post_import_hook

BELOW_MODELS = tuple(f"overlock.{name}" for name in ("layers", "blocks", "network", "weights", "tasks", "ablation"))
"""What the models are made of. It imports timm itself, and must be whole before they can be registered."""


def install() -> None:
    """Add it now to what is imported already, and else right after the import."""
    register_post_import_hook(_define_operators, "torch")
    for name in ("timm", *BELOW_MODELS):
        register_post_import_hook(_register_models, name)


def _define_operators(_: ModuleType) -> None:
    """Define ``torch.ops.overlock``; without timm, since timm's own import is often what brings PyTorch in.

    Not while a module that the operators are made of is imported, the first of a program to bring PyTorch in: it must
    be whole before. Then the operators come with timm, or with what imports them.
    """
    made_of = [
        module for name, module in sys.modules.items() if name.startswith(("overlock.kernels.", "overlock.fused."))
    ]
    if not any(map(_is_under_way, made_of)):
        for name in (
            "overlock.ops",
            "overlock.fused.layer_operators",
            "overlock.fused.stage_operators",
            "overlock.fused.cuda_operators",
        ):
            importlib.import_module(name)


def _register_models(imported: ModuleType) -> None:
    """Register the variants, and the rows of the ablations, as soon as timm is imported.

    Not while an import of what they are made of is under way.
    """
    others = [
        sys.modules[name] for name in ("timm", *BELOW_MODELS) if name in sys.modules and name != imported.__name__
    ]
    if "timm" in sys.modules and not any(map(_is_under_way, others)):
        for name in ("overlock.tasks.classification", "overlock.ablation.models"):
            importlib.import_module(name)
        _define_operators(imported)


def _is_under_way(module: ModuleType) -> bool:
    """Whether the import of a module has begun and not ended."""
    return bool(getattr(module.__spec__, "_initializing", False))
