"""Everything that is to be known on a GPU, by one command of some minutes.

    python benchmarks/gpu.py --minutes 8 --out results [--data CIFAR10] [--steps 'versions,operators']
    python benchmarks/gpu.py --dry-run --out results     # tiny, on CPU, Triton's kernels in its interpreter

The steps are those of gpu_plan.py. Each row is written as soon as it is known: ``STEP.jsonl``, and ``STEP.csv`` at the
end of the step; all that is printed is in ``log.txt``. What fails is named there with its traceback, and the next thing
is done. A step that hangs or takes the process down costs its own time only: this file starts another process for the
steps after it. Steps for which there is no time are skipped, and said so.

It needs PyTorch, Triton, timm and NumPy, nothing more.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpu_plan import SHARES, Progress, limits

PATIENCE = 15.0  # seconds beyond its limit after which a step's process is ended


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", default=",".join(SHARES), help="names, in the order in which they run")
    parser.add_argument(
        "--data", type=Path, help="folder of CIFAR-10 with train.npz and test.npz, as for overlock train"
    )
    parser.add_argument("--jobs", type=int, help="processes that compile and check at a time; 3 of 4 cores by default")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on CPU, to find mistakes in these files")
    options = parser.parse_args()
    options.steps = options.steps.split(",")
    unknown = [name for name in options.steps if name not in SHARES]
    if unknown:
        parser.error(f"unknown steps {', '.join(unknown)}; there are {', '.join(SHARES)}")
    if options.jobs is None:
        options.jobs = 1 if options.dry_run else max(1, (os.cpu_count() or 1) * 3 // 4)
    return options


def start_worker(options: argparse.Namespace, steps: list[str], ends: dict[str, float], log: Path) -> subprocess.Popen:
    """A process for some steps, in a group of its own, whose output goes on the screen and into the log."""
    here = Path(__file__).resolve().parent
    words = [sys.executable, "-u", here / "gpu_steps.py", "--out", options.out, "--jobs", str(options.jobs)]
    words += ["--ends", ",".join(f"{name}={ends[name]:.1f}" for name in steps)]
    words += ["--data", options.data] if options.data else []
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here.parent / "src"), environment.get("PYTHONPATH")]))
    if options.dry_run:
        words.append("--dry-run")
        environment |= dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    worker = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    threading.Thread(target=copy_output, args=(worker, log), daemon=True).start()
    return worker


def copy_output(worker: subprocess.Popen, log: Path) -> None:
    started = time.time()
    assert worker.stdout is not None
    with log.open("a") as file:
        for line in worker.stdout:
            stamped = f"[{time.time() - started:5.0f} s] {line}"
            for target in (sys.stdout, file):
                target.write(stamped)
                target.flush()


def watch(worker: subprocess.Popen, progress: Progress, ends: dict[str, float]) -> None:
    """Wait until a worker ends, or end it where a step of it takes too long."""
    while worker.poll() is None:
        step = progress.current()
        if step is not None and time.time() > ends[step] + PATIENCE:
            os.killpg(worker.pid, signal.SIGKILL)
        time.sleep(0.2)


def main() -> None:
    """Run the steps in processes of their own until all are done or the time is over."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    progress, log = Progress(options.out), options.out / "log.txt"
    progress.clear()
    ends = limits(options.steps, time.time(), 60 * options.minutes)
    left = list(options.steps)
    while left:
        worker = start_worker(options, left, ends, log)
        watch(worker, progress, ends)
        lost = progress.current()
        if lost is not None:
            progress.note(lost, "lost", f"its process ended with {worker.returncode}")
        elif worker.returncode != 0:
            progress.note(left[0], "lost", f"the process for it ended with {worker.returncode}")
        left = [name for name in left if name not in progress.ended()]
    lines = [f"{name}: {state}{f', {why}' if why else ''}" for name, (state, why) in progress.ended().items()]
    text = "\n".join(["", *lines, ""])
    sys.stdout.write(text)
    with log.open("a") as file:
        file.write(text)
    sys.exit(any(state in ("failed", "lost") for state, _ in progress.ended().values()))


if __name__ == "__main__":
    main()
