"""What a page has for all of its visitors: networks, photos and limits, none of which a visit changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from overlock.demo.network import Network
from overlock.demo.uploads import Photo, read_photo
from overlock.deploy import Detector, Segmenter

QUEUE = "networks"
"""The queue of all that runs a network; what only draws does not wait in it."""


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Networks, photos and limits of a page."""

    network: Network
    """An OverLoCK to look through."""
    beside: Network | None = None
    """Another one to compare it with."""
    detector: Detector | None = None
    segmenter: Segmenter | None = None
    photos: Mapping[str, Path]
    """Those to choose from, by name."""
    max_pixels: int
    """Of a photo."""

    def read(self, path: str | Path) -> Photo:
        """See :func:`read_photo`."""
        return read_photo(path, max_pixels=self.max_pixels)

    def read_chosen(self, name: str) -> Photo:
        """The photo of a name.

        Raises:
            ValueError: where there is none.
        """
        if name not in self.photos:
            raise ValueError(f"this page has no photo {name!r}; it has {', '.join(self.photos) or 'none: send one'}")
        return self.read(self.photos[name])


@contextmanager
def told() -> Iterator[None]:
    """Inside, what a visitor can mend is told on the page in its sentence."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), duration=20, print_exception=False) from None
    except MemoryError:
        raise gr.Error("there is not enough memory for this photo; send a smaller one", duration=20) from None
