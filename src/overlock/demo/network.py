"""A network that is looked into, by many visitors, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from overlock.analysis.activation_maps import activation_map, find_layers, target_of
from overlock.analysis.backbones import Preparation, find_overlock
from overlock.analysis.dynamic_kernels import Mixing, Replace, kept_prior, record_mixing, replaced_prior
from overlock.deploy.models import load_network
from overlock.deploy.runtime import Precision, autocast_to, choose_device
from overlock.network import OverLoCK
from overlock.ops import backend

TOP = 5  # classes that are shown


class Runtime(NamedTuple):
    """Where and how networks run."""

    device: str | None = None
    """'cpu', 'cuda' and so on; a GPU where there is one unless given."""
    precision: Precision = "fp32"


DEFAULT = Runtime()


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a network made of an image in one forward pass."""

    classes: tuple[tuple[str, float], ...]
    """Names and probabilities, the most probable first."""
    label: int
    """Place of the first of them among the network's classes."""
    mixings: tuple[Mixing, ...] = ()
    """Of its ContMix layers; none of other networks."""
    prior: Tensor | None = None
    """Its context prior (1, Cc, H, W)."""


class Network:
    """A classifier: its classes, activation maps and, of an OverLoCK, dynamic kernels of an image.

    Images go in whole, without the crop of an evaluation, so that a place in a map is that place in the photo. All runs
    in plain PyTorch: the kernels for the CPU may have to be compiled, for which no visitor waits.

    Args:
        source: as :func:`overlock.deploy.models.load_network` takes it.
        model: timm's name, for a file that does not say.
        runtime: where it runs.

    Raises:
        ValueError: for a missing, damaged or foreign file, and one that is no classifier of photos.
    """

    def __init__(self, source: str, *, model: str | None = None, runtime: Runtime = DEFAULT):
        network, self.record = load_network(source, model=model)
        if self.record.task != "classify" or self.record.channels != 3:
            raise ValueError(f"{source} is a {self.record.name}; give a classifier of photos in colour")
        self.name = Path(source).stem if Path(source).is_file() else Path(source).name
        self.device, self.precision = choose_device(runtime.device), runtime.precision
        self.network = network.eval().to(self.device)
        self.prepare = Preparation(self.network, self.record)
        self.layers = find_layers(self.network, self.name)
        self.overlock = find_overlock(network, self.name) if isinstance(network, OverLoCK) else None
        self._lock = threading.Lock()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hooks and gradients of one call at a time."""
        with self._lock, backend("torch"), autocast_to(self.precision, self.device):
            yield

    def look(self, image: Image.Image, *, replace: Replace | None = None) -> Look:
        """Classes and, of an OverLoCK, kernels and prior, perhaps with another prior than the image's own.

        Raises:
            ValueError: where the network gives no finite numbers.
        """
        with self._alone(), torch.no_grad():
            x = self.prepare(image).to(self.device)
            if self.overlock is None:
                return self._judge(self.network(x))
            logits: list[Tensor] = []
            with replaced_prior(self.overlock, replace or _same), kept_prior(self.overlock) as priors:
                mixings = record_mixing(self.overlock, lambda: logits.append(self.network(x)))
            return self._judge(logits[0], mixings=tuple(mixings), prior=priors[0])

    def _judge(self, logits: Tensor, **seen: Any) -> Look:
        shares = logits[0].float().softmax(dim=0).cpu()
        if not shares.isfinite().all():
            raise ValueError(f"{self.name} gives no finite numbers for this photo; check its weights")
        order = shares.argsort(descending=True).tolist()
        classes = tuple((self.record.classes[place], float(shares[place])) for place in order[:TOP])
        return Look(classes=classes, label=order[0], **seen)

    def maps(self, image: Image.Image, layers: Iterable[str], label: int) -> Iterator[np.ndarray[Any, Any]]:
        """Where layers find a class by Grad-CAM, one after the other, (H, W) of 0 to 1 each."""
        with self._alone():
            x = self.prepare(image).to(self.device)
            target, _ = target_of(self.network, x, "classify", label)
        for name in layers:
            layer = self.layers[name]
            with self._alone():
                self.network.requires_grad_(False)
                layer.module.requires_grad_(True)  # so that no gradient goes further back, nor to weights beyond
                found = activation_map(self.network, x, layer, [target])[0]
            yield found


def _same(prior: Tensor) -> Tensor:
    return prior
