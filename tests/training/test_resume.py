"""A run that is stopped at any place, or killed, goes on to the very weights of a run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from runs import STEPS, assert_same, final_state, make_images, run, settings

from overlock.training.run import begin_run, train
from overlock.training.stop import RunStoppedError
from overlock.training.trainer import Trainer


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Images, and the folder of a run on them."""
    root = tmp_path_factory.mktemp("resume")
    make_images(root / "data")
    run(settings(root / "data", root / "unbroken"))
    return root / "data", root / "unbroken"


def interrupt(monkeypatch, method: str, call: int, signum: int = signal.SIGTERM) -> None:
    """Send a signal to this process within the n-th call of a method of Trainer."""
    original, calls = getattr(Trainer, method), []

    def wrapped(self, *args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    monkeypatch.setattr(Trainer, method, wrapped)


PHASES = {
    "before the first step": ("train_epoch", 1),
    "the first step": ("train_step", 1),
    "a step": ("train_step", 2),
    "the last step of an epoch": ("train_step", STEPS),
    "a test": ("validate", 1),
    "writing a checkpoint": ("save", 2),
    "the first step of the last epoch": ("train_step", STEPS + 1),
    "the last step": ("train_step", 2 * STEPS),
    "the last test": ("validate", 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_by_sigterm(unbroken, tmp_path, monkeypatch, phase):
    data, whole = unbroken
    config = settings(data, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, *PHASES[phase])
        with pytest.raises(RunStoppedError, match="go on with the same command and --resume") as stopped:
            run(config)
    assert stopped.value.signum == signal.SIGTERM
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert "going on from epoch" in run(config, resume=True)
    assert_same(tmp_path / "run", whole)
    log = [(f / "log.csv").read_text().splitlines() for f in (tmp_path / "run", whole)]
    times = [[line.rsplit(",", 2)[0] for line in lines] for lines in log]
    assert times[0] == times[1]  # all columns but the times


def test_stopped_after_the_last_test_ends_all_the_same(unbroken, tmp_path, monkeypatch):
    """The files of a run that is through are written in a moment; the signal does not lose them."""
    data, whole = unbroken
    from overlock.training import run as module

    original = module.finish

    def finish(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        original(*args)

    with module.StopRequest():  # as if the signal came an instant before the run's own handlers are taken away
        monkeypatch.setattr(module, "finish", finish)
        train(settings(data, tmp_path / "run"))
    assert_same(tmp_path / "run", whole)


def test_stopped_twice_by_ctrl_c(unbroken, tmp_path, monkeypatch):
    data, whole = unbroken
    config = settings(data, tmp_path / "run")
    for call in (3, 2):
        with monkeypatch.context() as patch:
            interrupt(patch, "train_step", call, signal.SIGINT)
            with pytest.raises(RunStoppedError):
                run(config, resume=True)
    run(config, resume=True)
    assert_same(tmp_path / "run", whole)


def test_a_second_ctrl_c_interrupts_at_once(unbroken, tmp_path, monkeypatch):
    data, _ = unbroken

    def twice(self, *_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(Trainer, "train_step", twice)
    with pytest.raises(KeyboardInterrupt):
        run(settings(data, tmp_path / "run"))


def test_loading_processes_change_nothing(unbroken, tmp_path):
    data, whole = unbroken
    run(settings(data, tmp_path / "run", runtime=dict(workers=2)))
    assert_same(tmp_path / "run", whole)


def test_the_seed_matters(unbroken, tmp_path):
    data, whole = unbroken
    run(settings(data, tmp_path / "run", seed=1))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


def test_resume_of_a_finished_run_changes_nothing(unbroken, tmp_path):
    data, whole = unbroken
    before = final_state(whole)
    run(settings(data, whole), resume=True)
    after = final_state(whole)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_where_there_is_nothing_begins(unbroken, tmp_path):
    data, whole = unbroken
    run(settings(data, tmp_path / "run"), resume=True)
    assert_same(tmp_path / "run", whole)


def test_resume_and_overwrite_at_once(unbroken, tmp_path):
    config = settings(unbroken[0], tmp_path / "run")
    with pytest.raises(ValueError, match="give one of them"):
        run(config, resume=True, overwrite=True)


def test_resume_with_other_settings(unbroken, tmp_path):
    data, whole = unbroken
    with pytest.raises(ValueError, match=r"begun with other settings of epochs, optim\.lr; repeat its own command"):
        run(settings(data, whole, epochs=3, optim=dict(lr=5e-3)), resume=True)
    run(settings(data, whole, runtime=dict(workers=1), safety=dict(minutes=1.0)), resume=True)


def test_files_of_earlier_runs_do_not_matter_to_a_new_one(unbroken, tmp_path):
    data, whole = unbroken
    run(settings(data, tmp_path / "run", seed=3))
    (tmp_path / "run" / "unreadable.txt").write_text("old.png: damaged\n" * 3)
    boards = len(list((tmp_path / "run" / "tensorboard").iterdir()))
    run(settings(data, tmp_path / "run"), overwrite=True)
    assert_same(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "unreadable.txt").exists()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == boards == 1


def kill_and_resume(data, whole, folder, kills: int) -> None:
    """Kill a run's process with SIGKILL at random moments and begin it again, until it ends by itself."""
    config = settings(data, folder / "run", safety=dict(steps=1))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "overlock.cli", "train", "--config", str(folder / "config.yaml"), "--resume"]
    checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
    chance = random.Random(kills)
    killed = 0
    while True:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
            try:
                if killed < kills:
                    deadline = time.monotonic() + 60
                    while process.poll() is None and time.monotonic() < deadline:  # until something was saved
                        if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                            break
                        time.sleep(0.005)
                    time.sleep(chance.uniform(0, 0.12))
                    process.kill()
                    killed += 1
                _, errors = process.communicate(timeout=120)
            finally:
                process.kill()  # also where it took too long
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
    assert killed == kills
    assert_same(folder / "run", whole)


def test_killed_once(unbroken, tmp_path):
    kill_and_resume(*unbroken, tmp_path, kills=1)


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    make_images(tmp_path / "data", 24)
    run(settings(tmp_path / "data", tmp_path / "whole"))
    kill_and_resume(tmp_path / "data", tmp_path / "whole", tmp_path, kills=10)


def test_begin_is_called_once(unbroken, tmp_path, monkeypatch):
    """Resuming leaves the settings file as the run began with it."""
    data, whole = unbroken
    monkeypatch.setattr("overlock.training.run.begin_run", lambda *_: pytest.fail("begun again"))
    run(settings(data, whole, runtime=dict(workers=1)), resume=True)
    assert begin_run.__name__ == "begin_run"
    assert yaml.safe_load((whole / "config.yaml").read_text())["runtime"]["workers"] == 0
