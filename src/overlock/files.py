"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
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
        raise ValueError(f"{path}: cannot write here ({error.strerror}); choose another place") from None
    finally:
        if partial is not None:
            with suppress(FileNotFoundError):
                Path(partial).unlink()
