"""Lists of paths, in text files and on standard input, a line at a time: there may be more than the memory holds."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

STANDARD_INPUT = "-"
LIST_SUFFIX = ".txt"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def paths_in(word: str) -> Iterator[Path]:
    """The paths of a list, one a line, from the present folder or else from the one that the list is in.

    Args:
        word: a file's path, or '-' for standard input.

    Raises:
        ValueError: for a list that cannot be read or names nothing.
    """
    beside = Path() if word == STANDARD_INPUT else Path(word).parent
    return (_find(line, beside) for line in lines_in(word))


def lines_in(word: str) -> Iterator[str]:
    """The lines of a list that are not empty.

    The text is UTF-8, or UTF-16 with a byte order mark. Other bytes are those of a name as it stands on the disk.

    Raises:
        ValueError: for a list that cannot be read or has no such line.
    """
    name = "standard input" if word == STANDARD_INPUT else word
    count = 0
    try:
        with _open(word) as lines:
            for line in lines:
                if "\0" in line:
                    raise ValueError(
                        f"{name}: there is a zero byte in it, so that it is no text in UTF-8; save it as that"
                    )
                if line.strip():
                    count += 1
                    yield line.rstrip("\r\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{name}: cannot be read as a list of paths ({error}); save it as UTF-8") from None
    if count == 0:
        raise ValueError(f"{name}: there is no path in it, one a line")


@contextmanager
def _open(word: str) -> Iterator[io.TextIOWrapper]:
    """The lines of a list; standard input stays open."""
    raw = sys.stdin.buffer if word == STANDARD_INPUT else Path(word).open("rb")  # noqa: SIM115  # closed below
    # One reader alone: a second would wait for more than the line that a program has written so far.
    reader = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, raw))
    utf_16 = reader.peek(2)[:2] in _UTF_16
    text = io.TextIOWrapper(
        reader, encoding="utf-16" if utf_16 else "utf-8-sig", errors="strict" if utf_16 else "surrogateescape"
    )
    try:
        yield text
    finally:
        if word == STANDARD_INPUT:
            text.detach()
        else:
            text.close()


def _find(line: str, beside: Path) -> Path:
    """The first of the ways to read a line that names something; the line as it is where none does."""
    texts = [line, line.strip()]
    if any("\udc80" <= character <= "\udcff" for character in line):  # bytes that were not UTF-8
        texts.append(os.fsencode(line.strip()).decode("latin-1"))
    for text in dict.fromkeys(texts):
        for path in (Path(text), beside / text):
            if os.path.exists(path):  # noqa: PTH110  # which has no errors, say for names that are too long
                return path
    return Path(line.strip())
