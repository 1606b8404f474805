"""The images that a command is given: files, folders, patterns, lists of paths, standard input and videos."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from overlock.data.files import IMAGE_SUFFIXES, images_in, tell_left_out
from overlock.deploy.inputs import Failure, Item, name_of
from overlock.deploy.path_lists import LIST_SUFFIX, STANDARD_INPUT, lines_in, paths_in
from overlock.deploy.videos import VIDEO_SUFFIXES, DamagedVideoError, is_video, read_frames
from overlock.files import Outputs

Source = Item | Failure


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the words of a command line name."""

    images: Iterator[Source]
    """In the order of the words; lists are read, and videos decoded, while they are asked for."""
    count: int | None
    """How many images there are, None where that is not known before the end."""
    has_videos: bool | None
    """Whether videos are among them; None where that is not known before the end."""
    notes: tuple[str, ...]
    """What was left out of folders."""


class _Group(NamedTuple):
    """What one word names."""

    files: Iterable[tuple[Path, str]]
    """Files, and the names of their results."""
    images: int | None
    videos: int | None


def expand(words: Iterable[str], *, outputs: Outputs, every: int = 1, results: Sequence[Path] = ()) -> Sources:
    """The images that words name.

    Args:
        words: a file; a folder, of which the images in and below it are taken, by name; a pattern such as
            ``photos/**/*.jpg``; a .txt file of paths, one a line; '-' for paths from standard input; or a video.
        outputs: gets to know what is read.
        every: take one frame of so many of a video.
        results: folders of results, of which nothing is taken.

    Raises:
        ValueError: for a word that names nothing, and a folder, pattern or list without images.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    left_out: Counter[str] = Counter()
    groups = [_group_of(word, outputs, results, left_out) for word in words]
    videos = [group.videos for group in groups]
    counts = [group.images for group in groups]
    return Sources(
        images=(source for group in groups for path, name in group.files for source in _read(path, name, every)),
        count=None if None in counts or any(videos) else sum(filter(None, counts)),
        has_videos=True if any(videos) else None if None in videos else False,
        notes=tell_left_out("the folders", left_out),
    )


def _group_of(word: str, outputs: Outputs, results: Sequence[Path], left_out: Counter[str]) -> _Group:
    path = Path(word)
    if not word:
        raise ValueError("an empty word names no image or folder; the present folder is .")
    if word == STANDARD_INPUT:
        return _Group(_listed(word, outputs), None, None)
    if path.is_dir():
        below = _below(path, results, left_out)
        for folder in {path, *(file.parent for file, _ in below)}:  # some may be links to elsewhere
            outputs.add_input(folder, endings=IMAGE_SUFFIXES)
        for file, _ in below:
            if file.is_symlink():
                outputs.add_input(file)
        return _Group(below, len(below), 0)
    if path.is_file() and path.suffix.lower() == LIST_SUFFIX:
        outputs.add_input(path)
        kinds = Counter(
            is_video(Path(line.strip())) for line in lines_in(word)
        )  # read through once, so that faults come first
        return _Group(_listed(word, outputs), kinds.total(), kinds[True])
    files = [path] if path.is_file() else _matches(word)
    for file in files:
        outputs.add_input(file)
    return _Group([(file, file.stem) for file in files], len(files), sum(map(is_video, files)))


def _listed(word: str, outputs: Outputs) -> Iterator[tuple[Path, str]]:
    """The files of a list, of which none may be one that the command writes."""
    for path in paths_in(word):
        outputs.add_late_input(path)
        yield path, path.stem


def _below(folder: Path, results: Sequence[Path], left_out: Counter[str]) -> list[tuple[Path, str]]:
    """The images in and below a folder, and names for them that tell equal ones in several folders apart."""
    own = {path.resolve() for path in results if path.resolve() != folder.resolve()}
    found = images_in(folder, left_out)
    if own:
        found = [path for path in found if own.isdisjoint(path.resolve().parents)]
    if not found and any(left_out[ending] for ending in VIDEO_SUFFIXES):
        raise ValueError(
            f"{folder}: no images but videos in this folder; name the videos themselves, or a pattern of them"
        )
    if not found:
        raise ValueError(f"{folder}: no images in this folder; known endings are {', '.join(IMAGE_SUFFIXES)}")
    return [(path, str(path.relative_to(folder).with_suffix(""))) for path in found]


def _matches(word: str) -> list[Path]:
    """The files that fit a pattern."""
    if "://" in word:
        raise ValueError(f"{word}: addresses are not fetched; download the file and give its path")
    if not glob.has_magic(word):
        raise ValueError(f"{name_of(word)}: no such image or folder; check the path")
    found = [Path(name) for name in sorted(glob.iglob(word, recursive=True)) if Path(name).is_file()]  # noqa: PTH207  # a pattern may begin anywhere
    if not found:
        raise ValueError(f"{word}: no file fits this pattern")
    return found


def _read(path: Path, name: str, every: int) -> Iterator[Source]:
    """The image of a file, or the frames of a video."""
    source = name_of(path)
    if not is_video(path):
        yield Item(image=path, source=source, name=name)
        return
    try:
        for number, image in read_frames(path, every=every):
            yield Item(image=image, source=source, name=f"{name}_{number:06d}", frame=number)
    except DamagedVideoError as error:
        yield Failure(source=source, reason=str(error))
