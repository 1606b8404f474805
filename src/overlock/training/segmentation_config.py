"""The settings of a segmenter's run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from overlock.label_files import LabelFiles, parse_labels
from overlock.settings import check_number
from overlock.training.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(RunConfig):
    """How a segmenter, UperNet, is trained. Raises ValueError for values that cannot be."""

    task: Literal["segment"] = "segment"
    """What is learnt: the class of each pixel."""
    data: str
    """Folder of images and of label maps, PNG files of the same names or with an ending such as _mask: images/PART and
    annotations/PART (or labels, masks), PART and PARTannot, PART/images and PART/annotations, Cityscapes' and Pascal
    VOC's trees, or images and masks without parts; PART is train, val and so on. Without a part to test on a fifth is
    held out."""
    labels: str | None = None
    """Pixel values of the classes, in their order: 0,255 for masks of 0 and 255. They are 0, 1, 2 and so on unless
    given."""
    colours: str | None = None
    """Colours of the classes, for label maps that are pictures: voc, cityscapes, or a file of lines 'name r g b';
    those of classes.txt, where it has some, unless given."""
    reduce_zero_label: bool = False
    """Labels begin at 1, and 0 is ignored, as in ADE20K."""
    ignore_index: int = 255
    """Value of pixels that do not count, unless labels has it."""
    hidden_channels: int = 512
    """Width of the head."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    scale: tuple[int, int] = (2048, 512)
    """Longest and shortest side that images are brought within."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Share of that scale in training, drawn between these."""
    crop: int = 512
    """Side of the crops to train on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_channels", "crop"):
            check_number(name, getattr(self, name), 32)
        check_number("aux_weight", self.aux_weight, 0)
        parse_labels(self.labels)
        if self.labels is not None and self.reduce_zero_label:
            raise ValueError("labels says which values are classes, and so does reduce_zero_label; give one of them")
        for side in self.scale:
            check_number("scale", side, 32)
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be a range above 0, got {self.ratio[0]:g} to {self.ratio[1]:g}")

    @property
    def label_files(self) -> LabelFiles:
        """Where the images and label maps are, and how these are read."""
        return LabelFiles(
            data=self.data, train_split=self.train_split, val_split=self.val_split, classes=self.classes,
            colours=self.colours, labels=self.labels, reduce_zero_label=self.reduce_zero_label,
            ignore_index=self.ignore_index,
        )  # fmt: skip
