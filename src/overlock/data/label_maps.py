"""Images with a label for each pixel: pairs of files, as ADE20K, Cityscapes, Pascal VOC and most others have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from overlock.data.colours import CITYSCAPES_IDS, FILES, TABLES, PixelClasses, read_pixel_classes
from overlock.data.files import read_image
from overlock.data.image_sizes import SIDEWAYS, read_orientation, turn_masks
from overlock.data.images import TEST_SHARE, ImageData
from overlock.data.label_folders import (
    Pairs,
    find_part,
    find_whole,
    is_cityscapes,
    is_voc,
    nothing_found,
)
from overlock.data.label_values import LabelForm, Labels
from overlock.data.parts import TEST_PARTS, TRAIN_PARTS
from overlock.data.pixel_counts import count_pixels, tell_pixels
from overlock.label_files import LabelFiles


class LabelMaps:
    """Images and their label maps.

    Args:
        pairs: the files.
        form: how the maps are read.
    """

    def __init__(self, pairs: Pairs, form: LabelForm):
        self.images, self.maps, self.form, self.folder = pairs.images, pairs.maps, form, pairs.map_folder
        self.notes = pairs.notes

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, tv_tensors.Mask]:
        """An image as RGB, and its labels (H, W), the ignored ones :data:`overlock.data.label_values.IGNORED`.

        Raises:
            ValueError: for a file that cannot be read, another size, or a label that is no class, naming the file.
        """
        image, path = read_image(self.images[index]), self.maps[index]
        labels = self.form.read(path)
        if labels.shape == image.size != image.size[::-1]:  # of the stored image, which was turned upright
            *_, turn = read_orientation(self.images[index])
            if turn in SIDEWAYS:
                labels = turn_masks(torch.from_numpy(labels)[None], turn)[0].numpy()
        if labels.shape != (image.height, image.width):
            height, width = labels.shape
            raise ValueError(
                f"{path}: the label map is of {height} x {width} pixels, its image of {image.height} x {image.width}"
            )
        return image, tv_tensors.Mask(torch.from_numpy(labels))

    def name(self, index: int) -> str:
        """The file of an image."""
        return str(self.images[index])

    def read_values(self, index: int) -> Labels:
        """The numbers in a map (H, W), as they stand there. Raises ValueError, naming the file."""
        return self.form.read_values(self.maps[index])


def load_label_maps(files: LabelFiles, *, seed: int = 0) -> ImageData:
    """The parts of a folder of images and label maps to train on and to test on.

    Where there is no part to test on a fifth of the images is held out. The notes have a table of the pixels of each
    class.

    Args:
        files: where they are, and how they are read.
        seed: of what is held out.

    Raises:
        ValueError: where there is no such part or no names, or where most of the maps cannot be right: without a pixel
            that counts, with values that are no class, or of 0 and 255, the ignored label, alone.
    """
    train, test, held_out = _find_parts(files, seed)
    classes = find_classes(files, train)
    form = make_form(files, train, classes)
    parts = LabelMaps(train, form), LabelMaps(test, form)
    # What the values of the maps to train on mean is settled when those to test on are counted.
    counts = [count_pixels(part, form, doubtful=part is parts[0]) for part in parts]
    notes = dict.fromkeys((*train.notes, *test.notes))
    if held_out:
        notes[f"{files.data}: there is no part to test on, so {len(test.images)} of the images are held out"] = None
    both = set(train.images) & set(test.images)
    if both:
        notes[f"{len(both)} images to test on are to train on too, which flatters the score (first: {min(both)})"] = (
            None
        )
    return ImageData(
        classes=classes.names, train=parts[0], test=parts[1], notes=(*notes, *tell_pixels(counts, classes.names))
    )


def load_label_test(files: LabelFiles, *, classes: Sequence[str], held_out: bool = False, seed: int = 0) -> LabelMaps:
    """The part to test on alone.

    A folder without parts is taken whole; one with a part to train on and none to test on is refused.

    Args:
        files: where it is, and how it is read.
        classes: of the model, which the data's names must agree with where it has some.
        held_out: of a folder without a part to test on, take the fifth that :func:`load_label_maps` holds out.
        seed: of that fifth.

    Raises:
        ValueError: as :func:`load_label_maps`; and for other classes than the model's.
    """
    root, parts = Path(files.data), (files.val_split,) if files.val_split else TEST_PARTS
    _check_folder(root)
    pairs = _find_parts(files, seed)[1] if held_out else find_part(root, parts)
    if pairs is None and not files.val_split:
        if find_part(root, TRAIN_PARTS) is not None:
            raise ValueError(
                f"{root}: there is a part to train on and none to test on; name one with --val_split, or take what "
                "training holds out with --held_out"
            )
        pairs = find_whole(root)
    if pairs is None:
        raise nothing_found(root, parts)
    notes = pairs.notes
    table = find_classes(files, pairs, default=classes)
    if table.names != tuple(classes):
        if len(table.names) != len(classes) or set(table.names) == set(classes):
            what = "in another order" if set(table.names) == set(classes) else f"{len(table.names)}"
            raise ValueError(f"{table.source}: its classes are {what}, the model's are {', '.join(classes)}")
        notes += (f"{table.source}: its classes are called otherwise than the model's; the order is taken",)
    source = LabelMaps(pairs, make_form(files, pairs, table))
    source.notes = notes + count_pixels(source, source.form).problems
    return source


def _find_parts(files: LabelFiles, seed: int) -> tuple[Pairs, Pairs, bool]:
    """What to train on, what to test on, and whether that was held out of the former."""
    root = Path(files.data)
    _check_folder(root)
    train_names = (files.train_split,) if files.train_split else TRAIN_PARTS
    test_names = (files.val_split,) if files.val_split else TEST_PARTS
    train, test = find_part(root, train_names), find_part(root, test_names)
    if test is None and files.val_split:
        raise nothing_found(root, test_names)
    if train is None and (files.train_split or test is not None):
        raise nothing_found(root, train_names)
    if train is None:
        train = find_whole(root)
    if train is None:
        raise nothing_found(root, train_names)
    return (*_split(train, seed), True) if test is None else (train, test, False)


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder of images and label maps")


def _split(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs]:
    """Hold out a fifth of the images."""
    count = len(pairs.images)
    if count < 2:
        raise ValueError(f"{pairs.folder}: one image; training and testing need one each")
    order = np.random.default_rng(seed).permutation(count)
    held = max(1, round(TEST_SHARE * count))
    return pairs.chosen(sorted(order[held:].tolist())), pairs.chosen(sorted(order[:held].tolist()))


def find_classes(files: LabelFiles, pairs: Pairs, *, default: Sequence[str] = ()) -> PixelClasses:
    """Names and colours of the classes: from the file that was named, else the one in the folder, else a known table.

    Raises:
        ValueError: where there is none; and as :func:`overlock.data.colours.read_pixel_classes`.
    """
    known = None if files.colours is None else TABLES.get(files.colours) or read_pixel_classes(Path(files.colours))
    if files.classes:
        named = read_pixel_classes(Path(files.classes))
        if known is None:
            return named
        if len(named.names) != len(known.names):
            raise ValueError(
                f"{files.classes}: {len(named.names)} names, where {known.source} has {len(known.names)} colours"
            )
        return replace(known, names=named.names)
    if known is not None:
        return known
    root = Path(files.data)
    places = [folder / name for folder in (root, pairs.folder, pairs.maps[0].parent) for name in FILES]
    path = next((path for path in places if path.is_file()), None)
    if path is None and default:
        return PixelClasses(names=tuple(default), source="the model")
    if path is None and (is_voc(pairs) or is_cityscapes(pairs)):
        return TABLES["voc" if is_voc(pairs) else "cityscapes"]
    return read_pixel_classes(path or root / FILES[0])


def make_form(files: LabelFiles, pairs: Pairs, classes: PixelClasses) -> LabelForm:
    """How the maps are read.

    Raises:
        ValueError: where labels does not name as many values as there are classes.
    """
    values, count = files.values, len(classes.names)
    if values and len(values) != count:
        raise ValueError(
            f"labels names {len(values)} values, but there are {count} classes: {', '.join(classes.names)}"
        )
    by_id = not values and pairs.ending.endswith("_labelIds") and count == len(CITYSCAPES_IDS)
    return LabelForm(
        num_classes=count, reduce_zero_label=files.reduce_zero_label, ignore_index=files.ignore_index,
        values=CITYSCAPES_IDS if by_id else values, others_ignored=by_id, table=classes,
    )  # fmt: skip
