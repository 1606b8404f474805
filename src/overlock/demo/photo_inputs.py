"""How visitors bring photos: by choosing one of the page's, or by sending their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gradio as gr

from overlock.data.files import IMAGE_SUFFIXES


def make_gallery(photos: Mapping[str, Path], *, name: str = "photos") -> gr.Gallery:
    """The page's photos, to choose one."""
    return gr.Gallery(
        [(str(path), title) for title, path in photos.items()], label="Choose a photo", columns=4, height="auto",
        allow_preview=False, object_fit="cover", interactive=False, buttons=[], elem_id=name,
    )  # fmt: skip


def make_upload(label: str, *, name: str = "upload") -> gr.File:
    """A place to drop a file; the file itself is kept as it was sent, so that its bounds are checked first."""
    return gr.File(label=label, file_types=list(IMAGE_SUFFIXES), type="filepath", height=150, elem_id=name)


def empty_after(upload: gr.File) -> None:
    """Make the place ready for the next file, whatever comes of this one; after its other events, which read it."""
    upload.upload(
        _empty, None, upload, concurrency_limit=4, api_visibility="private", show_progress="hidden"
    )  # fmt: skip


def _empty() -> None:
    """The value of a place for files without one."""
