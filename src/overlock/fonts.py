"""Fonts for names in any script: Pillow's own where it has the characters, else one of the machine's."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
SUFFIXES = (".ttf", ".otf", ".ttc")
PREFERRED = (
    "notosanscjk",
    "notosans",
    "sourcehansans",
    "wqy",
    "droidsans",
    "dejavusans",
    "arialuni",
    "msyh",
    "nirmala",
)
NOWHERE = "\U0010ffff"  # a character that no font has
_log = logging.getLogger(__name__)


def as_line(text: str) -> str:
    """A text for one line: what breaks lines, or is no character, replaced."""
    return "".join(character if character.isprintable() else " " for character in text)


def font_for(text: str, size: int) -> Font:
    """A font that has the characters of a text, Pillow's own where it can be.

    Where no font of the machine has them all, that is told once a script, and they are drawn as boxes.

    Args:
        text: to be drawn.
        size: in pixels.
    """
    missing = frozenset(character for character in text if not character.isspace() and not character.isascii())
    path = _find(missing) if missing else None
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@lru_cache(maxsize=4096)
def _find(characters: frozenset[str]) -> str | None:
    """The file of a font that has the characters; None for Pillow's own."""
    if _has(ImageFont.load_default(16), characters):
        return None
    best: tuple[int, str | None] = (0, None)
    for path in _font_files():
        try:
            font = ImageFont.truetype(path, 16)
        except OSError:
            continue
        if _has(font, characters):
            return path
        count = sum(_has(font, frozenset(one)) for one in characters)
        best = max(best, (count, path), key=lambda one: one[0])
    _tell("".join(sorted(characters))[:20])
    return best[1]


@lru_cache(maxsize=64)
def _tell(characters: str) -> None:
    _log.warning(
        "no font on this machine has all of the characters %s, which are drawn as boxes; install one that has (on "
        "Debian: apt install fonts-noto)", characters,
    )  # fmt: skip


def _has(font: Font, characters: frozenset[str]) -> bool:
    empty = bytes(font.getmask(NOWHERE))
    return all(bytes(font.getmask(character)) != empty for character in characters)


@lru_cache(maxsize=1)
def _font_files() -> tuple[str, ...]:
    """All fonts of the machine, those with many characters first."""
    files = {path.name.lower(): str(path) for folder in font_folders() for path in _files_below(folder)}
    rank = {
        name: next((i for i, one in enumerate(PREFERRED) if name.startswith(one)), len(PREFERRED)) for name in files
    }
    plain = {name: "bold" in name or "italic" in name or "oblique" in name or "mono" in name for name in files}
    return tuple(files[name] for name in sorted(files, key=lambda name: (plain[name], rank[name], name)))


def font_folders() -> list[Path]:
    """Where systems keep their fonts."""
    home = Path.home()
    if sys.platform == "win32":
        local = Path(os.environ.get("LOCALAPPDATA", home)) / "Microsoft" / "Windows" / "Fonts"
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts", local]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    return [
        Path("/usr/share/fonts"),
        Path("/usr/local/share/fonts"),
        home / ".local" / "share" / "fonts",
        home / ".fonts",
    ]


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root) / name for name in names if name.lower().endswith(SUFFIXES))
