"""Packages that only some parts of this one need, which an extra of it installs: ``pip install 'overlock[EXTRA]'``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def missing_extra(sentence: str, extra: str) -> ImportError:
    """The error of an absent package.

    Args:
        sentence: what needs which package: 'videos need PyAV'.
        extra: of ours, that installs it.
    """
    return ImportError(f"{sentence}: pip install 'overlock[{extra}]'")


@contextmanager
def needing(sentence: str, extra: str) -> Iterator[None]:
    """Inside, imports of packages that need not be installed.

    Raises:
        ImportError: of :func:`missing_extra`, where one is absent.
    """
    try:
        yield
    except ImportError:
        raise missing_extra(sentence, extra) from None
