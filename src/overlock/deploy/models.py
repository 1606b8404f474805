"""The networks that predictors and evaluations take: what a word for one stands for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from overlock.checkpoints import Record, build, default_classes, default_preprocessing, load_model, load_record
from overlock.checkpoints.hub import PREFIX
from overlock.export.runtimes import ExportedNetwork
from overlock.export.spec import ENDINGS, format_of

Source = str | os.PathLike[str] | ExportedNetwork
SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")
"""Endings of files of weights."""


def load_network(source: Source, *, model: str | None = None) -> tuple[nn.Module, Record]:
    """A trained network, in evaluation mode, and its record.

    Args:
        source: a run's folder, a file of weights, 'hf-hub:USER/NAME', the name of a model of timm's, of which the
            published weights are fetched, or a file of ``overlock export``, which may be open already.
        model: timm's name of the model, for a file that does not say and cannot be recognised.

    Raises:
        ValueError: for what is none of these, and a damaged or foreign file.
    """
    source = open_exported(source)
    if isinstance(source, ExportedNetwork):
        return source, source.spec.record
    if is_file(source):
        return load_model(source, model=model)
    name = str(source)
    try:
        network = build(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{name}: no such file, and no published weights could be fetched ({reason})") from None
    except ValueError as error:
        raise ValueError(f"{name}: no such file or folder, and no model of timm's ({error})") from None
    return network.eval(), _record_of(name, network)


def open_exported(source: Source) -> Source:
    """A file of ``overlock export`` opened, which may take a compilation; any other source as it is.

    Raises:
        ValueError: for a missing, damaged or foreign file.
    """
    if isinstance(source, ExportedNetwork) or format_of(Path(source)) is None:
        return source
    return ExportedNetwork(source)


def load_untrained(source: str | os.PathLike[str], *, model: str | None = None) -> tuple[nn.Module, Record]:
    """The network of :func:`load_network` with the weights that its training starts from, drawn by PyTorch's generator.

    Raises:
        ValueError: as there, but for weights that cannot be fetched.
    """
    if is_file(source):
        record = load_record(source, model=model)
        return record.make_network().eval(), record
    network = build(str(source))
    return network.eval(), _record_of(str(source), network)


def _record_of(name: str, network: Any) -> Record:
    """Of a model of timm's as it is."""
    config = network.pretrained_cfg
    preprocessing = default_preprocessing(network, in_chans=config["input_size"][0])
    return Record(model=name, classes=default_classes(config["num_classes"]), preprocessing=preprocessing)


def task_of(source: Source, *, model: str | None = None) -> str:
    """'classify', 'detect' or 'segment': what a network of :func:`load_network` is for.

    Exported files are opened for it; other networks are not built.

    Raises:
        ValueError: as :func:`load_network`, for files.
    """
    source = open_exported(source)
    if isinstance(source, ExportedNetwork):
        return source.spec.record.task
    return load_record(source, model=model).task if is_file(source) else "classify"


def is_file(source: str | os.PathLike[str]) -> bool:
    """Whether a word stands for a file of weights, there or not, and not for a model of timm's."""
    name = str(source)
    named_so = name.startswith(PREFIX) or name.endswith((*SUFFIXES, *ENDINGS.values())) or "/" in name or os.sep in name
    return named_so or Path(name).exists()
