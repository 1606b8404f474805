"""Data sets that timm's readers know: tar files, WebDataset shards, Hugging Face datasets, streamed or not.

* a tar of class folders, or a folder of one tar a class;
* ``wds:FOLDER_OR_URL``: WebDataset shards with timm's ``_info.json`` beside them, which names the splits with their
  shards and lengths; or a split given in full, such as ``train-{0000..0099}.tar|100000``;
* ``hfds:NAME``: a data set of the Hugging Face hub, or a folder of one, downloaded and read in any order;
* ``hfids:NAME``: the same, streamed.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers import create_reader

from overlock.data.files import IMAGE_SUFFIXES, SIDECARS, is_rubbish, read_image, tell_left_out, to_rgb
from overlock.data.images import ImageData, held_out, match_classes, read_classes, tell_held_out
from overlock.data.parts import TEST_PARTS, TRAIN_PARTS, find_parts
from overlock.extras import missing_extra

SCANNED = 10 * 1024**3  # bytes of tars that are looked through for files that are no images
EXTRA = {"wds": "webdataset", "hfds": "datasets", "hfids": "datasets"}


def check_label(label: int, num_classes: int | None, name: str) -> int:
    """A label that is one of the classes, where their number is known. Raises ValueError, naming the image."""
    if num_classes is not None and not 0 <= label < num_classes:
        raise ValueError(f"{name}: its label is {label}, where {num_classes} classes go from 0 on; check the names")
    return label


class ReaderSource:
    """The images of a timm reader, or some of them."""

    def __init__(self, reader: Any, places: Any = None, *, num_classes: int | None = None):
        self.reader, self.num_classes = reader, num_classes
        self.places = np.arange(len(reader)) if places is None else np.asarray(places)

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> tuple[Image.Image, int]:
        place = int(self.places[index])
        try:
            file, label = self.reader[place]
        except (OSError, AssertionError) as error:
            raise ValueError(f"image {place}: cannot be read ({error})") from None
        with file:
            name = self.name(index)
            return read_image(file, name=name), check_label(int(label), self.num_classes, name)

    def name(self, index: int) -> str:
        return str(self.reader.filename(int(self.places[index])))


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Images that come one after the other.

    Each process that loads them makes its own reader, which takes its share of the shards.
    """

    kind: str
    """'wds' or 'hfids'."""
    root: str
    """Folder or address of the shards, or name of the data set."""
    split: str
    """Which part."""
    length: int
    """Images in it."""
    num_classes: int | None = None
    """Where it is known, other labels are refused."""

    def __len__(self) -> int:
        return self.length

    def make_reader(self, *, training: bool, batch_size: int, seed: int) -> Any:
        """timm's reader, an iterable of PIL images and labels."""
        return _create(
            self.kind, self.root, self.split, is_training=training, batch_size=batch_size, seed=seed,
            num_samples=self.length, input_img_mode="",
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.kind}:{self.root} ({self.split})"


def _create(kind: str, root: str, split: str, **options: Any) -> Any:
    named = dict(name=f"wds/{root}", root=root) if kind == "wds" else dict(name=f"{kind}/{root}", root=None)
    try:
        with quiet_readers():
            return create_reader(split=split, **named, **options)
    except ImportError:
        raise _missing(kind) from None
    except RuntimeError as error:
        if "install webdataset" in str(error):
            raise _missing(kind) from None
        raise ValueError(f"{kind}:{root}: {error}") from None
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{kind}:{root}: {' '.join(str(error).split())[:300]}") from None


def _missing(kind: str) -> ImportError:
    return missing_extra(f"{kind}: data need {EXTRA[kind]}", "data")


