"""Labelled images: folders of classes, or the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from overlock.data.files import IMAGE_SUFFIXES, read_image
from overlock.files import write_atomically

Sample = tuple["Path | Image.Image", int]
TEST_FOLDERS = ("val", "validation", "valid", "test")
TEST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A data set of labelled images, split."""

    classes: tuple[str, ...]
    """Names of the classes; a label is a place in them."""
    train: tuple[Sample, ...]
    """Images or their files, with labels."""
    test: tuple[Sample, ...]
    """The held-out part."""
    mirrors: bool = True
    """Whether an image seen in a mirror is still one of its class."""
    crop_pct: float | None = None
    """Share of the image that the test crop keeps, where objects fill the images; None is the model's own."""


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Samples as the network takes them: (Cin, H, W) and the label."""

    def __init__(self, samples: Sequence[Sample], transform: Callable[[Image.Image], Tensor]):
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        if not isinstance(image, Image.Image):
            image = read_image(image)
        return self.transform(image), label


def load_data(data: str, *, seed: int = 0) -> ImageData:
    """The data set of a name or folder.

    Args:
        data: 'digits' (1797 handwritten digits of 8 x 8 pixels, no download), or a folder: either with ``train`` and
            ``val`` (or ``test``) below it and the classes below those, or with the classes right below it, of which
            then a fifth of each is held out.
        seed: of the split.

    Raises:
        ValueError: for a missing or empty folder, fewer than two classes, or a class too small to split.
    """
    return load_digits(seed=seed) if data == "digits" else load_folder(Path(data), seed=seed)


def load_folder(root: Path, *, seed: int) -> ImageData:
    """See :func:`load_data`."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --data takes a folder of images by class, or 'digits'")
    if not (root / "train").is_dir():
        samples, classes = _read_classes(root)
        train, test = _split(samples, classes, root, seed)
        return ImageData(classes=classes, train=train, test=test)
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
    return ImageData(classes=classes, train=train, test=test)


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


def _split(
    samples: Sequence[Sample], classes: Sequence[str], where: object, seed: int
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Hold out a fifth of each class, at least one image."""
    random = np.random.default_rng(seed)
    labels = np.array([label for _, label in samples])
    held_out = np.zeros(len(samples), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(f"{where}: class {name!r} has one image; training and testing need one each")
        held_out[random.permutation(members)[: max(1, round(TEST_SHARE * len(members)))]] = True
    train = tuple(sample for sample, out in zip(samples, held_out, strict=True) if not out)
    return train, tuple(sample for sample, out in zip(samples, held_out, strict=True) if out)


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
    train, test = _split(samples, classes, "digits", seed)
    return ImageData(classes=classes, train=train, test=test, mirrors=False, crop_pct=1.0)


def save_examples(data: ImageData, folder: Path) -> list[Path]:
    """Write the first held-out image of each class as a file, where the data are not files themselves.

    Raises:
        ValueError: where they cannot be written.
    """
    written: dict[int, Path] = {}
    for image, label in data.test:
        if label in written or not isinstance(image, Image.Image):
            continue
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        written[label] = folder / f"{data.classes[label]}.png"
        write_atomically(written[label], buffer.getvalue())
    return sorted(written.values())
