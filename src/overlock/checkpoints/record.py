"""What goes with the weights in a file of ours: all that is needed to build the network and to prepare its images."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.data import resolve_data_config
from torch import Tensor, nn

from overlock.checkpoints.defaults import default_classes
from overlock.files import write_atomically
from overlock.network import VARIANTS
from overlock.tasks.cascade import cascade_mask_rcnn, cascade_rcnn
from overlock.tasks.detection import faster_rcnn, mask_rcnn
from overlock.tasks.segmentation import upernet

HEADS: dict[str, Callable[..., nn.Module]] = dict(
    faster_rcnn=faster_rcnn,
    mask_rcnn=mask_rcnn,
    cascade_rcnn=cascade_rcnn,
    cascade_mask_rcnn=cascade_mask_rcnn,
    upernet=upernet,
)
"""What makes a dense model of a backbone, by name."""
MODEL_FILE = "model.safetensors"
"""The final weights of a run, in its folder."""
CONFIG_FILE = "config.json"
"""timm's configuration, beside them."""
TIMM_FILES = (MODEL_FILE, "pytorch_model.bin")
"""Names of the files that timm's configuration lies beside."""
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

    @property
    def channels(self) -> int:
        """Of the images."""
        size = self.preprocessing.get("input_size")
        return int(size[0] if size else self.model_args.get("in_chans", 3))

    def make_network(self, *, pretrained: bool = False) -> nn.Module:
        """The network, with weights yet to be loaded.

        Args:
            pretrained: with the weights that timm has for the model.

        Raises:
            ValueError: for a model or keywords that will not do.
            OSError: where the weights that timm has cannot be fetched.
            ImportError: without the library of the head.
        """
        if self.head is None:
            return build(self.model, pretrained=pretrained, **self.model_args)
        check_model_name(self.model)
        try:
            return HEADS[self.head](self.model, num_classes=len(self.classes), pretrained=pretrained, **self.model_args)
        except TypeError as error:
            raise ValueError(f"{self.name} cannot be built so: {error}") from None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that :meth:`to_json` wrote.

        Raises:
            ValueError: for what is none, or has parts that this version of the package does not know.
        """
        content = json.loads(text)
        unknown = sorted(content.keys() - {part.name for part in fields(cls)})
        if content.get("head") not in (None, *HEADS):
            unknown.append(str(content["head"]))
        if unknown:
            raise ValueError(f"its record has {', '.join(unknown)}, which a newer overlock wrote; update the package")
        return cls(**{name: _with_tuples(value) for name, value in content.items()})


def _with_tuples(value: Any) -> Any:
    """What JSON has as lists, as it was."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


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


def _label_names(given: Any, count: int) -> tuple[str, ...]:
    """Those of timm's configuration, a list or a dict by number; the usual ones where it has none."""
    if isinstance(given, dict):
        given = [given.get(str(i), str(i)) for i in range(count)]
    names = tuple(map(str, given or default_classes(count)))
    if len(names) != count:
        raise ValueError(f"label_names has {len(names)} names for {count} classes")
    return names


def from_timm_config(text: str) -> Record:
    """The record of a classifier in the form of timm's ``config.json``, as timm uploads it.

    Raises:
        KeyError, TypeError, ValueError: for what is none.
    """
    config = json.loads(text)
    its_own = config.get("pretrained_cfg") or {}
    count = int(config.get("num_classes", its_own.get("num_classes")))
    size = tuple(its_own["input_size"])
    prepared = resolve_data_config(pretrained_cfg=its_own)  # timm's own defaults for what it left out
    kept = ("mean", "std", "interpolation", "crop_pct")
    squashed = {} if prepared["crop_mode"] == "center" else {"crop_mode": prepared["crop_mode"]}
    arguments = {"in_chans": size[0], **_with_tuples(config.get("model_args") or {}), "num_classes": count}
    return Record(
        model=config["architecture"],
        model_args=arguments,
        classes=_label_names(config.get("label_names") or its_own.get("label_names"), count),
        preprocessing={"input_size": size, **{name: _with_tuples(prepared[name]) for name in kept}, **squashed},
    )


def read_record(path: Path) -> Record | None:
    """The record in a safetensors file of ours, or in timm's configuration beside timm's file; None for other files.

    Raises:
        ValueError: for a file that cannot be read, or whose record cannot.
    """
    beside = path.with_name(CONFIG_FILE)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if _METADATA_KEY in metadata:
                return Record.from_json(metadata[_METADATA_KEY])
        if path.name in TIMM_FILES and beside.is_file():
            path = beside
            return from_timm_config(beside.read_text(encoding="utf-8"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from None
    return None


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
