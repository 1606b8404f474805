"""What the steps of benchmarks/gpu.py are given: a device, a deadline, and a place for what they find."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from gpu_plan import Progress
from timing import say, write_csv

from overlock.ops import backend

Row = dict[str, object]


class Overdue(BaseException):
    """The time of a step is over. (No Exception, lest what compiles take it for a reason of its own.)"""


@dataclass
class Run:
    """One run of some steps.

    Attributes:
        folder: for the results.
        dry: whether sizes are tiny, and all runs on CPU.
        jobs: processes at a time.
        data: folder of CIFAR-10, or None.
        end: when the present step is to have ended.
        failures: of the present step.
    """

    folder: Path
    dry: bool = False
    jobs: int = 1
    data: Path | None = None
    end: float = float("inf")
    failures: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def _backend(self) -> contextlib.AbstractContextManager[None]:
        """Networks would take Triton's interpreter minutes; what asks for its kernels by name has them."""
        return backend("torch") if self.dry else contextlib.nullcontext()

    def left(self) -> float:
        """Seconds until the present step is to have ended."""
        return self.end - time.time()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Go on after what fails inside, which is told with its traceback."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest is still to be measured
            self.fail(name, error)

    def fail(self, name: str, error: BaseException | str) -> None:
        text = error if isinstance(error, str) else "".join(traceback.format_exception(error))
        self.failures.append(name)
        say(f"FAILED {name}\n{text.rstrip()}")

    def take(self, step: str, rows: Callable[[Run], Iterable[Row]], end: float) -> None:
        """Take one step, and write its rows as they come."""
        progress, self.end, self.failures = Progress(self.folder), end, []
        if self.left() < 1:
            progress.note(step, "skipped", "no time was left")
            return
        progress.note(step, "begun")
        say(f"-- {step}, {self.left():.0f} s")
        found: list[Row] = []
        with (self.folder / f"{step}.jsonl").open("w") as file, self.attempt(step):
            try:
                with _alarm(self.left()), self._backend():
                    for row in rows(self):
                        found.append(row)
                        line = json.dumps({key: _rounded(x) for key, x in row.items()})
                        file.write(f"{line}\n")
                        file.flush()
                        say(line)
            except Overdue:
                self.fail("the rest of the step", "its time was over")
        if found:
            write_csv(found, self.folder / f"{step}.csv")
        torch.compiler.reset()
        if self.device == "cuda":
            torch.cuda.synchronize()  # what a kernel did to the whole process shows here, and a new one is started
            torch.cuda.empty_cache()
        progress.note(step, "failed" if self.failures else "done", ", ".join(self.failures))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise Overdue

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _rounded(x: object) -> object:
    return float(f"{x:.5g}") if isinstance(x, float) else x
