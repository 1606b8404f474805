"""Files written whole or not at all, and never over what a command reads, or has not been told to replace."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, content: bytes | str) -> None:
    """Write a file whole or not at all.

    Raises:
        ValueError: where that is not possible, naming the file; then whatever was there stays.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        if partial is not None:
            with suppress(FileNotFoundError):
                Path(partial).unlink()


def unwritable(path: PathLike, error: Exception) -> ValueError:
    """The sentence for a file that cannot be written."""
    return ValueError(f"{path}: cannot write here ({getattr(error, 'strerror', None) or error}); choose another place")


class Outputs:
    """The files that a command writes: none that it reads, none twice, and none that is there already unasked.

    Args:
        inputs: files that the command reads, and folders below which it reads any.
        overwrite: replace files that are there already, but for the inputs.
        results: folders within the inputs that the command does not read.
    """

    def __init__(self, inputs: Iterable[PathLike] = (), *, overwrite: bool = False, results: Iterable[PathLike] = ()):
        self._overwrite = overwrite
        self._results = [Path(_key(path)) for path in results]
        self._files: set[str] = set()
        self._folders: dict[Path, tuple[str, ...]] = {}  # and the endings of what is read in them
        self._claimed: list[Path] = []  # folders
        self._written: set[int] = set()  # of hashes, since there may be very many
        for path in inputs:
            self.add_input(path)

    def add_input(self, path: PathLike, *, endings: tuple[str, ...] = ("",)) -> None:
        """Keep one more file, or what is below a folder: the files with some endings, all unless given."""
        if Path(path).is_dir():
            self._folders[Path(_key(path))] = endings
        else:
            self._files.update((_key(path), _key_of_link(path)))

    def add_late_input(self, path: PathLike) -> None:
        """Keep a file that is known to be read only now, say from a long list, of which no more than need be is kept.

        Raises:
            ValueError: where the command writes it.
        """
        keys = {_key(path), _key_of_link(path)}
        written = any(hash(key) in self._written for key in keys)
        if written or any(Path(key).is_relative_to(folder) for key in keys for folder in self._claimed):
            self.add_input(path)
        if written:
            raise ValueError(f"{path}: this command writes it; choose another name for the results")

    def objection(self, path: PathLike) -> str | None:
        """Why a file may not be written; None where it may."""
        if hash(_key(path)) in self._written:
            return "this command has written it already; choose another name"
        if not os.path.lexists(path):
            return None
        if self._is_input(path):
            return "this command reads it; choose another name"
        if Path(path).is_dir():
            return "this is a folder; choose the name of a file"
        return None if self._overwrite else "exists already; choose another name, or pass --overwrite to replace it"

    def claim(self, path: PathLike) -> Path:
        """The path of a file that is now to be written.

        Raises:
            ValueError: where it may not be.
        """
        objection = self.objection(path)
        if objection:
            raise ValueError(f"{path}: {objection}")
        self._written.add(hash(_key(path)))
        return Path(path)

    def claim_folder(self, path: PathLike) -> Path:
        """A folder for results, made where it is not there; files in it that are read stay as they are.

        Raises:
            ValueError: where it cannot be made, is one that is read, or holds files already that may not be replaced.
        """
        folder = self.check_folder(path)
        if Path(_key(folder)) in self._claimed:
            raise ValueError(f"{folder}: this command writes into it already; choose another folder")
        self._claimed.append(Path(_key(folder)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{folder}: the folder cannot be made ({error.strerror}); choose another one") from None
        return folder

    def check_folder(self, path: PathLike) -> Path:
        """A folder for results, which need not be there yet.

        Raises:
            ValueError: as :meth:`claim_folder`, but for one that cannot be made.
        """
        folder = Path(path)
        if Path(_key(folder)) in self._folders:
            raise ValueError(f"{folder}: this command reads the files of this folder; choose another one for results")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: this is a file; choose the name of a folder")
        if not self._overwrite and folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder}: this folder is not empty; choose another one, or pass --overwrite to add to it and to "
                "replace earlier results"
            )
        return folder

    def write(self, path: PathLike, content: bytes | str) -> None:
        """Claim a file and write it whole or not at all.

        Raises:
            ValueError: where it may not or cannot be written.
        """
        write_atomically(self.claim(path), content)

    def replace(self, path: PathLike, content: bytes | Path) -> None:
        """Put what belongs at a claimed path there, whole or not at all.

        Args:
            path: of the file.
            content: of it, or a file that is moved there.

        Raises:
            ValueError: where it cannot be written, or is an input as it turned out.
        """
        if os.path.lexists(path) and self._is_input(path):
            raise ValueError(f"{path}: this command reads it; choose another name")
        if not isinstance(content, Path):
            write_atomically(path, content)
            return
        try:
            content.replace(path)
        except OSError as error:
            raise unwritable(path, error) from None

    def _is_input(self, path: PathLike) -> bool:
        keys = {_key(path), _key_of_link(path)}
        if keys & self._files:
            return True
        places = [Path(key) for key in keys]
        if any(place.is_relative_to(folder) for place in places for folder in self._results):
            return False
        return any(
            place.is_relative_to(folder) and place.name.endswith(endings)
            for place in places
            for folder, endings in self._folders.items()
        )


def _key(path: PathLike) -> str:
    """The same for all names of a file, also where upper and lower case are one."""
    return os.path.realpath(path).casefold()


def _key_of_link(path: PathLike) -> str:
    """Of a link itself, which is what a new file would replace."""
    path = Path(path)
    return os.path.join(os.path.realpath(path.parent), path.name).casefold()  # noqa: PTH118
