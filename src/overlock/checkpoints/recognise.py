"""Which network a file without a record holds: a trainer's notes in it tell, else names and shapes of its weights."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from overlock.checkpoints.defaults import PAPER_SCALE, default_classes, default_preprocessing, objects_of_coco
from overlock.checkpoints.record import Record, check_model_name
from overlock.network import VARIANTS
from overlock.weights import unwrap
from overlock.weights.head_names import Head, find_head
from overlock.weights.parts import OURS, Parts, find_network, take_apart

logger = logging.getLogger(__name__)


def recognise(checkpoint: Mapping[str, object], path: Path, *, model: str | None = None) -> Record:
    """Tell the network of a file without a record.

    Weights tell the variant, classes, channels, form and head. They do not tell strides, the size of images and names
    of classes: those are what timm's ``train.py`` noted, else the variant's own and ImageNet's, COCO's or numbers.

    Args:
        checkpoint: all that is in the file.
        path: for messages.
        model: timm's name of the model, where it is known.

    Raises:
        ValueError: where nothing tells the network, or it has no head.
    """
    try:
        state = unwrap(checkpoint)
        place = find_network(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    given = checkpoint.get("args")
    arguments = dict(vars(given)) if isinstance(given, Namespace) else {}
    noted = model or checkpoint.get("arch") or arguments.get("model")
    name = noted if isinstance(noted, str) and timm.is_model(noted.partition(".")[0]) else None
    if model is not None:
        check_model_name(model)
    head = find_head(state)
    if place is None:
        record = _of_another_family(state, path, name, head, arguments)
    else:
        record = _of_overlock(take_apart(state, place), path, name, head, arguments)
    first = record.classes[0]
    logger.info(
        "%s: no record; its weights say %s of %d classes, %s; strides and the size of images are %s",
        path, record.name, len(record.classes), "numbered" if first == "0" else f"from {first} on",
        "as the training was told" if arguments else "the usual",
    )  # fmt: skip
    return record


def _of_overlock(parts: Parts, path: Path, name: str | None, head: Head | None, arguments: Mapping[str, Any]) -> Record:
    if name is not None and name.partition(".")[0] not in VARIANTS:
        raise ValueError(f"{path}: these are not the weights of {name} but of OverLoCK")
    name = find_variant(parts.network, path) if name is None else name.partition(".")[0]
    told = {**shape_arguments(arguments), **_tell_form(parts.network)}
    if head is not None:
        return _of_dense(name, head, told)
    return _of_classifier(name, parts, told, path=path, arguments=arguments)


def find_variant(network: Mapping[str, Tensor], path: Path) -> str:
    """The variant whose widths, depths, groups and kernels are those of the weights.

    Args:
        network: in our names.
        path: for messages.

    Raises:
        ValueError: where there is none, with what the weights have.
    """
    shape = read_shape(network)
    for name, variant in VARIANTS.items():
        if all(getattr(variant, part) == value for part, value in shape.items()):
            return name
    found = ", ".join(f"{part} {value}" for part, value in shape.items())
    raise ValueError(f"{path}: these weights fit none of {', '.join(VARIANTS)}: they have {found}")


_STAGES = ("base_net.stages.0", "base_net.stages.1", "base_net.stages.2", "overview_net.stage")
_FOCUS = ("focus_net.stage3", "focus_net.stage4")


def read_shape(network: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of a :class:`overlock.network.Variant` by the weights, without those that the weights do not have.

    Args:
        network: in our names; perhaps without its last stages, or its head.
    """

    def size(name: str, axis: int) -> int | None:
        return network[name].shape[axis] if name in network else None

    embeds = ("embed.6.conv.weight", *["embed.conv.weight"] * 3)
    groups = [size(f"{stage}.blocks.0.mixer.aggregator.mixer.rpb_large", 0) for stage in _FOCUS]
    depths = [_count_blocks(network, stage) for stage in (*_STAGES, *_FOCUS)]
    told: dict[str, Any] = dict(
        dims=tuple(size(f"{stage}.{embed}", 0) for stage, embed in zip(_STAGES, embeds, strict=True)),
        base_depths=tuple(depths[:3]),
        overview_depth=depths[3],
        focus_depths=tuple(depths[4:]),
        groups=tuple(groups),
        kernel_sizes=tuple(size(f"{stage}.blocks.0.large_kernel.conv.large.weight", -1) for stage in _STAGES),
        head_width=size("head.hidden.proj.conv.weight", 0),
    )
    return {part: value for part, value in told.items() if value and not (isinstance(value, tuple) and not all(value))}


