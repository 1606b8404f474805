"""First weights of a training: the backbone of another model, and what else fits."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from overlock.checkpoints.record import read_record
from overlock.weights import adapt_channels, read_checkpoint, unwrap
from overlock.weights.files import summarise, tell_unused
from overlock.weights.parts import find_network
from overlock.weights.translate import fit

logger = logging.getLogger(__name__)
ROOTS = ("backbone.body.", "backbone.", "")
"""What the names of a backbone begin with, in detectors, in segmenters, and alone."""


def start_from(network: nn.Module, path: Path) -> None:
    """Take from a file the whole backbone, and of the head all that has the same name and shape.

    What is not taken is logged, the norms of a detector's or segmenter's features too, where a classifier starts from
    one.

    Args:
        network: a classifier, detector or segmenter.
        path: of the weights of any of these, or of a backbone alone.

    Raises:
        ValueError: for weights that leave something of the backbone without.
    """
    checkpoint, record = read_checkpoint(path), read_record(path)
    state, left_out = unwrap(checkpoint), list[str]()
    try:
        if find_network(network.state_dict()) is not None:
            found, left_out = fit(state, network, strict=False)
            found = adapt_channels(found, network)
        else:
            found = _match(state, network)
    except ValueError as error:
        what = "" if record is None else f"its {record.name}: "
        raise ValueError(f"{path}: {what}{error}; set --model to its own") from None
    network.load_state_dict(found, strict=False)
    tell_unused(path, checkpoint, left_out)
    kept = [name for name in network.state_dict() if name not in found]
    if kept:
        logger.info("%s: the backbone is taken from it; %s start anew", path, summarise(kept))


def _match(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Of a model of timm's other families: names tell, whatever they begin with on either side.

    What a classifier calls stages.0 is stages_0 where features are taken from it.
    """
    target = network.state_dict()
    root = next(root for root in ROOTS if any(name.startswith(root) for name in target))
    own = {name.removeprefix(root).replace(".", "_"): name for name in target if name.startswith(root)}
    found: dict[str, Tensor] = {}
    lost: list[str] = []
    for theirs in ROOTS:
        given = {name: name.removeprefix(theirs).replace(".", "_") for name in state if name.startswith(theirs)}
        fitting = {
            own[part]: state[name]
            for name, part in given.items()
            if part in own and state[name].shape == target[own[part]].shape
        }
        if len(fitting) > len(found):
            found = fitting
            lost = [name for name, part in given.items() if own.get(part) not in fitting and not _HEAD.match(name)]
    missing = [name for name in target if name.startswith(root) and name not in found]
    if root and missing:
        raise ValueError(f"it has nothing for {len(missing)} weights of the backbone (first: {missing[0]})")
    if not root and (lost or not found):  # a classifier, whose head may be new
        first = f" (first: {lost[0]})" if lost else ""
        raise ValueError(f"{len(lost) or 'none'} of its weights have no place in the network{first}")
    heads = {name: x for name, x in state.items() if root and not name.startswith(root) and name in target}
    return found | {name: x for name, x in heads.items() if x.shape == target[name].shape}


_HEAD = re.compile(r"backbone\.fpn\.|rpn\.|roi_heads\.|decode_head\.|auxiliary_head\.")