@contextmanager
def quiet_readers() -> Iterator[None]:
    """timm's readers without their remarks."""
    logger = logging.getLogger("timm.data.readers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_tars(
    root: Path, *, seed: int | None, train_split: str | None = None, val_split: str | None = None
) -> ImageData:
    """A tar of class folders, or a folder of one tar a class; see :func:`overlock.data.load_data`.

    Without a seed, images that are not split are all to test on.
    """
    if not root.exists():
        raise ValueError(f"{root}: no such file")
    parts = find_parts(root, train_split, val_split)
    if parts is not None and parts[1] is not None:
        train, test = _tar_reader(parts[0]), _tar_reader(parts[1])
        classes = _names(train)
        notes = match_classes(classes, _relabel(test, classes), parts[1], root)
        notes = (*_tell_others(parts[0]), *_tell_others(parts[1]), *notes)
        return ImageData(classes=classes, train=ReaderSource(train), test=ReaderSource(test), notes=notes)
    folder = root if parts is None else parts[0]
    reader = _tar_reader(folder)
    classes = _names(reader)
    folders = [Path(info.path).parent.parent.name.lower() for info, _, _ in reader.samples]
    notes = _tell_others(folder)
    if {*TRAIN_PARTS} & {*folders} and {*TEST_PARTS} & {*folders}:
        out = np.isin(folders, TEST_PARTS)
        if not np.all(out | np.isin(folders, TRAIN_PARTS)):
            raise ValueError(f"{root}: has parts to train and to test on, and images in neither; move those")
        taught, tested = ({classes[label] for label in set(reader.targets[part])} for part in (~out, out))
        if tested - taught:
            match_classes(sorted(taught), tested, "the test part", root)
        notes += match_classes(classes, tested, "the test part", root)
    else:
        out = np.full(len(reader), True) if seed is None else held_out(reader.targets, classes, root, seed)
        if parts is not None:
            notes += tell_held_out(folder, int(out.sum()), len(out))
    return ImageData(
        classes=classes,
        train=ReaderSource(reader, np.flatnonzero(~out)),
        test=ReaderSource(reader, np.flatnonzero(out)),
        notes=notes,
    )


def _relabel(reader: Any, classes: Sequence[str]) -> set[str]:
    """Give a reader's images the labels of other classes, as far as those have its names, which are returned."""
    own = {label: name for name, label in reader.class_name_to_idx.items()}
    labels = {name: label for label, name in enumerate(classes)}
    reader.targets = np.array([labels.get(own[int(label)], -1) for label in reader.targets])
    return set(own.values())


def _tell_others(root: Path) -> tuple[str, ...]:
    """A note of the files in tars that are no images, which timm's reader leaves out; of small tars alone."""
    tars = [root] if root.is_file() else [path for path in root.glob("*.tar") if not is_rubbish(path.name)]
    if sum(path.stat().st_size for path in tars) > SCANNED:
        return ()
    left_out: Counter[str] = Counter()
    for path in tars:
        with tarfile.open(path) as archive:
            for entry in archive:
                ending = Path(entry.name).suffix.lower()
                if entry.isfile() and not any(map(is_rubbish, Path(entry.name).parts)):
                    left_out[ending] += ending not in (*IMAGE_SUFFIXES, *SIDECARS, ".tar")
    return tell_left_out(root, +left_out)


def _tar_reader(root: Path) -> Any:
    """timm's reader of the images in tar files of all known endings, without what systems leave there."""
    from timm.data.readers import img_extensions  # noqa: PLC0415
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar  # noqa: PLC0415

    known = img_extensions.get_img_extensions()
    try:
        img_extensions.set_img_extensions(IMAGE_SUFFIXES)
        # An open tar file cannot be shared by the processes that load images, so none is kept.
        reader = ReaderImageInTar(str(root), cache_tarfiles=False)
    except (OSError, ValueError, AssertionError) as error:
        raise ValueError(f"{root}: no images by class could be read from tar files here ({error})") from None
    finally:
        img_extensions.set_img_extensions(known)
    kept = [
        i
        for i, (info, tar, _) in enumerate(reader.samples)
        if not any(is_rubbish(name) for name in (*Path(info.path).parts, *((Path(tar).name,) if tar else ())))
    ]
    present = sorted({int(reader.targets[i]) for i in kept})
    reader.samples = reader.samples[kept]
    reader.targets = np.searchsorted(present, reader.targets[kept])
    names = [name for name, label in reader.class_name_to_idx.items() if label in set(present)]
    reader.class_name_to_idx = {name: i for i, name in enumerate(names)}
    return reader


def _names(reader: Any) -> tuple[str, ...]:
    by_label = sorted(reader.class_name_to_idx.items(), key=lambda item: item[1])
    if len(by_label) < 2:
        raise ValueError(f"{reader.root}: found {len(by_label)} classes; at least two are needed")
    return tuple(name for name, _ in by_label)


