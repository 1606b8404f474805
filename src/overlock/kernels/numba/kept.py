"""Compiled functions, kept in the folders of cache.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba.core import sigutils
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from overlock.kernels.numba import cache


class KeptFunction(CFunc):
    """A function for C, taken from where it is kept, or else compiled and kept.

    Args:
        function: in Python.
        signature: its types.
        options: of the compilation.
        variant: what tells it from others of its name.
    """

    def __init__(self, function: Callable[..., Any], signature: Any, options: dict[str, Any], variant: str = ""):
        super().__init__(function, sigutils.normalize_signature(signature), locals={}, options=options)
        self._cache = _Folders(function, variant)
        self.compile()

    @property
    def was_kept(self) -> bool:
        """Whether it did not have to be compiled."""
        return self.cache_hits > 0

    @property
    def is_kept(self) -> bool:
        """Whether it will not have to be compiled the next time."""
        return self.was_kept or self._cache.has_saved


class _Folders:
    """As numba's caches are used: found in any folder, kept in the first that can be written."""

    def __init__(self, function: Callable[..., Any], variant: str):
        self._function = function
        self._label = ".".join(
            filter(None, (Path(function.__code__.co_filename).stem, function.__name__, variant))
        )  # fmt: skip
        self.has_saved = False

    def load_overload(self, signature: Any, context: Any) -> Any:
        context.refresh()
        for folder in cache.folders():
            # What cannot be read, or was cut short, is as if it were not there.
            with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
                payload = pickle.loads((folder / self._name(signature, context)).read_bytes())
                return CompileResult._rebuild(context, *payload)
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        content = dumps(compiled._reduce())
        for folder in filter(cache.is_writable, cache.folders()):
            with contextlib.suppress(OSError):  # a full disk is no reason not to go on
                _write(folder / self._name(signature, compiled.target_context), content)
                self.has_saved = True
                return

    def _name(self, signature: Any, context: Any) -> str:
        facts = signature, context.codegen().magic_tuple(), self._function.__code__.co_code
        digest = hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()[:8]
        return f"{self._label}-{digest}{cache.SUFFIX}"


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, since other processes may read it or write it too."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)  # whoever runs the image that it is shipped in may read it
        Path(name).replace(path)
    except OSError:
        Path(name).unlink()
        raise
