"""What is kept of a visit, in the server's memory and for its visitor alone; and the link that brings a view back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode

from overlock.demo.network import Look
from overlock.demo.uploads import Photo

MIDDLE = (0.5, 0.5)
OWN, ZEROS, UNIFORM = "its own", "zeros: no prior at all", "uniform: its own mean everywhere"
Point = tuple[float, float]
"""Of an image, as shares of its width and height."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A photo, and what the network made of it."""

    photo: Photo
    look: Look
    chosen: str | None
    """The photo's name among those of the page; None for one that the visitor sent."""


@dataclass(frozen=True, kw_only=True)
class Swapped:
    """What the network makes of it with another context prior."""

    of: Seen
    prior: str
    """Whose."""
    look: Look


@dataclass(frozen=True, kw_only=True)
class View:
    """What a link holds."""

    photo: str
    point: Point = MIDDLE
    block: int = 0
    prior: str = OWN

    @classmethod
    def of_query(cls, query: Mapping[str, str], photos: Collection[str]) -> View:
        """The view of a link's parameters; for those that are missing or mean nothing here, the usual ones."""
        names = list(photos)
        photo, prior = query.get("photo", ""), query.get("prior", "")
        return cls(
            photo=photo if photo in names else names[0],
            point=(_share(query.get("x", "")), _share(query.get("y", ""))),
            block=int(query["block"]) - 1 if query.get("block", "").isdecimal() else 0,
            prior=prior if prior in (OWN, ZEROS, UNIFORM, *names) else OWN,
        )

    def as_query(self) -> str:
        """The parameters of its link."""
        x, y = (f"{100 * share:.1f}" for share in self.point)
        return "?" + urlencode(dict(photo=self.photo, x=x, y=y, block=self.block + 1, prior=self.prior))


def _share(percent: str) -> float:
    """A number of percent, 50 for what is none."""
    try:
        share = float(percent) / 100
    except ValueError:
        return 0.5
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.5
