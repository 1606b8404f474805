"""Images with a label for each pixel: pairs of files, as ADE20K has them and most others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from overlock.data.files import IMAGE_SUFFIXES, find_images, read_image

IGNORED = 255


class LabelMaps:
    """Images in one folder, their label maps as PNG files of the same names in another.

    A map's values are the classes, from 0 on. With ``shift`` they begin at 1, and 0 ('other') is ignored, as in ADE20K.

    Args:
        images: folder of the images, and of folders of them.
        labels: folder of the maps.
        num_classes: values from here on, but for the ignored one, are refused.
        shift: take 1 from each label; 0 is ignored.
        ignore_index: value of pixels that do not count.

    Raises:
        ValueError: for a folder without images, or images without a map.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        *,
        num_classes: int,
        shift: bool = False,
        ignore_index: int = IGNORED,
    ):
        root = Path(images)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder of images")
        self.images = find_images([root])
        self.maps = [(Path(labels) / path.relative_to(root)).with_suffix(".png") for path in self.images]
        self.num_classes, self.shift, self.ignore_index = num_classes, shift, ignore_index
        absent = [path for path in self.maps if not path.is_file()]
        if absent:
            raise ValueError(
                f"{len(absent)} of the {len(self.maps)} images in {root} have no label map (first: {absent[0]}); maps "
                f"are PNG files with the images' names, and images end in {', '.join(IMAGE_SUFFIXES)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, tv_tensors.Mask]:
        """An image as RGB, and its labels (H, W), the ignored ones 255.

        Raises:
            ValueError: for a file that cannot be read, another size, or a label that is no class, naming the file.
        """
        image, path = read_image(self.images[index]), self.maps[index]
        try:
            with Image.open(path) as file:
                if file.mode not in ("L", "P", "I", "I;16"):
                    raise ValueError(
                        f"{path}: a label map has one number a pixel, this is an image of mode {file.mode}"
                    )
                labels = np.asarray(file).astype(np.int64)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path}: the label map cannot be read ({error})") from None
        if labels.shape != (image.height, image.width):
            height, width = labels.shape
            raise ValueError(
                f"{path}: the label map is of {height} x {width} pixels, its image of {image.height} x {image.width}"
            )
        ignored = labels == self.ignore_index
        if self.shift:
            ignored |= labels == 0
            labels = labels - 1
        wrong = ~ignored & (labels >= self.num_classes)
        if wrong.any():
            found = int(labels[wrong][0]) + self.shift
            raise ValueError(
                f"{path}: a label is {found}, where classes go from {int(self.shift)} to "
                f"{self.num_classes - 1 + self.shift} and {self.ignore_index} is ignored; check num_classes and shift"
            )
        return image, tv_tensors.Mask(torch.from_numpy(np.where(ignored, IGNORED, labels)))
