"""Where the annotations of objects are looked for, as settings and options say it; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["coco", "createml", "yolo", "voc", "labelme"]
"""The forms of annotations that are known."""


@dataclass(frozen=True, kw_only=True)
class ObjectFiles:
    """Where the images of a part of a data set and their annotations are to be looked for."""

    data: str
    """A folder, in a form and layout that is known."""
    format: Format | None = None
    """The form, where it is not to be told by what lies there."""
    split: str | None = None
    """Name of the part; the usual names are tried unless given."""
    annotations: str | None = None
    """A file of annotations, or folder of such files, if elsewhere."""
    images: str | None = None
    """The folder of their images; the data folder unless given."""
