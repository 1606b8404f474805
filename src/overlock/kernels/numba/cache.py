"""Where compiled kernels are kept, and whether those for this machine are there already; told without importing numba.

A folder may hold kernels for several processors, versions of Python, of numba and of this package, each under its own
name. Names depend on contents alone, so that a folder can be copied anywhere: into an image, a container, another
machine.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ENVIRONMENT_VARIABLE = "OVERLOCK_CACHE"
"""Names a folder for compiled kernels; NUMBA_CACHE_DIR is taken where it is not set."""
SUFFIX = ".kernel"
INFERENCE = ("channel_statistics", "context", "contmix_kernels", "depthwise", "expand_filter", "gemm", "layer_norm")
"""Modules of kernels that a fused network calls."""
PRODUCTS = ("expand_filter", "gemm")
"""Those of them with matrix products, which take bfloat16 only where the processor has its dot product."""
TRAINING = ("contmix_gradients", "depthwise_gradients", "grn", "local_gradients", "repconv", "repconv_gradients")
"""Those that training needs beside them."""

_SOURCES = Path(__file__).parent
_DEFINITION = re.compile(r"^@kernel\b.*?^def (\w+)", re.MULTILINE | re.DOTALL)
_further: list[Path] = []


def add_folder(place: Path) -> None:
    """Look for kernels in a further place too, in this process."""
    _further.append(place)


def folders() -> list[Path]:
    """Folders of this machine's kernels, to be looked through in this order; some may not exist.

    They lie in the place that the environment names; without one, or where that cannot be written, in those of this
    installation and of this user too.
    """
    return [place / _name() for place in _places()]


def kept_files() -> list[Path]:
    """The kernels that there are, of each the first."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            found.setdefault(path.name, path)
    return list(found.values())


def _places() -> Iterator[Path]:
    yield from _further
    named = os.environ.get(ENVIRONMENT_VARIABLE) or os.environ.get("NUMBA_CACHE_DIR")
    if named:
        yield Path(named)
        if is_writable(Path(named)):
            return
    yield _SOURCES / "__pycache__"
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    yield (Path(home) if home else Path("~/.cache").expanduser()) / "overlock"


@functools.cache
def is_writable(folder: Path) -> bool:
    """Whether files can be written in a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def are_compiled() -> bool:
    """Whether all kernels of inference are there for this machine."""
    return _kernels() <= {path.name.rpartition("-")[0] for path in kept_files()}


@functools.cache
def _name() -> str:
    """Of a folder: by the versions of Python and numba and the processor that kernels are compiled by and for, and by
    the sources, all of them, since a kernel holds code of other files too."""
    import llvmlite.binding as llvm  # noqa: PLC0415

    processor = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES") or llvm.get_host_cpu_features().flatten()
    versions = (sys.implementation.cache_tag, importlib.metadata.version("numba"), llvm.get_process_triple())
    digest = hashlib.sha256(repr((*versions, processor, features)).encode())
    for path in sorted(_SOURCES.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}"


@functools.cache
def _kernels() -> frozenset[str]:
    """Those of inference as their files are named; none where an installation has no sources to tell."""
    names = set()
    for path in (_SOURCES / f"{module}.py" for module in INFERENCE):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        names |= {f"{path.stem}.{name}" for name in _DEFINITION.findall(text)}
    return frozenset(names)
