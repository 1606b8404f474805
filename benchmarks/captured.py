"""Training whose whole step is one CUDA graph: for small networks, which would wait for their launches otherwise.

Images stay on the GPU. What differs from step to step lies in tables there, and a step reads its rows of them: which
images, the learning rate, how fast the average of the weights follows. The schedule, the optimiser, the loss and the
average are the package's own, of a :class:`overlock.training.config.TrainConfig`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from overlock.data.loaders import Batch
from overlock.training.classification import Classification
from overlock.training.config import TrainConfig
from overlock.training.optim import make_average, make_optimizer, make_schedule

Draw = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of the number of a step, (1,) int64, its images (B, 3, H, W), normalised, and its labels (B,) or (B, classes)."""

CHECKED_EVERY = 20  # steps


class CapturedTraining:
    """A network that is trained, and the moving average of its weights.

    Args:
        network: on its device.
        config: the settings that count here are those of the optimiser, the loss and the average.
        draw: makes the batch of a step.
        most_steps: room in the tables.
        classes: of the labels.
    """

    def __init__(self, network: nn.Module, config: TrainConfig, draw: Draw, *, most_steps: int, classes: int):
        self.device = next(network.parameters()).device
        self.network = network.train()
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.config, self.draw = config, draw
        self.task = Classification(config.loss, classes)
        self.optimizer = make_optimizer(network, config.optim, batch_size=config.batch_size)
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.rate = torch.zeros((), device=self.device)
        self.rates, self.follow, self.losses = (torch.zeros(most_steps, device=self.device) for _ in range(3))
        if self.device.type == "cuda":
            for group in self.optimizer.param_groups:
                group |= dict(capturable=True, lr=self.rate)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None

    def plan(self, steps: int) -> None:
        """Fill the tables for a run of so many steps."""
        parameter = nn.Parameter(torch.zeros(()))
        shadow = torch.optim.SGD([parameter], lr=self.config.optim.peak(self.config.batch_size))
        schedule = make_schedule(shadow, self.config, steps_per_epoch=max(1, steps // self.config.epochs))
        average = make_average(nn.Linear(1, 1), self.config.ema)
        rates, follow = [], []
        for step in range(steps):
            schedule.step_update(step)
            rates.append(shadow.param_groups[0]["lr"])
            follow.append(1.0 if average is None else 1 - average.get_decay(step + 1))
        self.rates[:steps] = torch.tensor(rates, device=self.device)
        self.follow[:steps] = torch.tensor(follow, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> torch.autocast:
        """bfloat16 on a GPU. (A graph must cast the weights afresh, so none that are cast are kept.)"""
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda", cache_enabled=False)

    def step(self) -> None:
        """One step by separate launches."""
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = self.draw(self.at)
        with self.autocast():
            loss = self.task.loss(self.network, Batch(images, labels, ()))
        loss.backward()
        if self.config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optim.clip_norm)
        self.rate.copy_(self.rates[self.at].squeeze(0))
        if self.device.type != "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rate)
        self.optimizer.step()
        self._follow()
        self.losses.index_copy_(0, self.at, loss.detach().view(1))
        self.at += 1

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average by this step's share."""
        share = self.follow[self.at].squeeze(0)
        average, now = _pairs(self.average, self.network)
        change = torch._foreach_sub(now, average)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(average, change)

    def capture(self) -> None:
        """Take three steps, and make a graph of one. Afterwards the network and all else are as they were before.

        Raises:
            RuntimeError: for a step that cannot be captured; it then goes by separate launches.
        """
        with self.unchanged():
            if self.stream is None:
                self.step()
            else:
                self._capture(self.stream)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Steps that are taken inside are undone."""
        tensors = list(itertools.chain(self.network.state_dict().values(), self.average.state_dict().values()))
        before = [x.clone() for x in tensors]
        try:
            yield
        finally:
            self.wait()
            self._restore(tensors, before)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()  # on a stream of its own, and so with a workspace of its own
        self.graph = graph

    @torch.no_grad()
    def _restore(self, tensors: list[Tensor], before: list[Tensor]) -> None:
        self.at.zero_()
        torch._foreach_copy_(tensors, before)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def advance(self) -> None:
        """The next step: the graph where there is one. It returns before the GPU has done it."""
        if self.stream is None:
            self.step()
            return
        with torch.cuda.stream(self.stream):
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()

    def wait(self) -> None:
        """Until all steps so far are done."""
        if self.stream is not None:
            self.stream.synchronize()

    @torch.inference_mode()
    def accuracy(self, batches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """Of the average, on images and labels."""
        right = total = 0
        for images, labels in batches:
            with self.autocast():
                right += (self.average(images).argmax(1) == labels).sum()
            total += len(labels)
        return float(right) / total


def _pairs(average: nn.Module, network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of both that are to agree; counts have no average, and norms with a fixed momentum do not read them."""
    both = zip(average.state_dict().values(), network.state_dict().values(), strict=True)
    kept = [(a, b) for a, b in both if a.is_floating_point()]
    return [a for a, _ in kept], [b for _, b in kept]


def train_together(trainings: list[CapturedTraining], steps: int, *, watch: Callable[[int], bool]) -> bool:
    """Train all for so many steps, side by side on the GPU.

    Args:
        trainings: of one process.
        steps: of each.
        watch: is told every 20 steps, which the GPU has then done, how many there were; whether to go on.

    Returns:
        Whether they came to the end.
    """
    for step in range(1, steps + 1):
        for training in trainings:
            training.advance()
        if step % CHECKED_EVERY == 0:  # also lest thousands of launches wait in line
            for training in trainings:
                training.wait()
            if not watch(step):
                return False
    for training in trainings:
        training.wait()
    return True
