"""What the training of detectors and segmenters has in common: the network, its first weights, and sample pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from overlock.checkpoints import Record, check_model_name, find_weights, start_from
from overlock.drawing import join_pictures
from overlock.files import write_atomically
from overlock.training.config import RunConfig

SAMPLES, SAMPLE_COUNT = "samples.png", 4


def make_network(config: RunConfig, record: Record) -> nn.Module:
    """The network of a record with its first weights.

    Args:
        config: of the run.
        record: of the network.

    Raises:
        ValueError: for a model or weights that will not do.
        ImportError: without the library of the head.
    """
    check_model_name(config.model)
    torch.manual_seed(config.seed)  # the initial weights, the same on all processes
    try:
        network = record.make_network(pretrained=config.pretrained)
    except OSError as error:
        raise ValueError(f"the weights of {config.model} could not be fetched ({error}); try --weights FILE") from None
    if config.weights is not None:
        start_from(network, find_weights(config.weights))
    return network


def save_samples(path: Path, draw: Callable[[int], Sequence[Image.Image]], count: int) -> None:
    """A picture of some of the images to test on, spread over them, a row each.

    Args:
        path: to write.
        draw: the row of an image by its number.
        count: images there are.
    """
    shown = sorted({i * count // SAMPLE_COUNT for i in range(min(count, SAMPLE_COUNT))})
    rows = []
    for place in shown:
        try:
            rows.append(draw(place))
        except ValueError:  # an unreadable image, told of in the run's list
            continue
    if rows:
        buffer = io.BytesIO()
        join_pictures(rows).save(buffer, format="png")
        write_atomically(path, buffer.getvalue())
