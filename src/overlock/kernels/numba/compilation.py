"""Compiling the kernels before they are needed: all at once, or in another process while this one works."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from overlock.kernels.numba import cache

logger = logging.getLogger(__name__)
NOWHERE = "no folder for compiled kernels can be written; name one with --output DIR"
PROGRAM = (
    "import os; hasattr(os, 'nice') and os.nice(5); "  # the work itself goes first
    "from overlock.kernels.numba.compilation import compile_kernels; compile_kernels()"
)


def compile_kernels(modules: Iterable[str] = cache.INFERENCE, *, also_bfloat16: bool = False) -> None:
    """Compile the kernels of some modules that are not compiled yet, and keep them.

    Args:
        modules: their names.
        also_bfloat16: compile them for maps in bfloat16 too, which training under autocast has, and for products in it.
    """
    from overlock.kernels.numba.runtime import Kernel, prepare_threads  # noqa: PLC0415
    from overlock.kernels.numba.simd import HAS_BFLOAT16  # noqa: PLC0415

    for module in modules:
        in_bfloat16 = also_bfloat16 and (HAS_BFLOAT16 or module not in cache.PRODUCTS)
        for kernel in vars(importlib.import_module(f"overlock.kernels.numba.{module}")).values():
            if in_bfloat16 and isinstance(kernel, Kernel):
                kernel.compile_for_bfloat16()
    prepare_threads()


def compile_all(output: Path | None = None) -> list[Path]:
    """Compile all kernels, those of training too, and put them where they are found.

    For a process that has called none yet: what is compiled by then is not kept again.

    Args:
        output: a folder to put them in, which the environment variable ``OVERLOCK_CACHE`` names where they are used;
            without it, where this installation looks by itself.

    Returns:
        Their files.

    Raises:
        ValueError: where the folder, or without one any of the usual ones, cannot be written.
    """
    if output is not None:
        os.environ[cache.ENVIRONMENT_VARIABLE] = str(output.absolute())
    folder = next(filter(cache.is_writable, cache.folders()[: None if output is None else 1]), None)
    if folder is None:
        raise ValueError(f"{output}: cannot write here; name a folder that can be written" if output else NOWHERE)
    compile_kernels((*cache.INFERENCE, *cache.TRAINING), also_bfloat16=True)
    for path in cache.kept_files():  # some may have been compiled before, and lie in another folder
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return sorted(folder.glob(f"*{cache.SUFFIX}"))


class Compilation:
    """A process that compiles the kernels of inference, which this one will find when it has ended.

    In a process, since numba holds the lock of Python's threads. It ends with this one; what it has compiled by then is
    kept. Where no folder can be written, it hands the kernels over in a temporary one.
    """

    def __init__(self) -> None:
        self._temporary: Path | None = None
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        if not any(map(cache.is_writable, cache.folders())):
            self._temporary = Path(tempfile.mkdtemp(prefix="overlock-"))
            cache.add_folder(self._temporary)
            environment[cache.ENVIRONMENT_VARIABLE] = str(self._temporary)
        # Ctrl-C is for this process, which may well go on, as a notebook does.
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        atexit.register(self.stop)
        logger.info("compiling kernels for this processor beside the work, which goes on without them until then")

    @property
    def has_ended(self) -> bool:
        """Whether no more kernels will come of it."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """End it now."""
        if not self.has_ended:
            self._process.terminate()
            self._process.wait()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
