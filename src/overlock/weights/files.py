"""Files of weights read, and loaded into models."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import nn

from overlock.weights.translate import AVERAGED, adapt_channels, fit, unwrap
from overlock.weights.unpickling import read_saved

logger = logging.getLogger(__name__)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read a checkpoint without running any code in it; see :mod:`overlock.weights.unpickling`.

    Raises:
        ValueError: for a missing, damaged or foreign file, naming it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not a readable checkpoint, or cut short ({error})") from None
    checkpoint = read_saved(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: a checkpoint must hold a state dict, found {type(checkpoint).__name__}")
    if isinstance(checkpoint.get("network"), Mapping) and "optimizer" in checkpoint:
        raise ValueError(
            f"{path}: this is what a run goes on from (--resume); its weights, with what belongs to them, are in the "
            f"folder of the run: best.safetensors, and model.safetensors once it is finished"
        )
    return checkpoint


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load a file of weights, the authors', timm's or ours, into a model with our network in it.

    The model is a classifier, timm's ``features_only`` form of one, a :class:`overlock.Pyramid`, a detector, a
    segmenter, or another framework's model around one of these; so is the file's. :func:`overlock.weights.translate`
    says what goes where. A new number of classes gets a new classifier, and other channels than colours a first
    convolution made of the given one, as with timm. What stays as it was is logged as a warning, what is left out as a
    note.

    Args:
        model: to load into.
        path: of the file.
        strict: refuse a head of the model's kind that does not fit, and norms without a place; else they are left out.

    Raises:
        ValueError: for an unreadable file, or one that does not fit; then the model is as it was.
    """
    try:
        checkpoint = read_checkpoint(path)
        fitted, left_out = fit(unwrap(checkpoint), model, strict=strict)
        state = adapt_channels(fitted, model)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    model.load_state_dict(state, strict=False)
    kept = [name for name in model.state_dict() if name not in state]
    if kept:
        logger.warning("%s: has nothing for %s, which stay as they were", path, summarise(kept))
    tell_unused(path, checkpoint, left_out)


def tell_unused(path: str | os.PathLike[str], checkpoint: Mapping[str, object], left_out: Sequence[str]) -> None:
    """Note what of a file is not taken.

    Args:
        path: of the file.
        checkpoint: all that is in it.
        left_out: names of tensors that have no place in the model.
    """
    if any(isinstance(checkpoint.get(key), Mapping) for key in AVERAGED):
        logger.info("%s: the averaged weights are taken", path)
    if left_out:
        logger.info("%s: the model has no place for its %s", path, summarise(left_out))


def summarise(names: Sequence[str]) -> str:
    """Tensors counted by the parts that they belong to: 'decode_head (62), norms (8)', or 'head.fc (2)' within one."""
    depth = 1 if len({name.split(".")[0] for name in names}) > 1 else 2
    counts = Counter(".".join(name.split(".")[:depth]) for name in names)
    first = [f"{part} ({count})" for part, count in counts.most_common(4)]
    more = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
    return ", ".join(first) + more
