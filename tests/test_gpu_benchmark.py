"""benchmarks/gpu.py, which is to need no second try: whatever fails in its steps, on a machine with few packages."""

from __future__ import annotations

import csv
import json
import sys
import time

import pytest
from bare import ROOT, run_bare

sys.path.append(str(ROOT / "benchmarks"))

from gpu_plan import SHARES, Progress, limits
from gpu_run import Run
from timing import say


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_limits_share_the_time():
    steps = ["versions", "operators", "memory"]
    ends = limits(steps, 100.0, 50.0)
    assert list(ends.values())[-1] == pytest.approx(150.0)
    total = sum(SHARES[name] for name in steps)
    assert ends["versions"] - 100 == pytest.approx(50 * SHARES["versions"] / total, rel=0.01)


def test_what_fails_is_named_and_the_rest_done(tmp_path, capsys):
    """Inside a step, by a step, and by a step that takes too long; rows before it are kept."""

    def partly(run):
        yield dict(number=1)
        with run.attempt("the second"):
            raise RuntimeError("no such kernel")
        yield dict(number=3, more=0.5)

    def broken(run):
        yield dict(number=1)
        raise ValueError("bad shape")

    def endless(run):
        yield dict(number=1)
        time.sleep(30)

    run = Run(tmp_path, dry=True)
    for step, end in ((partly, 60), (broken, 60), (endless, 2), (partly, 0)):
        run.take("late" if end == 0 else step.__name__, step, time.time() + end)
    assert Progress(tmp_path).ended() == {
        "partly": ("failed", "the second"),
        "broken": ("failed", "broken"),
        "endless": ("failed", "the rest of the step"),
        "late": ("skipped", "no time was left"),
    }
    assert read(tmp_path / "partly.csv") == [dict(number="1", more=""), dict(number="3", more="0.5")]
    lines = (tmp_path / "broken.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dict(number=1)]
    printed = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in printed
    assert "Traceback" in printed


def test_a_lost_process_costs_its_step_only(tmp_path, monkeypatch):
    """The one that watches starts another for the steps after it."""
    import gpu

    worker = (
        "import sys, pathlib; sys.path.append({path!r}); from gpu_plan import Progress\n"
        "p = Progress(pathlib.Path({out!r}))\n"
        "for step in {steps!r}:\n"
        "    p.note(step, 'begun')\n"
        "    if step == 'finite': import os; os.abort()\n"
        "    if step == 'memory': import time; time.sleep(60)\n"
        "    p.note(step, 'done')\n"
    )

    def start(options, steps, ends, log):
        code = worker.format(path=str(ROOT / "benchmarks"), out=str(tmp_path), steps=steps)
        return gpu.subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    monkeypatch.setattr(gpu, "start_worker", start)
    monkeypatch.setattr(gpu, "PATIENCE", 0.5)
    words = ["gpu.py", "--out", str(tmp_path), "--minutes", "0.03", "--steps", "versions,finite,memory,training"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        gpu.main()
    states = {step: state for step, (state, _) in Progress(tmp_path).ended().items()}
    assert states == dict(versions="done", finite="lost", memory="lost", training="done")


def test_collection_of_gpu_tests_needs_few_packages(tmp_path):
    """Nothing but PyTorch, Triton, timm, NumPy and pytest."""
    done = run_bare(tmp_path, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("test_dispatch.py", "test_depthwise.py", "test_precision.py"):
        assert part in done.stdout
    assert "error" not in done.stdout.lower()


@pytest.mark.slow
def test_dry_run(tmp_path, shared_data):
    """All steps, with the same few packages."""
    out = tmp_path / "out"
    data = shared_data / "cifar10"
    done = run_bare(tmp_path, "benchmarks/gpu.py", "--dry-run", "--out", out, "--minutes", "8", "--data", data)
    say(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert {step: state for step, (state, _) in Progress(out).ended().items()} == dict.fromkeys(SHARES, "done")
    for step in SHARES:
        assert read(out / f"{step}.csv"), step
    assert all(row["right"] == "True" for row in read(out / "correctness.csv"))
