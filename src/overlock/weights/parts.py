"""Where the network stands in a state dict: alone, in a pyramid, or inside of another model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from overlock.weights.names import from_official

OURS, THEIRS = "base_net.stages.0.embed.0.conv.weight", "patch_embed1.0.weight"  # the first of the network


@dataclass(frozen=True)
class Place:
    """Where a state dict has the network."""

    network: str
    """What its names begin with: 'backbone.body.backbone.' in our detectors."""
    pyramid: str | None
    """What those of the norms of its features begin with ('backbone.body.'); None where it has none."""
    official: bool
    """Whether the names are the authors'."""

    @property
    def root(self) -> str:
        """What the names of all that is of the backbone begin with."""
        return self.network if self.pyramid is None else self.pyramid


def find_network(names: Iterable[str]) -> Place | None:
    """Where the network is, None where there is none.

    Raises:
        ValueError: where there are several.
    """
    names = frozenset(names)
    found = [
        (name.removesuffix(first), first == THEIRS)
        for name in names
        for first in (OURS, THEIRS)
        if name == first or name.endswith(f".{first}")
    ]
    if len(found) > 1:
        prefixes = ", ".join(sorted(repr(prefix) for prefix, _ in found))
        raise ValueError(f"there are several networks, under {prefixes}; save the state dict of one")
    if not found:
        return None
    prefix, official = found[0]
    if official:
        return Place(prefix, prefix if f"{prefix}extra_norm.0.weight" in names else None, official)
    outer = prefix.removesuffix("backbone.")
    return Place(prefix, outer if prefix != outer and f"{outer}norms.0.weight" in names else None, official)


@dataclass(frozen=True)
class Parts:
    """A state dict taken apart."""

    network: dict[str, Tensor]
    """Of the network, in our names and shapes."""
    pyramid: dict[str, Tensor]
    """Of the norms of its features, and the projection of the overview, in the names of :class:`overlock.Pyramid`."""
    rest: dict[str, Tensor]
    """All that is outside of both: a head, another framework's decoder."""


def take_apart(state: Mapping[str, Tensor], place: Place) -> Parts:
    """Network, norms of its features, and the rest.

    Args:
        state: names and tensors, ours or the authors'.
        place: of the network in them.
    """
    root = place.root
    inside = {name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)}
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(root)}
    if place.official:
        inside = from_official(inside, "network" if place.pyramid is None else "pyramid")
    if place.pyramid is None:
        return Parts(inside, {}, rest)
    own = "backbone."
    return Parts(
        {name.removeprefix(own): tensor for name, tensor in inside.items() if name.startswith(own)},
        {name: tensor for name, tensor in inside.items() if not name.startswith(own)},
        rest,
    )
