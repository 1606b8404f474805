"""From a checkpoint of any kind to a trained network."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from overlock.checkpoints.hub import PREFIX, fetch
from overlock.checkpoints.recognise import recognise
from overlock.checkpoints.record import MODEL_FILE, Record, read_record
from overlock.weights import read_checkpoint, unwrap
from overlock.weights.files import tell_unused
from overlock.weights.parts import find_network
from overlock.weights.translate import fit

Source = str | os.PathLike[str]
"""A file of weights, a run's folder, or 'hf-hub:USER/NAME'."""


def find_weights(source: Source) -> Path:
    """The file of weights that a path, a run's folder or 'hf-hub:USER/NAME' stands for, downloaded where need be.

    Raises:
        ValueError: where there is none.
    """
    if str(source).startswith(PREFIX):
        return fetch(str(source))
    path = Path(source)
    if not path.is_dir():
        return path
    if not (path / MODEL_FILE).is_file():
        raise ValueError(f"{path}: no {MODEL_FILE} in this folder; give the folder of a finished run")
    return path / MODEL_FILE


def load_model(source: Source, *, model: str | None = None) -> tuple[nn.Module, Record]:
    """A trained network from a file.

    Args:
        source: the folder of a run, 'hf-hub:USER/NAME', a safetensors file of ours, or any file of OverLoCK weights,
            the authors' too, of classifiers, detectors and segmenters.
        model: timm's name of the model, for files that do not say and cannot be recognised.

    Returns:
        The network in evaluation mode, and the record.

    Raises:
        ValueError: for a missing, damaged or foreign file, naming it.
    """
    path = find_weights(source)
    checkpoint = read_checkpoint(path)
    record = read_record(path)
    if record is None:
        record = recognise(checkpoint, path, model=model)
    elif model is not None and model != record.model:
        raise ValueError(f"{path}: this is a checkpoint of {record.model}, not of {model}; leave --model out")
    try:
        network = record.make_network()
        state, left_out = unwrap(checkpoint), list[str]()
        if find_network(state) is not None:
            state, left_out = fit(state, network)
        network.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    tell_unused(path, checkpoint, left_out)
    return network.eval(), record


def load_classifier(source: Source, *, model: str | None = None) -> tuple[nn.Module, Record]:
    """A trained classifier from a file, as :func:`load_model`.

    Raises:
        ValueError: for other networks too.
    """
    network, record = load_model(source, model=model)
    if record.head is not None:
        raise ValueError(f"{source}: this is a {record.name}, not a classifier; predict with --task {record.task}")
    return network, record


def load_record(source: Source, *, model: str | None = None) -> Record:
    """What :func:`load_model` says of a network, without building it."""
    path = find_weights(source)
    return read_record(path) or recognise(read_checkpoint(path), path, model=model)
