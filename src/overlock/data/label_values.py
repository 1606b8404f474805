"""What the pixels of a label map say: numbers, bits or colours become classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from overlock.data.colours import PixelClasses

IGNORED = -1
"""Label of pixels that do not count, which no class can have; what the files have for it is ``ignore_index``."""
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class LabelForm:
    """How label maps are read."""

    num_classes: int
    """Values from here on, but for the ignored one, are refused."""
    reduce_zero_label: bool = False
    """Labels begin at 1, and 0 is ignored, as in ADE20K."""
    ignore_index: int = 255
    """Value of pixels that do not count, unless it is the value of a class."""
    values: tuple[int, ...] = ()
    """Pixel values of the classes, in their order; 0, 1, 2 and so on unless given."""
    others_ignored: bool = False
    """Whether other values do not count, rather than being refused."""
    table: PixelClasses | None = None
    """Colours of the classes, for maps that are pictures."""

    def read(self, path: Path) -> Labels:
        """The labels of a map (H, W), the ignored ones :data:`IGNORED`.

        Raises:
            ValueError: for a file that cannot be read, or a value or a colour that is no class, naming the file.
        """
        values = self.read_values(path)
        labels, wrong = self.to_labels(values)
        if wrong.any():
            raise ValueError(f"{path}: a label is {int(values[wrong][0])}, where {self.describe()}")
        return labels

    def read_values(self, path: Path) -> Labels:
        """The numbers in a file (H, W); of colours, the numbers that stand for their classes."""
        try:
            with Image.open(path) as file:
                return self._values(file)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: the label map cannot be read ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _values(self, file: Image.Image) -> Labels:
        mode = file.mode
        if mode == "1":
            # The two values of a bit are 0 and 1, or what is named as such: other programs write 0 and 255.
            bits = np.asarray(file).astype(np.int64)
            return 255 * bits if 255 in self.values and 1 not in self.values else bits
        if mode == "P":
            return self._of_palette(file)
        if mode == "L" or mode.startswith("I"):
            return np.asarray(file).astype(np.int64)
        if mode not in ("RGB", "RGBA", "LA"):
            raise ValueError(f"a label map has one number a pixel or a colour, this is an image of mode {mode}")
        pixels = np.asarray(file.convert("RGB" if mode == "RGB" else "RGBA"))
        if pixels.shape[2] == 4 and (pixels[..., 3] < 255).any():
            raise ValueError("some pixels are transparent; save label maps without an alpha channel")
        pixels = pixels[..., :3]
        if self.table is not None and self.table.colours:
            return self._numbers(self.table.look_up(pixels, ignored=IGNORED))
        if (pixels == pixels[..., :1]).all():
            return pixels[..., 0].astype(np.int64)
        raise ValueError(
            "a label map has one number a pixel, this is a picture in colours; name the classes' colours by lines "
            "'name r g b' in classes.txt, or with --colours voc or cityscapes"
        )

    def _of_palette(self, file: Image.Image) -> Labels:
        """The indices; the colours that they stand for where the classes' colours are known and these are some."""
        indices = np.asarray(file).astype(np.int64)
        if self.table is None or not self.table.colours:
            return indices
        try:
            return self._numbers(self.table.look_up(np.asarray(file.convert("RGB")), ignored=IGNORED))
        except ValueError:
            return indices

    def _numbers(self, labels: Labels) -> Labels:
        """Values in the sense of :meth:`to_labels` for labels that are known."""
        known: Any = np.array(self.values or range(self.reduce_zero_label, self.num_classes + self.reduce_zero_label))
        return np.where(labels == IGNORED, IGNORED, known[labels])

    def to_labels(self, values: Labels) -> tuple[Labels, NDArray[np.bool_]]:
        """Labels of values, and which values are wrong: neither a class nor ignored.

        Args:
            values: of any shape.
        """
        ignored = (values == IGNORED) | (values == self.ignore_index)
        if self.values:
            known = np.array(self.values)
            order = np.argsort(known)
            places = np.searchsorted(known, values, sorter=order).clip(max=len(known) - 1)
            labels = order[places]
            match = known[labels] == values
            wrong = ~match & ~ignored & (not self.others_ignored)
            return np.where(match, labels, IGNORED), wrong
        if self.reduce_zero_label:
            ignored |= values == 0
        labels = values - self.reduce_zero_label
        wrong = ~ignored & ((labels >= self.num_classes) | (labels < 0))
        return np.where(ignored, IGNORED, labels), wrong

    def describe(self) -> str:
        """Which values there may be, and what to change."""
        if self.values:
            listed = ", ".join(map(str, self.values))
            more = "" if self.ignore_index in self.values else f" and {self.ignore_index} is ignored"
            return f"the classes are {listed}{more}; check labels"
        last = self.num_classes - 1 + self.reduce_zero_label
        return (
            f"classes go from {int(self.reduce_zero_label)} to {last} and {self.ignore_index} is ignored; check the "
            "names of the classes, reduce_zero_label and ignore_index, or name the values of the classes with --labels"
        )
