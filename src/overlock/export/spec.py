"""What an exported file is: its format, task, precision and shapes, and the network's record. It lies in the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from overlock.checkpoints import Record
from overlock.version import __version__

Format = Literal["onnx", "openvino", "torch-export", "aoti", "executorch"]
Task = Literal["classify", "features", "detect", "segment"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Axis = Literal["batch", "size"]

ENDINGS: dict[str, str] = {
    "onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "aoti": ".aoti.pt2", "executorch": ".pte",
}  # fmt: skip
"""Of the files of each format."""
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "int8"), "openvino": get_args(Precision), "torch-export": ("fp32",), "aoti": ("fp32",),
    "executorch": ("fp32",),
}  # fmt: skip
DETECTING: tuple[str, ...] = ("onnx", "openvino", "torch-export")
"""Formats that detectors can be written in."""
KEY = "overlock"
"""Name of the metadata in a file."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an exported file computes, and on which images.

    Raises:
        ValueError: for what cannot be exported so, with the mend.
    """

    record: Record
    """Of the network: its classes, and how images are prepared."""
    format: Format
    task: Task
    image_size: tuple[int, int]
    """Height and width of the images, in pixels; of free sizes those that it was traced at."""
    precision: Precision = "fp32"
    dynamic: tuple[Axis, ...] = ()
    """What may differ from call to call: 'batch', which else is 1, and 'size'."""
    with_preprocessing: bool = False
    """Whether it takes pixels of 0 to 255 and normalises them itself; else normalised images."""
    smallest_image: int = 1
    """Least side of images of a free size, in pixels."""

    def __post_init__(self) -> None:
        own = self.record.task
        if self.task not in (own, "features"):
            raise ValueError(f"a {self.record.name} is exported with --task {own} or features, not {self.task}")
        if self.task == "detect":
            self._check_detector()
        if self.precision not in PRECISIONS[self.format]:
            takes = " or ".join(PRECISIONS[self.format])
            raise ValueError(f"--format {self.format} takes --precision {takes}, not {self.precision}")
        if self.format == "executorch" and "size" in self.dynamic:
            raise ValueError("--format executorch plans its memory for one size; leave size out of --dynamic")
        if "size" in self.dynamic and min(self.image_size) < self.smallest_image:
            raise ValueError(
                f"--dynamic size needs maps no smaller than the kernels, so images from {self.smallest_image} pixels "
                f"on; give such an --image_size, or leave size out"
            )

    def _check_detector(self) -> None:
        """Raise ValueError for what the objects of a detector cannot be exported as, since their number differs."""
        if self.format not in DETECTING:
            raise ValueError(f"--task detect takes --format {', '.join(DETECTING)}, not {self.format}")
        if self.precision != "fp32":
            raise ValueError(f"--task detect takes --precision fp32, not {self.precision}")
        if "batch" in self.dynamic:
            raise ValueError("--task detect takes one image a call; leave batch out of --dynamic")

    @property
    def file_ending(self) -> str:
        return ENDINGS[self.format]

    def to_json(self) -> str:
        content = asdict(self) | dict(record=json.loads(self.record.to_json()), version=__version__)
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The spec that :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: for what is none.
        """
        content: dict[str, Any] = json.loads(text)
        del content["version"]
        content["record"] = Record.from_json(json.dumps(content["record"]))
        for name in ("image_size", "dynamic"):
            content[name] = tuple(content[name])
        return cls(**content)

    def check_images(self, shape: Sequence[int]) -> None:
        """Raise ValueError for images (B, C, H, W) that the file does not take."""
        batch, channels, *size = shape
        if channels != self.record.channels:
            raise ValueError(f"images must have {self.record.channels} channels, got {channels}")
        if "size" not in self.dynamic and tuple(size) != self.image_size:
            raise ValueError(
                f"this file takes images of {' x '.join(map(str, self.image_size))} pixels, got "
                f"{' x '.join(map(str, size))}; export it with --dynamic size for others"
            )
        if min(size) < self.smallest_image:
            raise ValueError(f"this file takes images from {self.smallest_image} pixels on, got {min(size)}")
        if batch < 1:
            raise ValueError("the batch of images is empty")


def format_of(path: Path) -> str | None:
    """The format of a file by its ending; None for others."""
    names = sorted(ENDINGS, key=lambda name: -len(ENDINGS[name]))
    return next((name for name in names if path.name.endswith(ENDINGS[name])), None)
