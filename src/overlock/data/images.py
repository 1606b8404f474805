"""Labelled images that are all at hand: folders of classes, packed files, and scikit-learn's handwritten digits."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from overlock.data.files import IMAGE_SUFFIXES, read_image
from overlock.files import write_atomically

Sample = tuple["Path | Image.Image", int]
READERS = ("wds:", "hfds:", "hfids:")
TEST_FOLDERS = ("val", "validation", "valid", "test")
TEST_SHARE = 0.2


class ImageSource(Protocol):
    """Labelled images by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its label. Raises ValueError, naming the image, where it cannot be read."""
        ...


class Samples(tuple[Sample, ...]):
    """Files or images in memory, with their labels."""

    __slots__ = ()

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self[index]
        return (image if isinstance(image, Image.Image) else read_image(image)), label


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

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        data = self.bytes[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return read_image(io.BytesIO(data), name=f"{self.path}[{index}]"), int(self.labels[index])


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of labelled images, split."""

    classes: tuple[str, ...]
    """Names of the classes; a label is a place in them."""
    train: Any
    """Images to train on: an :class:`ImageSource`, or an :class:`overlock.data.readers.ImageStream`."""
    test: Any
    """The held-out part, of the same kind."""
    mirrors: bool = True
    """Whether an image seen in a mirror is still one of its class."""
    crop_pct: float | None = None
    """Share of the image that the test crop keeps, where objects fill the images; None is the model's own."""
    notes: tuple[str, ...] = ()
    """What was left out or read in another way than it stands there, a line each, to be told once."""


def load_data(
    data: str,
    *,
    seed: int = 0,
    train_split: str | None = None,
    val_split: str | None = None,
    classes: str | None = None,
) -> ImageData:
    """The data set of a name, folder or file.

    Args:
        data: 'digits' (1797 handwritten digits of 8 x 8 pixels, no download); a folder of images by class, or of one
            tar a class, either with ``train`` and ``val`` (or ``test``) above those, or split here, a fifth of each
            class held out; a tar of class folders, likewise; a folder with ``train.npz``, ``test.npz`` and
            ``classes.txt`` (:class:`PackedImages`); 'wds:', 'hfds:' or 'hfids:' and a place, see
            :mod:`overlock.data.readers`.
        seed: of the split.
        train_split: name of the training part, for the last three.
        val_split: name of the part to test on.
        classes: file of class names, one a line, for data without.

    Raises:
        ValueError: for missing or empty data, fewer than two classes, or a class too small to split.
    """
    if data == "digits":
        return load_digits(seed=seed)
    root = Path(data)
    if data.startswith(READERS) or root.suffix == ".tar" or _has_tars(root):
        from overlock.data import readers  # noqa: PLC0415

        if data.startswith(READERS):
            return readers.load_named(data, train_split=train_split, val_split=val_split, classes=classes)
        return readers.load_tars(root, seed=seed)
    if (root / "train.npz").is_file():
        return load_packed(root)
    return load_folder(root, seed=seed)


def load_test_data(
    data: str,
    *,
    held_out: bool = False,
    seed: int = 0,
    val_split: str | None = None,
    classes: str | None = None,
) -> ImageData:
    """As :func:`load_data`, for a test alone: a folder that has no part to train on is taken whole.

    Args:
        data: see :func:`load_data`.
        held_out: take only the fifth of such a folder that :func:`load_data` holds out.
        seed: of that split.
        val_split: name of the part.
        classes: file of class names.
    """
    root = Path(data)
    if root.is_dir() and not held_out and not any((root / name).exists() for name in ("train", "train.npz")):
        if _has_tars(root):
            from overlock.data import readers  # noqa: PLC0415

            return readers.load_tars(root, seed=None)
        inside = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), root)
        samples, names = _read_classes(inside)
        return ImageData(classes=names, train=Samples(), test=Samples(samples))
    return load_data(data, seed=seed, val_split=val_split, classes=classes)


def _has_tars(root: Path) -> bool:
    inside = root / "train" if (root / "train").is_dir() else root
    return inside.is_dir() and any(inside.glob("*.tar"))


def load_packed(root: Path) -> ImageData:
    """A folder of :class:`PackedImages`; the images are small, so that the test crop keeps them whole."""
    if not (root / "classes.txt").is_file() or not (root / "test.npz").is_file():
        raise ValueError(f"{root}: beside train.npz, test.npz and classes.txt are needed")
    return ImageData(
        classes=read_classes(root / "classes.txt"),
        train=PackedImages(root / "train.npz"),
        test=PackedImages(root / "test.npz"),
        crop_pct=1.0,
    )


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


def load_folder(root: Path, *, seed: int) -> ImageData:
    """See :func:`load_data`."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; data must be a folder of images by class, a tar file or 'digits'")
    if not (root / "train").is_dir():
        samples, classes = _read_classes(root)
        train, test = split(samples, classes, root, seed)
        return ImageData(classes=classes, train=Samples(train), test=Samples(test))
    held_out = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if held_out is None:
        raise ValueError(f"{root}: there is a folder 'train' but none to test on; add one named 'val' or 'test'")
    train, classes = _read_classes(root / "train")
    test, test_classes = _read_classes(held_out)
    if test_classes != classes:
        odd = sorted(set(classes) ^ set(test_classes))[0]
        raise ValueError(
            f"{root}: class {odd!r} is not in both of 'train' and {held_out.name!r}; both need all classes"
        )
    return ImageData(classes=classes, train=Samples(train), test=Samples(test))


def _read_classes(root: Path) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(f"{root}: found {len(folders)} class folders; at least two are needed, named by their class")
    samples: list[Sample] = []
    for label, folder in enumerate(folders):
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"{folder}: no images of this class; add some or remove the folder")
        samples += [(file, label) for file in files]
    return tuple(samples), tuple(folder.name for folder in folders)


def split(
    samples: Sequence[Sample], classes: Sequence[str], where: object, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Hold out a fifth of each class, at least one image."""
    out = held_out([label for _, label in samples], classes, where, seed)
    train = tuple(sample for sample, o in zip(samples, out, strict=True) if not o)
    return train, tuple(sample for sample, o in zip(samples, out, strict=True) if o)


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
    try:
        from sklearn import datasets  # noqa: PLC0415
    except ImportError:
        raise ValueError("the digits come with scikit-learn; install it with: pip install 'overlock[train]'") from None
    digits = datasets.load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    samples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    classes = tuple(str(name) for name in digits.target_names)
    train, test = split(samples, classes, "digits", seed)
    return ImageData(classes=classes, train=Samples(train), test=Samples(test), mirrors=False, crop_pct=1.0)


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
