"""A network as a file: weights with all that is needed to build it and to prepare its images."""

from __future__ import annotations

import difflib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import ImageNetInfo, resolve_data_config
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from overlock.dense_weights import find_head, translate_dense
from overlock.files import write_atomically
from overlock.network import VARIANTS
from overlock.tasks.cascade import cascade_mask_rcnn, cascade_rcnn
from overlock.tasks.detection import faster_rcnn, mask_rcnn
from overlock.tasks.segmentation import upernet
from overlock.weights import read_checkpoint, translate, unwrap

HEADS: dict[str, Callable[..., nn.Module]] = dict(
    faster_rcnn=faster_rcnn,
    mask_rcnn=mask_rcnn,
    cascade_rcnn=cascade_rcnn,
    cascade_mask_rcnn=cascade_mask_rcnn,
    upernet=upernet,
)
"""What makes a dense model of a backbone, by name."""
PAPER_SCALE = (2048, 512)  # longest and shortest side of ADE20K's images
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_METADATA_KEY = "overlock"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What goes with the weights."""

    model: str
    """timm's name of the model, or of the backbone under a head."""
    head: str | None = None
    """One of HEADS; None for a classifier, which is a model of timm's as it is."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Keywords it is built with."""
    classes: tuple[str, ...]
    """Names of the classes in the order of the logits, without a detector's background."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """Of a classifier timm's data configuration: input_size (C, H, W), mean, std, interpolation, crop_pct; of a
    segmenter its scale, longest and shortest side; detectors prepare images by themselves."""

    @property
    def task(self) -> str:
        """'classify', 'detect' or 'segment'."""
        return "classify" if self.head is None else "segment" if self.head == "upernet" else "detect"

    @property
    def name(self) -> str:
        """Of the model and its head."""
        return self.model if self.head is None else f"{self.head} on {self.model}"

    def make_network(self) -> nn.Module:
        """The network, with weights yet to be loaded.

        Raises:
            ValueError: for a model or keywords that will not do.
        """
        if self.head is None:
            return build(self.model, **self.model_args)
        check_model_name(self.model)
        return HEADS[self.head](self.model, num_classes=len(self.classes), **self.model_args)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        content = json.loads(text)
        lists_to_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in content["preprocessing"].items()}
        return cls(**{**content, "classes": tuple(content["classes"]), "preprocessing": lists_to_tuples})


def save_model(path: str | os.PathLike[str], state: Mapping[str, Tensor], record: Record) -> None:
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
    """A trained classifier from a file, as :func:`load_model`.

    Raises:
        ValueError: for other networks too.
    """
    network, record = load_model(path, model=model)
    if record.head is not None:
        raise ValueError(f"{path}: this is a {record.name}, not a classifier; predict with --task {record.task}")
    return network, record


def load_model(path: str | os.PathLike[str], *, model: str | None = None) -> tuple[nn.Module, Record]:
    """A trained network from a file.

    Args:
        path: the folder of a run, a safetensors file of ours, or any file of OverLoCK weights, the authors' too, of
            classifiers, detectors and segmenters.
        model: timm's name of the model, for files that do not say and cannot be recognised.

    Returns:
        The network in evaluation mode, and the record.

    Raises:
        ValueError: for a missing, damaged or foreign file, naming it.
    """
    path = _file_of(path)
    checkpoint = read_checkpoint(path)
    state, record = _state_in(checkpoint, path), read_record(path)
    if record is None:
        record = recognise(checkpoint, path, model=model)
    elif model is not None and model != record.model:
        raise ValueError(f"{path}: this is a checkpoint of {record.model}, not of {model}; leave --model out")
    network = record.make_network()
    try:
        if record.head is None and record.model in VARIANTS:
            state = translate(state, network)
        elif find_head(state) is not None:
            state = translate_dense(state, network)
        network.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return network.eval(), record


def load_record(path: str | os.PathLike[str], *, model: str | None = None) -> Record:
    """What :func:`load_model` says of a network, without building it."""
    path = _file_of(path)
    return read_record(path) or recognise(read_checkpoint(path), path, model=model)


def _state_in(checkpoint: Mapping[str, object], path: Path) -> dict[str, Tensor]:
    try:
        return unwrap(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _file_of(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_dir():
        return path
    if not (path / MODEL_FILE).is_file():
        raise ValueError(f"{path}: no {MODEL_FILE} in this folder; give the folder of a finished run")
    return path / MODEL_FILE


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


def recognise(checkpoint: Mapping[str, object], path: Path, *, model: str | None = None) -> Record:
    """Tell the network of a file without a record: by what timm's ``train.py`` notes, or by the weights.

    Args:
        checkpoint: all that is in the file.
        path: for messages.
        model: timm's name of the model, where it is known.

    Raises:
        ValueError: where neither tells it.
    """
    state = _state_in(checkpoint, path)
    arguments = checkpoint.get("args")
    arguments = dict(vars(arguments)) if isinstance(arguments, Namespace) else {}
    noted = model or checkpoint.get("arch") or arguments.get("model")
    name = noted.partition(".")[0] if isinstance(noted, str) else ""
    if name in VARIANTS or not timm.is_model(name):
        record = infer_record(state, path, model=model or (name if name in VARIANTS else None))
    else:
        record = _infer_any(state, path, str(noted), arguments)
    if record.head is not None or not arguments:
        return record
    built = {key: value for key, value in _built_with(arguments).items() if key not in record.model_args}
    record = replace(record, model_args={**record.model_args, **built})
    with torch.device("meta"):
        network = record.make_network()
    channels = record.model_args["in_chans"]
    return replace(record, preprocessing=default_preprocessing(network, in_chans=channels, arguments=arguments))


def _built_with(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of timm's ``train.py`` that shape the network, without those of training alone."""
    given = dict(arguments.get("model_kwargs") or {})
    if arguments.get("gp"):
        given["global_pool"] = arguments["gp"]
    return {key: value for key, value in given.items() if not key.startswith(("pretrained", "drop_", "checkpoint_"))}


