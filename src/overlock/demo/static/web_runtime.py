"""ONNX Runtime for the browser: one release of npm's onnxruntime-web, fetched once, checked and kept."""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from overlock.files import write_atomically

VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""As the registry states it."""
SCRIPT, MODULE = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
PATIENCE = 30  # seconds that the registry may be silent
CHUNK = 1 << 18


def find_archive(given: Path | None, console: Console) -> Path:
    """The release's archive: a file that was downloaded by hand, the one that is kept, or one fetched now.

    Args:
        given: by hand.
        console: for the progress bar.

    Raises:
        ValueError: for a file that is missing or another one, and where the registry cannot be reached.
    """
    if given is not None:
        try:
            content = given.read_bytes()
        except OSError as error:
            raise ValueError(f"{given}: cannot be read ({error.strerror}); download {URL}") from None
        if not _is_release(content):
            raise ValueError(f"{given}: not the archive of onnxruntime-web {VERSION}; download {URL}")
        return given
    kept = kept_archive()
    if not (kept.is_file() and _is_release(kept.read_bytes())):
        write_atomically(kept, _fetch(console))
    return kept


def kept_archive() -> Path:
    """Where the archive lies in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path("~/.cache").expanduser()
    return Path(home) / "overlock" / URL.rpartition("/")[2]


def _fetch(console: Console) -> bytes:
    content = bytearray()
    try:
        with (
            urllib.request.urlopen(URL, timeout=PATIENCE) as answer,
            Progress(*Progress.get_default_columns(), console=console, transient=True) as progress,
        ):
            task = progress.add_task(f"onnxruntime-web {VERSION}", total=int(answer.headers["Content-Length"] or 0))
            while chunk := answer.read(CHUNK):
                content += chunk
                progress.update(task, completed=len(content))
    except OSError as error:  # of the network, which urllib's own errors are too
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"{URL} cannot be fetched ({reason}); download it elsewhere, and give it by --runtime"
        ) from None
    if not _is_release(bytes(content)):
        raise ValueError(f"what {URL} gave is not onnxruntime-web {VERSION}; download it by hand, and give --runtime")
    return bytes(content)


def _is_release(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == SHA512


def unpack_runtime(archive: Path, folder: Path) -> None:
    """Write what a page needs of the archive: its script, and the WebAssembly of one thread or many."""
    with tarfile.open(archive) as files:
        for name in (SCRIPT, MODULE):
            member = files.extractfile(f"package/dist/{name}")
            assert member is not None  # by its checksum
            write_atomically(folder / name, member.read())
