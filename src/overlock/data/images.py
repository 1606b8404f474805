"""Labelled images that are all at hand: folders of classes, packed files, and scikit-learn's handwritten digits."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from overlock.data.duplicates import tell_duplicates
from overlock.data.files import images_in, is_image, is_rubbish, read_image, subfolders, tell_left_out
from overlock.data.parts import find_parts
from overlock.extras import needing
from overlock.files import write_atomically

Sample = tuple["Path | Image.Image", int]
TEST_SHARE = 0.2


class ImageSource(Protocol):
    """Labelled images by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its label. Raises ValueError, naming the image, where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What messages call an image: its file."""
        ...


class Samples(tuple[Sample, ...]):
    """Files or images in memory, with their labels."""

    __slots__ = ()

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self[index]
        return (image if isinstance(image, Image.Image) else read_image(image)), label

    def name(self, index: int) -> str:
        image = self[index][0]
        return f"image {index}" if isinstance(image, Image.Image) else str(image)


class PackedImages:
    """Encoded images end to end in one npz file: ``jpeg`` (bytes), ``offsets`` (N + 1), ``labels`` (N).

    Raises:
        ValueError: for a file that is not of this form.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                self.bytes, self.offsets, self.labels = file["jpeg"], file["offsets"], file["labels"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a readable file of packed images ({error})") from None
        if len(self.offsets) != len(self.labels) + 1:
            raise ValueError(f"{path}: {len(self.labels)} labels need {len(self.labels) + 1} offsets of their images")
        if np.any(np.diff(self.offsets.astype(np.int64)) < 0) or int(self.offsets[-1]) > len(self.bytes):
            raise ValueError(f"{path}: the offsets do not rise from 0 to its {len(self.bytes)} bytes of images")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        data = self.bytes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return read_image(io.BytesIO(data), name=self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of labelled images, split."""

    classes: tuple[str, ...]
    """Names of the classes; a label is a place in them."""
    train: Any
    """Images to train on: an :class:`ImageSource`, or an :class:`overlock.data.readers.ImageStream`."""
    test: Any
    """The held-out part, of the same kind."""
    hflip: bool = True
    """Whether a horizontally flipped image is still one of its class."""
    crop_pct: float | None = None
    """Share of the image that the test crop keeps, where objects fill the images; None is the model's own."""
    notes: tuple[str, ...] = ()
    """What was left out or read in another way than it stands there, a line each, to be told once."""


def load_packed(root: Path, *, train_split: str = "train", val_split: str = "test") -> ImageData:
    """A folder of :class:`PackedImages`; the images are small, so that the test crop keeps them whole."""
    paths = [root / f"{name}.npz" for name in (train_split, val_split)]
    if not all(path.is_file() for path in (root / "classes.txt", *paths)):
        raise ValueError(f"{root}: {paths[0].name}, {paths[1].name} and classes.txt are needed")
    classes, (train, test) = read_classes(root / "classes.txt"), map(PackedImages, paths)
    for part in (train, test):
        if len(part) == 0 or part.labels.min() < 0 or part.labels.max() >= len(classes):
            found = f"labels from {part.labels.min()} to {part.labels.max()}" if len(part) else "no images"
            raise ValueError(f"{part.path}: {found}, where classes.txt has {len(classes)} names, from 0 on")
    return ImageData(classes=classes, train=train, test=test, crop_pct=1.0)


def read_classes(path: Path) -> tuple[str, ...]:
    """Names, one a line.

    Raises:
        ValueError: for a missing file, or fewer than two names.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file of class names")
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) < 2:
        raise ValueError(f"{path}: {len(names)} class names; at least two are needed, one a line")
    return names


def load_folder(
    root: Path, *, seed: int, train_split: str | None = None, val_split: str | None = None, classes: str | None = None
) -> ImageData:
    """See :func:`load_data`."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; data must be a folder of images by class, a tar file or 'digits'")
    parts = find_parts(root, train_split, val_split)
    if parts is None or parts[1] is None:
        folder = root if parts is None else parts[0]
        samples, names, notes = read_class_folders(folder, classes)
        train, test = split(samples, names, folder, seed)
        if parts is not None:
            notes += tell_held_out(folder, len(test), len(samples))
        return ImageData(classes=names, train=train, test=test, notes=notes + tell_duplicates(samples, (), names))
    samples, names, notes = read_class_folders(parts[0], classes)
    tested, test_notes = _read_test(parts[1], names, root)
    notes += test_notes + tell_duplicates(samples, tested, names)
    return ImageData(classes=names, train=Samples(samples), test=Samples(tested), notes=notes)


Read = tuple[tuple[Sample, ...], tuple[str, ...], tuple[str, ...]]


def read_class_folders(root: Path, classes: str | None) -> Read:
    """Samples, names and notes of a folder whose folders are classes."""
    folders = subfolders(root)
    if len(folders) < 2:
        raise ValueError(f"{root}: found {len(folders)} class folders; at least two are needed, named by their class")
    if classes is not None:
        folders = _in_order(folders, Path(classes))
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    for label, folder in enumerate(folders):
        files = images_in(folder, left_out)
        if not files:
            reason = "".join(f"; {note}" for note in tell_left_out(folder.name, left_out))
            raise ValueError(f"{folder}: no images of this class; add some or remove the folder{reason}")
        samples += [(file, label) for file in files]
    loose = sum(is_image(path) and not is_rubbish(path.name) for path in root.iterdir())
    notes = tell_left_out(root, left_out)
    if loose:
        notes += (f"{root}: {loose} images lie beside the folders of classes and are left out",)
    return tuple(samples), tuple(folder.name for folder in folders), notes


def _in_order(folders: Sequence[Path], classes: Path) -> list[Path]:
    """Class folders in the order of a file of their names."""
    known, names = {folder.name: folder for folder in folders}, read_classes(classes)
    odd = sorted(set(known) ^ set(names))
    if odd or len(set(names)) < len(names):
        what = f"{odd[0]!r} is not in both of the file and the folders" if odd else "a name is there twice"
        raise ValueError(f"{classes}: {what}; classes must name each class folder once, in the order of the labels")
    return [known[name] for name in names]


def _read_test(root: Path, names: tuple[str, ...], data: Path) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Samples and notes of the part to test on, which may lack classes but not have others."""
    left_out: Counter[str] = Counter()
    files = {folder.name: images_in(folder, left_out) for folder in subfolders(root)}
    empty = [name for name, images in files.items() if not images and name not in names]
    notes = tell_left_out(root, left_out)
    if not any(files.values()):
        raise ValueError(f"{root}: no images of any class to test on; folders by class are needed here too")
    present = {name for name, images in files.items() if images}
    notes += match_classes(names, {*present, *empty}, root, data)
    return tuple((file, names.index(name)) for name, images in files.items() for file in images), notes


def match_classes(names: Sequence[str], present: Collection[str], part: object, data: object) -> tuple[str, ...]:
    """A note of the classes that the part to test on lacks.

    Args:
        names: of the classes to train on.
        present: of those to test on.
        part: to test on, for messages.
        data: of which it is a part, likewise.

    Raises:
        ValueError: for a class to test on that is not to train on.
    """
    strange = sorted(set(present) - set(names))
    if strange:
        called = part.name if isinstance(part, Path) else part
        raise ValueError(
            f"{data}: class {strange[0]!r} of {called!r} is not among those to train on; add images of it to the "
            "training part or remove it"
        )
    absent = [name for name in names if name not in present]
    if not absent:
        return ()
    more = ", ..." if len(absent) > 5 else ""
    return (f"{part}: no images of {len(absent)} of the classes to test on ({', '.join(absent[:5])}{more})",)


def tell_held_out(folder: Path, count: int, total: int) -> tuple[str, ...]:
    """The note of a part to train on without one to test on beside it."""
    return (f"{folder}: there is no part to test on, so {count} of the {total} images are held out",)


def split(samples: Sequence[Sample], classes: Sequence[str], where: object, seed: int) -> tuple[Samples, Samples]:
    """Hold out a fifth of each class, at least one image."""
    out = held_out([label for _, label in samples], classes, where, seed)
    train = Samples(sample for sample, o in zip(samples, out, strict=True) if not o)
    return train, Samples(sample for sample, o in zip(samples, out, strict=True) if o)


def held_out(labels: Sequence[int], classes: Sequence[str], where: object, seed: int) -> np.ndarray[Any, Any]:
    """Which of the images to hold out, as booleans (N,)."""
    random = np.random.default_rng(seed)
    places = np.asarray(labels)
    out = np.zeros(len(places), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(places == label)
        if len(members) < 2:
            raise ValueError(f"{where}: class {name!r} has one image; training and testing need one each")
        out[random.permutation(members)[: max(1, round(TEST_SHARE * len(members)))]] = True
    return out


def load_digits(*, seed: int) -> ImageData:
    """Scikit-learn's handwritten digits, dark background, a fifth of each held out."""
    with needing("the digits need scikit-learn", "train"):
        from sklearn import datasets  # noqa: PLC0415
    digits = datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    samples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    classes = tuple(str(name) for name in digits.target_names)
    train, test = split(samples, classes, "digits", seed)
    return ImageData(classes=classes, train=train, test=test, hflip=False, crop_pct=1.0)


def save_examples(data: ImageData, folder: Path) -> list[Path]:
    """Write the first held-out image of each class as a file, where the data are not files themselves.

    Raises:
        ValueError: where they cannot be written.
    """
    written: dict[int, Path] = {}
    for image, label in data.test if isinstance(data.test, Samples) else ():
        if label in written or not isinstance(image, Image.Image):
            continue
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        written[label] = folder / f"{data.classes[label]}.png"
        write_atomically(written[label], buffer.getvalue())
    return sorted(written.values())
