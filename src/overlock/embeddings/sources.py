"""The images to embed: files in folders, or members of tar files, each with an id that lasts."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from overlock.data.files import IMAGE_SUFFIXES, images_in, is_rubbish, read_image, tell_left_out, walk_files
from overlock.data.images import read_classes
from overlock.deploy.inputs import name_of
from overlock.embeddings.shards import Origin

CLASSES_FILE = "classes.txt"


class Entry(NamedTuple):
    """An encoded image: some bytes of a file."""

    id: str
    """The path below the source; of a member of a tar file with the tar's path before it."""
    label: str | None
    """Name of its class, if known."""
    file: str
    """That the bytes are in."""
    offset: int
    length: int


class ImageList(Sequence[Entry]):
    """The images of a folder or of tar files, in the order of their ids.

    Args:
        root: the folder, or one tar file.

    Raises:
        ValueError: for a place that is not there or has no images, and for a damaged tar file.
    """

    def __init__(self, root: Path):
        self.root = root
        self.notes: tuple[str, ...] = ()
        """What was left out, a line each."""
        if not root.exists():
            raise ValueError(f"{root}: no such folder or tar file; check the path")
        if root.is_file() and root.suffix != ".tar":
            raise ValueError(f"{root}: give a folder of images or of .tar files, or one .tar file")
        tars = [root] if root.is_file() else sorted(path for path in walk_files(root) if path.suffix == ".tar")
        left_out: Counter[str] = Counter()
        files = [] if root.is_file() else images_in(root, left_out)
        if tars:
            base = root.parent if root.is_file() else root
            entries = [entry for path in tars for entry in _members(path, base)]
            if files:
                self.notes = (f"{root}: {len(files)} images lie beside the tar files and are left out",)
        else:
            entries = [_of_file(path, root) for path in files]
            self.notes = tell_left_out(root, left_out)
        if not entries:
            raise ValueError(f"{root}: no images here; known endings are {', '.join(IMAGE_SUFFIXES)}")
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:  # type: ignore[override]
        return self.entries[index]

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, and its place.

        Raises:
            ValueError: where it cannot be read, naming it.
        """
        entry, name = self.entries[index], self.name(index)
        try:
            with Path(entry.file).open("rb") as file:
                file.seek(entry.offset)
                content = file.read(entry.length)
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
        return read_image(io.BytesIO(content), name=name), index

    def name(self, index: int) -> str:
        """What messages call an image."""
        return str(self.root / self.entries[index].id) if self.root.is_dir() else self.entries[index].id

    def digest(self) -> str:
        """Tells these images, by their ids and lengths, from all others."""
        digest = hashlib.blake2b(digest_size=16)
        for entry in self.entries:
            digest.update(f"{entry.id}\0{entry.label}\0{entry.length}\n".encode())
        return digest.hexdigest()


def _of_file(path: Path, root: Path) -> Entry:
    """An image that is a file; its class is the folder that it lies in, unless that is the source itself."""
    label = None if path.parent == root else name_of(path.parent.name)
    return Entry(name_of(path.relative_to(root).as_posix()), label, str(path), 0, path.stat().st_size)


def _members(path: Path, base: Path) -> Iterator[Entry]:
    """The images in a tar file.

    In WebDataset's form, ``KEY.jpg`` and ``KEY.cls``, the second holds the class: a place in the file ``classes.txt``
    beside the tar, or its number or name itself. Else the class is the folder that the image lies in.
    """
    prefix = name_of(path.relative_to(base).as_posix())
    names = read_classes(path.with_name(CLASSES_FILE)) if path.with_name(CLASSES_FILE).is_file() else ()
    classes: dict[str, str] = {}
    found: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                if not member.isfile() or any(map(is_rubbish, Path(member.name).parts)):
                    continue
                key, ending = _split(member.name)
                if ending == ".cls":
                    content = archive.extractfile(member)
                    classes[key] = "" if content is None else content.read().decode(errors="replace").strip()
                elif Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    found.append(member)
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: cannot be read as a tar file ({error}); replace or remove it") from None
    for member in found:
        text = classes.get(_split(member.name)[0])
        folder = Path(member.name).parent.name
        label = (folder or None) if text is None else _class_name(text, names)
        yield Entry(f"{prefix}/{name_of(member.name)}", label, str(path), member.offset_data, member.size)


def _split(name: str) -> tuple[str, str]:
    """A member's key and ending as WebDataset takes them, the ending from the first dot of the file's name on."""
    match = re.fullmatch(r"((?:.*/)?[^/.]*)(\..*)?", name)
    assert match is not None
    return match[1], (match[2] or "").lower()


def _class_name(text: str, names: Sequence[str]) -> str:
    return names[int(text)] if text.isdigit() and int(text) < len(names) else text


def open_again(origin: Origin, root: str | None = None) -> ImageList:
    """The images that embeddings were made from.

    Args:
        origin: of the embeddings.
        root: the folder or tar file, where it has moved.

    Raises:
        ValueError: where they are not there, or are others.
    """
    place = Path(root or origin.source)
    if not place.exists():
        raise ValueError(f"{place}: the images are no longer there; say where they are with --images")
    images = ImageList(place)
    if images.digest() != origin.digest:
        raise ValueError(f"{place}: the images here are not those of the embeddings; embed them again, or say --images")
    return images