def _infer_any(state: Mapping[str, Tensor], path: Path, name: str, arguments: Mapping[str, Any]) -> Record:
    """The record of a classifier of any family of timm's."""
    classes, channels = find_ends(state, name)
    if classes is None or channels is None:
        raise ValueError(f"{path}: these are not the weights of a classifier {name}")
    return Record(
        model=name,
        model_args={**_built_with(arguments), "num_classes": classes, "in_chans": channels},
        classes=default_classes(classes),
    )


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


def infer_record(state: Mapping[str, Tensor], path: Path, *, model: str | None = None) -> Record:
    """Tell size, form, channels, classes and head of OverLoCK from the names and shapes in a file of its weights.

    Args:
        state: the authors' names or, of classifiers, ours.
        path: for messages.
        model: the size, where it is known.

    Raises:
        ValueError: where the weights are not those of OverLoCK.
    """
    if model is not None:
        check_model_name(model)
        if model not in VARIANTS:
            raise ValueError(f"{path}: only OverLoCK's weights can be read without a record, not those of {model}")
    dense = find_head(state)
    like = _infer_classifier(state, path) if dense is None else _infer_dense(*dense)
    reason = ""
    for name in [model] if model else VARIANTS:
        record = replace(like, model=name)
        with torch.device("meta"):
            network = record.make_network()
        try:
            (translate if dense is None else translate_dense)(state, network)
        except ValueError as error:
            reason = str(error)
            continue
        if dense is None:
            channels = record.model_args["in_chans"]
            record = replace(record, preprocessing=default_preprocessing(network, in_chans=channels))
        return record
    raise ValueError(f"{path}: {reason}" if model else f"{path}: these weights fit none of {', '.join(VARIANTS)}")


def _infer_classifier(state: Mapping[str, Tensor], path: Path) -> Record:
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
    return Record(model="", model_args=arguments, classes=default_classes(classifier.shape[0]))


def _infer_dense(head: str, count: int) -> Record:
    if head == "upernet":
        return Record(model="", head=head, classes=default_classes(count), preprocessing=dict(scale=PAPER_SCALE))
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = tuple(name for name in coco if name not in ("__background__", "N/A"))
    return Record(model="", head=head, classes=coco if count == len(coco) else default_classes(count))


def default_classes(count: int) -> tuple[str, ...]:
    """Names for the classes of weights that come without: ImageNet's for 1000, else numbers."""
    if count == 1000:
        names = ImageNetInfo()
        return tuple(names.index_to_description(i).split(",")[0] for i in range(count))
    return tuple(str(i) for i in range(count))


def default_preprocessing(
    model: nn.Module,
    *,
    in_chans: int,
    image_size: int | None = None,
    crop_pct: float | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """timm's data configuration of a model; other channels than colours are normalised by the average of the three.

    Args:
        model: with its ``pretrained_cfg``.
        in_chans: channels of the images.
        image_size: another one than the model's.
        crop_pct: another share of the image that the evaluation crop keeps.
        arguments: of timm's ``train.py``, which go before the model's configuration.
    """
    given = {key: (arguments or {}).get(key) for key in ("input_size", "img_size", "interpolation", "mean", "std")}
    if isinstance(given["input_size"], int):  # as other trainers name the side
        given |= dict(input_size=None, img_size=given["input_size"])
    crop_pct = crop_pct or (arguments or {}).get("crop_pct")
    config = resolve_data_config(given, pretrained_cfg=model.pretrained_cfg)
    size = (in_chans, *((image_size, image_size) if image_size else config["input_size"][1:]))
    mean, std = config["mean"], config["std"]
    if len(mean) != in_chans:
        mean, std = ((sum(values) / len(values),) * in_chans for values in (mean, std))
    return dict(
        input_size=size,
        mean=tuple(mean),
        std=tuple(std),
        interpolation=config["interpolation"],
        crop_pct=crop_pct or config["crop_pct"],
    )
