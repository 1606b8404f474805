"""The images that a command is given: files, folders, patterns, lists of paths, standard input and videos."""

from __future__ import annotations

import glob
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from overlock.data.files import IMAGE_SUFFIXES, images_in, tell_left_out
from overlock.deploy.inputs import Failure, Item

STANDARD_INPUT = "-"
LIST_SUFFIX = ".txt"
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
Source = Item | Failure


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the words of a command line name."""

    images: Iterator[Source]
    """In the order of the words; the frames of a video are decoded while they are asked for."""
    inputs: list[Path]
    """The files and folders that they are read from."""
    count: int | None
    """How many images there are, None where a video is among them."""
    notes: tuple[str, ...]
    """What was left out of folders."""


def expand(words: Iterable[str], *, every: int = 1, results: Path | None = None) -> Sources:
    """The images that words name.

    Args:
        words: a file; a folder, of which the images in and below it are taken, by name; a pattern such as
            ``photos/**/*.jpg``; a .txt file of paths, one a line; '-' for paths from standard input; or a video.
        every: take one frame of so many of a video.
        results: a folder of results, of which nothing is taken.

    Raises:
        ValueError: for a word that names nothing, and a folder, pattern or list without images.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    items: list[tuple[Path, str]] = []
    inputs: list[Path] = []
    left_out: Counter[str] = Counter()
    for word in words:
        if Path(word).is_dir():
            own = _below(Path(word), results, left_out)
            inputs.append(Path(word))
        else:
            own = [(path, path.stem) for path in _files_of(word)]
            inputs += [path for path, _ in own]
        items += own
    counted = not any(_is_video(path) for path, _ in items)
    return Sources(
        images=itertools.chain.from_iterable(_read(path, name, every) for path, name in items),
        inputs=inputs, count=len(items) if counted else None, notes=tell_left_out("the folders", left_out),
    )  # fmt: skip


def _below(folder: Path, results: Path | None, left_out: Counter[str]) -> list[tuple[Path, str]]:
    """The images in and below a folder, and names for them that tell equal ones in several folders apart."""
    found = images_in(folder, left_out)
    if results is not None and results.is_dir() and results.resolve() != folder.resolve():
        found = [path for path in found if results.resolve() not in path.resolve().parents]
    if not found:
        raise ValueError(f"{folder}: no images in this folder; known endings are {', '.join(IMAGE_SUFFIXES)}")
    return [(path, str(path.relative_to(folder).with_suffix(""))) for path in found]


def _files_of(word: str) -> list[Path]:
    path = Path(word)
    if word == STANDARD_INPUT:
        return _paths_in("standard input", sys.stdin.read().splitlines(), Path())
    if path.is_file() and path.suffix.lower() == LIST_SUFFIX:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as a list of paths ({error})") from None
        return _paths_in(word, lines, path.parent)
    if path.is_file():
        return [path]
    if glob.has_magic(word):
        found = [Path(name) for name in sorted(glob.iglob(word, recursive=True)) if Path(name).is_file()]  # noqa: PTH207  # a pattern may begin anywhere
        if found:
            return found
        raise ValueError(f"{word}: no file fits this pattern")
    raise ValueError(f"{word}: no such image or folder; check the path")


def _paths_in(name: str, lines: list[str], beside: Path) -> list[Path]:
    """A path a line, from the present folder or else from the one that the list is in."""
    paths = [Path(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"{name}: there is no path in it, one a line")
    return [beside / path if not path.exists() and (beside / path).exists() else path for path in paths]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _read(path: Path, name: str, every: int) -> Iterator[Source]:
    """The image of a file, or the frames of a video."""
    if not _is_video(path):
        yield Item(image=path, source=str(path), name=name)
        return
    try:
        import av  # noqa: PLC0415
    except ImportError:
        raise ValueError(f"{path}: videos need PyAV: pip install 'overlock[video]'") from None
    try:
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number % every == 0:
                    yield Item(image=frame.to_image(), source=str(path), name=f"{name}_{number:06d}", frame=number)
    except (av.FFmpegError, IndexError) as error:  # the latter without a picture
        yield Failure(source=str(path), reason=f"the video is damaged ({error}); replace or remove the file")