def load_named(data: str, *, train_split: str | None, val_split: str | None, classes: str | None) -> ImageData:
    """Shards or a Hugging Face data set; see :func:`overlock.data.load_data`."""
    kind, _, root = data.partition(":")
    names = read_classes(Path(classes)) if classes else None
    if kind == "wds":
        return _load_shards(root, train_split, val_split, names)
    splits = _huggingface_splits(kind, root)
    train_name = train_split or "train"
    test_name = val_split or next((s for s in ("validation", *TEST_PARTS) if s in splits), None)
    if train_name not in splits or test_name not in splits:
        raise ValueError(f"{data}: its splits are {', '.join(splits)}; name two of them with train_split and val_split")
    if kind == "hfds":
        readers = [_create(kind, root, split) for split in (train_name, test_name)]
        names = names or _names_of(readers[0], data)
        sources = [ReaderSource(reader, num_classes=len(names)) for reader in readers]
        return ImageData(classes=names, train=sources[0], test=sources[1])
    lengths = {name: info.num_examples for name, info in splits.items()}
    for name in (train_name, test_name):
        if not lengths[name]:
            raise ValueError(f"{data}: the number of images of {name!r} is not known; use hfds: instead of hfids:")
    train, test = (
        ImageStream(kind=kind, root=root, split=name, length=lengths[name]) for name in (train_name, test_name)
    )
    if names is None:
        names = _names_of(train.make_reader(training=False, batch_size=1, seed=0), data)
    train, test = (replace(part, num_classes=len(names)) for part in (train, test))
    return ImageData(classes=names, train=train, test=test)


def _names_of(reader: Any, data: str) -> tuple[str, ...]:
    if not reader.class_to_idx:
        raise ValueError(f"{data}: the names of its classes are not known; give a file of them with classes")
    return tuple(name for name, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1]))


def _huggingface_splits(kind: str, name: str) -> dict[str, Any]:
    try:
        import datasets  # noqa: PLC0415
    except ImportError:
        raise _missing(kind) from None
    try:
        builder = datasets.load_dataset_builder(name)
        if not builder.info.splits:  # known only once prepared, for folders of image files
            builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{kind}:{name}: {' '.join(str(error).split())[:300]}") from None
    return dict(builder.info.splits or {})


def _load_shards(root: str, train_split: str | None, val_split: str | None, names: tuple[str, ...] | None) -> ImageData:
    """Splits with their lengths come from timm's _info.json, or with a split's own name."""
    info: dict[str, Any] = {}
    path = Path(root)
    if path.is_dir():
        file = next((path / name for name in ("_info.json", "info.json") if (path / name).is_file()), None)
        info = json.loads(file.read_text()) if file else {}
        if names is None and (path / "classes.txt").is_file():
            names = read_classes(path / "classes.txt")
    elif "://" not in root and not root.startswith("pipe:"):
        raise ValueError(f"wds:{root}: no such folder")
    known = info.get("splits", {})
    train_split = train_split or ("train" if "train" in known else None)
    val_split = val_split or next((s for s in ("validation", *TEST_PARTS) if s in known), None)
    if not train_split or not val_split:
        raise ValueError(
            f"wds:{root}: name the shards with train_split and val_split, such as 'train-{{0000..0099}}.tar|100000' "
            "(their number of images last), or put an _info.json with 'splits' beside them"
        )
    if names is None:
        raise ValueError(
            f"wds:{root}: give a file with the names of the classes with classes, or put classes.txt there"
        )
    parts = [
        ImageStream(
            kind="wds", root=root, split=split, length=_shard_length(root, split, known), num_classes=len(names)
        )
        for split in (train_split, val_split)
    ]
    return ImageData(classes=names, train=parts[0], test=parts[1])


def _shard_length(root: str, split: str, known: dict[str, Any]) -> int:
    if split in known:
        return int(known[split]["num_samples"])
    _, _, length = split.partition("|")
    if not length.isdigit() or int(length) < 1:
        raise ValueError(f"wds:{root}: the split {split!r} must end in |N, its number of images")
    return int(length)


class ErrorNotes(logging.Handler):
    """Catches what a WebDataset reader says of samples that it skips.

    The reader goes on after a damaged sample and only logs it; a run must count such samples.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "webdataset error" in message:
            self.notes.append(message)

    @contextmanager
    def listening(self) -> Iterator[ErrorNotes]:
        """Attached to the reader's logger, which says nothing elsewhere meanwhile."""
        logger = logging.getLogger("timm.data.readers.reader_wds")
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            yield self
        finally:
            logger.removeHandler(self)
            logger.propagate = propagates

    def take(self) -> list[str]:
        """What was noted since the last time."""
        notes, self.notes = self.notes, []
        return notes


def as_rgb(image: Any, name: str) -> Image.Image:
    """A reader's image as RGB. Raises ValueError where it cannot be."""
    try:
        return to_rgb(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: the image is damaged ({error})") from None
