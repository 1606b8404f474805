"""Where images and their label maps are looked for, as settings and options say it; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LabelFiles:
    """Where images and label maps are to be looked for, and how the maps are read.

    Raises:
        ValueError: for both labels and reduce_zero_label.
    """

    data: str
    """A folder; see :mod:`overlock.data.label_folders` for where images and maps may lie in it."""
    train_split: str | None = None
    """Name of the part to train on; the usual names are tried unless given."""
    val_split: str | None = None
    """Name of the part to test on."""
    classes: str | None = None
    """File of the classes' names, and colours; else classes.txt in the folder and other known ones."""
    colours: str | None = None
    """'voc' or 'cityscapes', or a file of names and colours."""
    labels: str | None = None
    """Pixel values of the classes in their order, such as '0,255'."""
    reduce_zero_label: bool = False
    """As in :class:`overlock.data.label_values.LabelForm`."""
    ignore_index: int = 255
    """Likewise."""

    def __post_init__(self) -> None:
        if self.labels is not None and self.reduce_zero_label:
            raise ValueError("labels says which values are classes, and so does reduce_zero_label; give one of them")

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers in ``labels``; none where it is not given."""
        return parse_labels(self.labels)


def parse_labels(text: str | None) -> tuple[int, ...]:
    """The pixel values of classes, from '0,255' and the like; none of None.

    Raises:
        ValueError: for what is no list of two or more different whole numbers from 0 on.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.strip(" []()").split(",")]
    if len(parts) < 2 or not all(part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ValueError(
            f"labels must be the pixel values of two or more classes in their order, such as 0,255, got {text!r}"
        )
    return tuple(int(part) for part in parts)
