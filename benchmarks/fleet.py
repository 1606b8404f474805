"""Trainings in processes of their own that share one GPU: all take the same number of steps, as many as there is time.

Each process makes its networks ready and measures a step of theirs alone. From the sum of these the number of steps
follows. Then they train, a few at a time, so that one prepares or tests while others compute. What fails is told, and
the others go on; results are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from captured import CapturedTraining, train_together
from timing import say, write_csv

STEPS_FILE = "steps.json"
SETUP_SHARE = 0.4  # of the time, for making ready
SAFETY = 0.9  # of the time left then, for the steps as they were measured
TEST_SECONDS = 1.0  # for each training
MEASURED = 5  # steps, twice
Row = dict[str, Any]


class Prepared(NamedTuple):
    """What a process is to do."""

    trainings: list[CapturedTraining]
    """Side by side."""
    finish: Callable[[int, float], list[Row]]
    """Given steps and seconds, tests; rows for the table."""
    watch: Callable[[int, int], None] = lambda _done, _steps: None
    """Now and then, given the steps that are done and those that are to be."""


@dataclass(frozen=True)
class Job:
    """A process of the fleet."""

    name: str
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Fleet:
    """How all of them run.

    Attributes:
        folder: for what they write.
        end: when all is to be over, by time.time().
        at_a_time: processes that train at the same time.
        steps: of each training, where they are given.
        most_steps: however much time there is.
    """

    folder: Path
    end: float
    at_a_time: int
    steps: int | None
    most_steps: int

    def run(self, jobs: Sequence[Job]) -> list[Row]:
        """Rows of what came to its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STEPS_FILE).unlink(missing_ok=True)
        context = multiprocessing.get_context("spawn")
        gpu, turns = context.Lock(), context.Semaphore(self.at_a_time)
        processes = {
            job.name: context.Process(target=_work, args=(job, self, gpu, turns), name=job.name) for job in jobs
        }
        for process in processes.values():
            process.start()
        try:
            self._choose_steps(processes)
            for process in processes.values():
                process.join(max(0.1, self.end - time.time()))
        finally:
            for process in processes.values():
                if process.is_alive():
                    say(f"{process.name}: its time was over")
                    process.kill()
                process.join()
        rows = [row for job in jobs for row in _read(self.folder / f"{job.name}.rows.json") or []]
        if rows:
            write_csv(rows, self.folder / "runs.csv")
        return rows

    def _choose_steps(self, processes: dict[str, Any]) -> None:
        started = time.time()
        limit = started + SETUP_SHARE * (self.end - started)
        while True:
            waits = [name for name, p in processes.items() if p.is_alive() and not self.ready(name)]
            if not waits or (time.time() > limit and len(waits) < len(processes)) or time.time() > self.end:
                break
            time.sleep(0.1)
        for name in waits:
            say(f"{name}: not ready after {time.time() - started:.0f} s, and left out")
            processes[name].kill()
        costs = {name: x["seconds"] for name in processes if name not in waits and (x := self.ready(name))}
        if not costs:
            return
        tests = TEST_SECONDS * sum(self.ready(name)["trainings"] for name in costs) / self.at_a_time
        fits = int(SAFETY * (self.end - time.time() - tests) / max(1e-9, sum(costs.values())))
        steps = self.steps or max(20, min(self.most_steps, fits // 20 * 20))
        for name, seconds in sorted(costs.items(), key=lambda item: -item[1]):
            say(f"{name}: {1000 * seconds:.2f} ms a step of all its networks")
        say(f"ready after {time.time() - started:.0f} s; {steps} steps each (there is time for {fits})")
        (self.folder / "new").write_text(json.dumps(dict(steps=steps, seconds=costs)))
        (self.folder / "new").rename(self.folder / STEPS_FILE)

    def ready(self, name: str) -> Row:
        """What a process says when it is."""
        return _read(self.folder / f"{name}.ready.json") or {}


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, content: object) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.rename(path)


def _work(job: Job, fleet: Fleet, gpu: Any, turns: Any) -> None:
    """A process: ready, a step measured, trained, tested."""
    torch.set_num_threads(1)
    try:
        trainings, finish, watch = job.prepare()
        for training in trainings:
            try:
                training.capture()
            except RuntimeError:
                say(f"{job.name}: no CUDA graph of its step, so by separate launches\n{traceback.format_exc()}")
        with gpu:
            seconds = _seconds_a_step(trainings)
        _write(fleet.folder / f"{job.name}.ready.json", dict(seconds=seconds, trainings=len(trainings)))
        while (chosen := _read(fleet.folder / STEPS_FILE)) is None:
            time.sleep(0.1)
        steps = chosen["steps"]

        def look(done: int) -> bool:
            watch(done, steps)
            return time.time() < fleet.end

        with turns:
            started = time.time()
            for training in trainings:
                training.plan(steps)
            if not train_together(trainings, steps, watch=look):
                raise TimeoutError("the time was over before all steps were taken")
            rows = finish(steps, time.time() - started)
        _write(fleet.folder / f"{job.name}.rows.json", rows)
        for row in rows:
            say(json.dumps(row))
    except Exception:  # noqa: BLE001 - the others go on
        say(f"FAILED {job.name}\n{traceback.format_exc()}")
        os._exit(1)  # a broken CUDA context must not hold up the end


def _seconds_a_step(trainings: list[CapturedTraining]) -> float:
    """The least of two measurements; afterwards all is as it was."""
    found = []
    for training in trainings:
        training.plan(2 * MEASURED)
    with contextlib.ExitStack() as stack:
        for training in trainings:
            stack.enter_context(training.unchanged())
        for _ in range(2):
            started = time.perf_counter()
            train_together(trainings, MEASURED, watch=lambda _: True)
            found.append((time.perf_counter() - started) / MEASURED)
    return min(found)


def add_options(parser: argparse.ArgumentParser, minutes: float) -> None:
    """Those that all drivers have."""
    parser.add_argument("--minutes", type=float, default=minutes, help="for all of it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--data", type=str, required=True, help="folder of train.npz, test.npz and classes.txt")
    parser.add_argument("--steps", type=int, help="of each training; as many as there is time for unless given")
    parser.add_argument("--at-a-time", type=int, default=3, help="processes that train at the same time")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on CPU, to find mistakes in these files")
