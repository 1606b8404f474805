"""Files of ``torch.save`` read without running code in them: tensors, and the settings that trainers leave beside them.

torch refuses every type that it does not know, also those in which trainers keep what they were told to do. The ones
below hold data alone. Settings are read; of the rest nothing is needed, so that it is left out. Any other type is
refused by its name.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class LeftOut:
    """Stands for an object of no use here, whatever it is made of."""

    def __new__(cls, *_: object, **__: object) -> LeftOut:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


class PlainDict:
    """Makes an ordered dict, with the items alone, of those of other libraries."""

    def __new__(cls, *given: object, **_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict(given[0] if given and isinstance(given[0], (dict, list, tuple)) else {})


_PATHS = {"PosixPath": "PurePosixPath", "PurePosixPath": "PurePosixPath", "WindowsPath": "PureWindowsPath",
          "PureWindowsPath": "PureWindowsPath"}  # fmt: skip
_DICTS = (
    "collections.defaultdict",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "fvcore.common.config.CfgNode",
    "yacs.config.CfgNode",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning_utilities.core.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_LEFT_OUT = (
    # What a trainer measured, and when
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray", *sorted({t.__name__ for t in np.sctypeDict.values()}))),
    *(f"numpy.dtypes.{name}" for name in dir(np.dtypes) if name.endswith("DType")),
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    "uuid.UUID",
    "decimal.Decimal",
    # mmengine's record of losses, which refers to its own methods
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    # Settings in OmegaConf's form
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("Container", "ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "String")),
    "typing.Any",
)
_BUILTINS = (bool, dict, float, int, list, str)  # as what a defaultdict makes, or as the type of a setting

HARMLESS: list[Any] = [
    argparse.Namespace,
    *((getattr(pathlib, kind), f"{module}.{name}") for name, kind in _PATHS.items()
      for module in ("pathlib", "pathlib._local")),
    *((kind, f"builtins.{kind.__name__}") for kind in _BUILTINS),
    *((PlainDict, name) for name in _DICTS),
    *((LeftOut, name) for name in _LEFT_OUT),
]  # fmt: skip
"""Types that may stand in a file, and what is made of them."""


# What torch raises over bytes that are no file of its own, or only the beginning of one.
_UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError,
    AttributeError, AssertionError,
)  # fmt: skip


def read_saved(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU.

    Raises:
        ValueError: for a file with other types, naming them, and for one that cannot be read.
    """
    try:
        with safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the errors say again
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        names = list(_foreign_types(path, error))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{path}: not a file of weights alone: it holds {', '.join(names[:3])}{more}, which could run code; "
                f"where it was made, save the weights by themselves: torch.save(model.state_dict(), FILE)"
            ) from None
        raise ValueError(f"{path}: not a readable checkpoint, or cut short ({_reason(error)})") from None


def _foreign_types(path: Path, error: Exception) -> Iterator[str]:
    """The types in a file that are not known to be harmless: by the file's list, or of an old file the first."""
    if "TorchScript" in str(error):
        yield "a program of TorchScript"
        return
    named = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    try:
        with safe_globals(HARMLESS):
            names = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except _UNREADABLE:
        names = []
    first = [named[1]] if named and named[1] not in names and f"builtins.{named[1]}" not in names else []
    yield from (name.removeprefix("builtins.") for name in first + names)


def _reason(error: Exception) -> str:
    """The first line of what torch says, without the colours and the advice around it."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or type(error).__name__
    inner = re.search(r"WeightsUnpickler error: (.*)", text)
    return (inner[1] if inner else text.splitlines()[0])[:160]
