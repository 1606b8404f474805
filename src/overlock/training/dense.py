"""What the training of detectors and segmenters has in common: the network, its first weights, and sample pictures."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from overlock.checkpoint import HEADS, Record, check_model_name, load_model
from overlock.drawing import join_pictures
from overlock.files import write_atomically
from overlock.hub import find_weights
from overlock.tasks.pyramid import Pyramid
from overlock.training.config import RunConfig

logger = logging.getLogger(__name__)
BACKBONES = dict(classify="", detect="backbone.body", segment="backbone")  # where models of each task have theirs
SAMPLES, SAMPLE_COUNT = "samples.png", 4


def make_network(config: RunConfig, record: Record, **only_training: Any) -> nn.Module:
    """The network of a record with its first weights.

    Args:
        config: of the run.
        record: of the network.
        only_training: arguments that the network is built with now, and not when it is loaded.

    Raises:
        ValueError: for a model or weights that will not do.
        ImportError: without the library of the head.
    """
    check_model_name(config.model)
    torch.manual_seed(config.seed)  # the initial weights, the same on all processes
    arguments = {**record.model_args, **only_training}
    try:
        network = HEADS[str(record.head)](
            config.model, num_classes=len(record.classes), pretrained=config.pretrained, drop_path=config.drop_path,
            **arguments,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"the weights of {config.model} could not be fetched ({error}); try --weights FILE") from None
    if config.weights is not None:
        start_from(network, find_weights(config.weights), task=record.task)
    return network


def start_from(network: nn.Module, path: Path, *, task: str) -> None:
    """Take weights from a dense model of the same task for all that is of the same shape, else for the backbone alone.

    Args:
        network: a detector or segmenter.
        path: of the weights of a classifier, detector or segmenter.
        task: of the network.

    Raises:
        ValueError: for weights that leave something of the backbone without.
    """
    given, record = load_model(path)
    root, their_root = BACKBONES[task], BACKBONES[record.task]
    if record.task == "classify" and isinstance(network.get_submodule(root), Pyramid):
        root += ".backbone"
    state = given.state_dict()
    if record.task != task:
        inside = f"{their_root}." if their_root else ""
        state = {f"{root}.{name.removeprefix(inside)}": x for name, x in state.items() if name.startswith(inside)}
    # What a classifier of timm calls stages.0 is stages_0 where features are taken from it.
    held = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    own = {name: (tensor, held.get(name.replace(".", "_"))) for name, tensor in network.state_dict().items()}
    found = {name: new for name, (old, new) in own.items() if new is not None and new.shape == old.shape}
    needed = f"{root}.backbone." if isinstance(network.get_submodule(root), Pyramid) else f"{root}."
    missing = [name for name in own if name.startswith(needed) and name not in found]
    if missing:
        raise ValueError(
            f"{path}: its {record.name} has nothing for {len(missing)} weights of the backbone (first: {missing[0]}); "
            f"set --model to its own"
        )
    network.load_state_dict(found, strict=False)
    logger.info("%s: %d of %d tensors are those of its %s", path, len(found), len(own), record.name)


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
