"""Names of a package that are imported when they are first asked for (PEP 562): the package itself costs nothing.

A package keeps its imports under ``TYPE_CHECKING``, for type checkers and editors, and says here where each is found.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Getter = Callable[[str], Any]
Lister = Callable[[], list[str]]


def attach(package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()) -> tuple[Getter, Lister]:
    """The functions ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        names: of what it gives, by the module below it that has them.
        modules: those below it that are attributes of it without having been imported.
    """
    homes = {name: home for home, own in names.items() for name in own}

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)  # next time it is found without a call
        return value

    def list_all() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes, *modules})

    return get, list_all
