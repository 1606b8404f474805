"""A classifier as a file: weights with all that is needed to build the network and to prepare its images."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import ImageNetInfo, resolve_data_config
from torch import Tensor, nn

from overlock.files import write_atomically
from overlock.network import VARIANTS
from overlock.weights import read_checkpoint, translate, unwrap

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_METADATA_KEY = "overlock"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What goes with the weights."""

    model: str
    """timm's name of the model."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keywords it is built with."""
    classes: tuple[str, ...]
    """Names of the classes in the order of the logits."""
    preprocessing: Mapping[str, Any]
    """timm's data configuration: input_size (C, H, W), mean, std, interpolation, crop_pct."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        content = json.loads(text)
        lists_to_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in content["preprocessing"].items()}
        return cls(**{**content, "classes": tuple(content["classes"]), "preprocessing": lists_to_tuples})


def save_classifier(path: str | os.PathLike[str], state: Mapping[str, Tensor], record: Record) -> None:
    """Write weights and record into one safetensors file, whole or not at all.

    Raises:
        ValueError: where the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, save(tensors, metadata={"format": "pt", _METADATA_KEY: record.to_json()}))


def to_timm_config(record: Record) -> str:
    """The record as timm's ``config.json``, with which ``timm.create_model("local-dir:FOLDER")`` builds the model."""
    preprocessing = {**record.preprocessing, "num_classes": len(record.classes)}
    config = {
        "architecture": record.model,
        "num_classes": len(record.classes),
        "model_args": {name: value for name, value in record.model_args.items() if name != "num_classes"},
        "label_names": list(record.classes),
        "pretrained_cfg": preprocessing,
    }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def load_classifier(path: str | os.PathLike[str], *, model: str | None = None) -> tuple[nn.Module, Record]:
    """A trained network from a file.

    Args:
        path: the folder of a run, a safetensors file of ours, or any file of OverLoCK weights, the authors' too.
        model: timm's name of the model, for files that do not say and cannot be recognised.

    Returns:
        The network in evaluation mode, and the record.

    Raises:
        ValueError: for a missing, damaged or foreign file, naming it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MODEL_FILE).is_file():
            raise ValueError(f"{path}: no {MODEL_FILE} in this folder; give the folder of a finished run")
        path = path / MODEL_FILE
    state = unwrap(read_checkpoint(path))
    record = read_record(path)
    if record is None:
        record = infer_record(state, path, model=model)
    elif model is not None and model != record.model:
        raise ValueError(f"{path}: this is a checkpoint of {record.model}, not of {model}; leave --model out")
    network = build(record.model, **record.model_args)
    try:
        if record.model in VARIANTS:
            state = translate(state, network)
        network.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return network.eval(), record


def read_record(path: Path) -> Record | None:
    """The record in a safetensors file of ours, None for other files."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return Record.from_json(metadata[_METADATA_KEY]) if _METADATA_KEY in metadata else None
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from None


def build(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` whose message for an unknown name suggests the nearest.

    Raises:
        ValueError: for an unknown name or keywords that the model does not take.
    """
    check_model_name(name)
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be built so: {error}") from None


def check_model_name(name: str) -> None:
    """Raise ValueError for a model that timm does not know, suggesting the nearest."""
    if timm.is_model(name.partition(".")[0]):
        return
    near = difflib.get_close_matches(name, list(VARIANTS), n=1) or difflib.get_close_matches(
        name, timm.list_models(), n=1
    )
    hint = f"did you mean {near[0]!r}?" if near else f"ours are {', '.join(VARIANTS)}"
    raise ValueError(f"unknown model {name!r}; {hint}")


def infer_record(state: Mapping[str, Tensor], path: Path, *, model: str | None = None) -> Record:
    """Tell size, form, channels and classes of OverLoCK from the shapes in a file of its weights.

    Args:
        state: the authors' names or ours.
        path: for messages.
        model: the size, where it is known.

    Raises:
        ValueError: where the weights are not those of an OverLoCK classifier.
    """
    if model is not None:
        check_model_name(model)
        if model not in VARIANTS:
            raise ValueError(f"{path}: only OverLoCK's weights can be read without a record, not those of {model}")
    stem = state.get("patch_embed1.0.weight", state.get("base_net.stages.0.embed.0.conv.weight"))
    classifier = state.get("head.4.weight", state.get("head.fc.weight"))
    if stem is None or classifier is None:
        raise ValueError(f"{path}: these are not the weights of an OverLoCK classifier")
    arguments = dict(
        in_chans=stem.shape[1],
        num_classes=classifier.shape[0],
        deploy=any(name.endswith(("lk_origin.bias", "large.bias")) for name in state),
        aux_head=any(name.startswith("aux_head.") for name in state),
    )
    reason = ""
    for name in [model] if model else VARIANTS:
        with torch.device("meta"):
            network = timm.create_model(name, **arguments)
        try:
            translate(state, network)
        except ValueError as error:
            reason = str(error)
            continue
        return Record(
            model=name,
            model_args=arguments,
            classes=default_classes(classifier.shape[0]),
            preprocessing=default_preprocessing(network, in_chans=stem.shape[1]),
        )
    raise ValueError(f"{path}: {reason}" if model else f"{path}: these weights fit none of {', '.join(VARIANTS)}")


def default_classes(count: int) -> tuple[str, ...]:
    """Names for the classes of weights that come without: ImageNet's for 1000, else numbers."""
    if count == 1000:
        names = ImageNetInfo()
        return tuple(names.index_to_description(i).split(",")[0] for i in range(count))
    return tuple(str(i) for i in range(count))


def default_preprocessing(
    model: nn.Module, *, in_chans: int, image_size: int | None = None, crop_pct: float | None = None
) -> dict[str, Any]:
    """timm's data configuration of a model; one channel is normalised by the average of three."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    size = (in_chans, *((image_size, image_size) if image_size else config["input_size"][1:]))
    mean, std = config["mean"], config["std"]
    if in_chans == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return dict(
        input_size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=config["interpolation"],
        crop_pct=crop_pct or config["crop_pct"],
    )