def _count_blocks(network: Mapping[str, Tensor], stage: str) -> int:
    pattern = re.compile(re.escape(stage) + r"\.blocks\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, network) if match})


def _tell_form(network: Mapping[str, Tensor]) -> dict[str, Any]:
    return dict(
        in_chans=network[OURS].shape[1],
        deploy=any(name.endswith("large.bias") for name in network),
    )


def shape_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of timm's ``train.py`` that shape the network, without those of training alone."""
    given = dict(arguments.get("model_kwargs") or {})
    if arguments.get("gp"):
        given["global_pool"] = arguments["gp"]
    return {key: value for key, value in given.items() if not key.startswith(("pretrained", "drop_", "checkpoint_"))}


def _of_classifier(
    name: str, parts: Parts, told: Mapping[str, Any], *, path: Path, arguments: Mapping[str, Any]
) -> Record:  # fmt: skip
    classifier = parts.network.get("head.fc.weight")
    if classifier is None or parts.pyramid:
        raise ValueError(
            f"{path}: this is the backbone of an {name} without a head; start a training from it (--weights), or load "
            f"it with overlock.load_weights into a model of its kind"
        )
    count = classifier.shape[0]
    told = {**told, "num_classes": count, "aux_head": any(part.startswith("aux_head.") for part in parts.network)}
    return Record(
        model=name, model_args=told, classes=default_classes(count),
        preprocessing=default_preprocessing(name, in_chans=told["in_chans"], arguments=arguments),
    )  # fmt: skip


def _of_dense(name: str, head: Head, told: Mapping[str, Any]) -> Record:
    """Of a detector or segmenter, with only those arguments that are not the builder's own."""
    usual: dict[str, Any] = dict(in_chans=3, deploy=False, hidden_channels=512 if head.name == "upernet" else 256)
    arguments = {key: value for key, value in {**told, **head.widths}.items() if usual.get(key) != value}
    if head.name == "upernet":
        return Record(
            model=name, head=head.name, model_args=arguments, classes=default_classes(head.classes),
            preprocessing=dict(scale=PAPER_SCALE),
        )  # fmt: skip
    return Record(model=name, head=head.name, model_args=arguments, classes=objects_of_coco(head.classes))


def _of_another_family(
    state: Mapping[str, Tensor], path: Path, name: str | None, head: Head | None, arguments: Mapping[str, Any]
) -> Record:
    """Of a model of timm's other families, which its name alone can tell."""
    if name is None or name.partition(".")[0] in VARIANTS:
        what = "an OverLoCK model" if head is None else f"a {head.name} on OverLoCK"
        raise ValueError(f"{path}: these are not the weights of {what}; name another backbone of timm's with --model")
    if head is not None:
        return _of_dense(name, head, {})
    classes, channels = find_ends(state, name)
    if classes is None or channels is None:
        raise ValueError(f"{path}: these are not the weights of a classifier {name}")
    told = {**shape_arguments(arguments), "num_classes": classes, "in_chans": channels}
    return Record(
        model=name, model_args=told, classes=default_classes(classes),
        preprocessing=default_preprocessing(name, in_chans=channels, arguments=arguments),
    )  # fmt: skip


def find_ends(state: Mapping[str, Tensor], model: str) -> tuple[int | None, int | None]:
    """The count of classes and of image channels of a timm model's weights; None for what the weights do not have.

    Args:
        state: names and weights.
        model: timm's name of the model.
    """
    config = timm.get_pretrained_cfg(model)
    sizes = []
    for part, axis in (("classifier", 0), ("first_conv", 1)):
        names = getattr(config, part, None) or ""
        weight = state.get(f"{names if isinstance(names, str) else names[0]}.weight")
        sizes.append(None if weight is None else weight.shape[axis])
    return sizes[0], sizes[1]
