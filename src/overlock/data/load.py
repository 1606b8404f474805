"""The data set of labelled images of a name, folder or file, of whatever form it is."""

from __future__ import annotations

from pathlib import Path

from overlock.data.files import is_rubbish
from overlock.data.images import ImageData, Samples, load_digits, load_folder, load_packed, read_class_folders
from overlock.data.parts import TEST_PARTS, TRAIN_PARTS, find_folder

READERS = ("wds:", "hfds:", "hfids:")


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
        train_split: name of the part to train on; the usual names are tried unless given.
        val_split: name of the part to test on.
        classes: file of class names, one a line, for data without; of a folder by class those of its folders, in the
            order of the labels.

    Raises:
        ValueError: for missing or empty data, fewer than two classes, or a class too small to split.
    """
    root = Path(data)
    if data == "digits":
        _refuse(data, train_split=train_split, val_split=val_split, classes=classes)
        return load_digits(seed=seed)
    if data.startswith(READERS) or root.suffix == ".tar" or _has_tars(root):
        from overlock.data import readers  # noqa: PLC0415  # which need timm and PyTorch

        if data.startswith(READERS):
            return readers.load_named(data, train_split=train_split, val_split=val_split, classes=classes)
        _refuse(data, classes=classes)
        return readers.load_tars(root, seed=seed, train_split=train_split, val_split=val_split)
    if (root / "train.npz").is_file():
        _refuse(data, classes=classes)
        return load_packed(root, train_split=train_split or "train", val_split=val_split or "test")
    return load_folder(root, seed=seed, train_split=train_split, val_split=val_split, classes=classes)


def _refuse(data: str, **settings: str | None) -> None:
    """Raise ValueError for a setting that means nothing for this form of data."""
    for name, value in settings.items():
        if value is not None:
            raise ValueError(
                f"{data}: {name} is {value!r}, but data of this form have that by themselves; leave it out"
            )


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
    has_parts = (root / "train.npz").exists() or find_folder(root, TRAIN_PARTS) is not None
    if root.is_dir() and not held_out and not has_parts and not data.startswith(READERS):
        inside = find_folder(root, (val_split,) if val_split else TEST_PARTS)
        if inside is None and val_split:
            raise ValueError(f"{root}: there is no folder {val_split!r}, which val_split names")
        inside = inside or root
        if _has_tars(inside):
            from overlock.data import readers  # noqa: PLC0415

            _refuse(data, classes=classes)
            return readers.load_tars(inside, seed=None)
        samples, names, notes = read_class_folders(inside, classes)
        return ImageData(classes=names, train=Samples(), test=Samples(samples), notes=notes)
    return load_data(data, seed=seed, val_split=val_split, classes=classes)


def _has_tars(root: Path) -> bool:
    inside = find_folder(root, TRAIN_PARTS) or root
    return inside.is_dir() and any(not is_rubbish(path.name) for path in inside.glob("*.tar"))
