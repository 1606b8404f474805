"""The parts of a data set, to train on and to test on, by the names that they usually have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from overlock.data.files import subfolders

TRAIN_PARTS = ("train", "training", "train2017")
TEST_PARTS = ("val", "validation", "valid", "val2017", "test", "testing")


def find_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first folder of one of these names, in small letters or capitals, with folders or tar files in it.

    A class may well be called 'train': such a folder has images in it, and no folders.
    """
    if not root.is_dir():
        return None
    known = {path.name.lower(): path for path in subfolders(root) if subfolders(path) or any(path.glob("*.tar"))}
    return next((path for name in names if (path := known.get(name.lower())) is not None), None)


def find_parts(root: Path, train_split: str | None, val_split: str | None) -> tuple[Path, Path | None] | None:
    """The folders of the parts to train on and, where there is one, to test on; None in a folder without parts.

    Args:
        root: the folder.
        train_split: name of the first, the usual ones unless given.
        val_split: name of the second.

    Raises:
        ValueError: for a part to test on without one to train on, and for a part that was named and is not there.
    """
    train = find_folder(root, (train_split,) if train_split else TRAIN_PARTS)
    test = find_folder(root, (val_split,) if val_split else TEST_PARTS)
    for name, found, option in ((train_split, train, "train_split"), (val_split, test, "val_split")):
        if name and found is None:
            raise ValueError(f"{root}: there is no folder {name!r}, which {option} names")
    if train is None and val_split is None:
        return None
    if train is None:
        raise ValueError(
            f"{root}: there is a part {val_split!r} to test on but no folder 'train'; name it: train_split"
        )
    return train, test
