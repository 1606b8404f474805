"""The runs of a study, one after the other or shared by processes; each run is taken by one process alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from overlock.checkpoints import MODEL_FILE, read_record
from overlock.study.plan import Job, Study
from overlock.training.run import train
from overlock.training.stop import RunStoppedError

try:
    import fcntl
except ImportError:  # Windows, where one process is all that a study has
    fcntl = None  # type: ignore[assignment]

USER_FAULT = 2


def run_study(study: Study, console: Console) -> None:
    """Train what is not trained yet, and what no other process has taken. A run that was stopped goes on.

    Raises:
        ValueError: for faults of data or settings, and where training fails.
        RunStoppedError: on Ctrl-C and its kin, after saving.
    """
    jobs = list(study.jobs())
    for number, job in enumerate(jobs, start=1):
        with _taken(study, job) as mine:
            if not mine or job.result() is not None:
                continue
            console.print(f"{job.title} ({number} of {len(jobs)})", markup=False)
            result = train(job.config, resume=True, console=console)
            record = read_record(result.folder / MODEL_FILE)
            assert record is not None
            job.write_result(top1=result.score, seconds=result.seconds, classes=len(record.classes))


@contextmanager
def _taken(study: Study, job: Job) -> Iterator[bool]:
    """Whether this process has the run; the lock goes with the process, however that ends."""
    if fcntl is None:
        yield True
        return
    path = study.folder(job.row) / f".seed{job.seed}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def run_in_processes(study: Study, count: int, console: Console) -> None:
    """As :func:`run_study`, in processes that share the runs; each on a GPU, or on a part of the cores.

    Raises:
        ValueError: the first fault of a process.
        RunStoppedError: where processes were stopped by a signal.
    """
    context = multiprocessing.get_context("spawn")
    faults: Any = context.SimpleQueue()
    processes = [context.Process(target=_work, args=(study, i, count, faults)) for i in range(count)]
    for process in processes:
        process.start()
    try:
        _watch(study, processes, console)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()  # on which it saves
        for process in processes:
            process.join()
    if not faults.empty():
        raise ValueError(faults.get())
    codes = [process.exitcode or 0 for process in processes]
    if any(codes):
        signum = next((code - 128 for code in codes if code > 128), None)
        if signum is None:
            raise ValueError(f"a process of the study ended with code {next(filter(None, codes))}; repeat the command")
        raise RunStoppedError(signum, "stopped; the same command goes on")


def _watch(study: Study, processes: Sequence[BaseProcess], console: Console) -> None:
    """Show the finished runs until no process is left, or one fails."""
    jobs = list(study.jobs())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("runs", total=len(jobs))
        done: set[str] = set()
        while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
            for job in jobs:
                result = None if job.title in done else job.result()
                if result is not None:
                    done.add(job.title)
                    console.print(f"{job.title}: {100 * result['top1']:.2f} %", markup=False)
            bar.update(task, completed=len(done))
            time.sleep(0.5)


def _work(study: Study, index: int, count: int, faults: Any) -> None:
    """A process of its own: its device, then the runs that it can take."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index % gpus]
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    log = study.output / f"process{index}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Path(log).open("a", encoding="utf-8") as file:
            run_study(study, Console(file=file, width=120, highlight=False))
    except ValueError as error:
        faults.put(" ".join(str(error).split()))
        sys.exit(USER_FAULT)
    except RunStoppedError as stopped:
        sys.exit(128 + stopped.signum)
