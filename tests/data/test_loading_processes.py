"""The processes that load images end with their use, in time and without a word, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from overlock.data.loaders import ImageLoader


class Numbers(torch.utils.data.Dataset):
    """Zero comes at once, the next ones only after a minute; or an error comes."""

    def __init__(self, fault=None):
        self.fault = fault

    def __len__(self):
        return 8

    def __getitem__(self, place):
        if self.fault and place == 3:
            raise ValueError(self.fault)
        if not self.fault and place > 1:
            time.sleep(60)
        return torch.tensor(place)


@pytest.mark.parametrize("error", [ValueError("a fault of the parent"), KeyboardInterrupt()])
def test_busy_processes_are_gone_soon(error):
    loader = ImageLoader(Numbers(), num_workers=2, prefetch_factor=2)
    with pytest.raises(type(error)), loader.batches() as batches:
        assert int(next(batches)) == 0
        started = time.monotonic()
        raise error
    assert time.monotonic() - started < 10
    assert multiprocessing.active_children() == []
    with loader.batches() as batches:  # and again
        assert int(next(batches)) == 0


def test_processes_are_gone_after_a_fault_of_one():
    """While the error, whose traceback holds the iterator, is still there."""
    loader = ImageLoader(Numbers("a fault of a process"), num_workers=2)
    try:
        with loader.batches() as batches:
            list(batches)
    except ValueError as error:
        assert "a fault of a process" in str(error)
        assert multiprocessing.active_children() == []
    else:
        pytest.fail("no error came")


def test_signals_are_left_to_the_parent():
    loader = ImageLoader(Numbers("late"), num_workers=1, prefetch_factor=1)
    with loader.batches() as batches:
        next(batches)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
            os.kill(child.pid, signal.SIGINT)
        assert int(next(batches)) == 1


ORPHANS = """
import multiprocessing, os, sys
sys.path.insert(0, {folder!r})
from test_loading_processes import Numbers
from overlock.data.loaders import ImageLoader
with ImageLoader(Numbers(), num_workers=2).batches() as batches:
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), {signum})
    next(batches)
"""


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_processes_do_not_outlive_their_parent(signum):
    script = ORPHANS.format(folder=str(Path(__file__).parent), signum=int(signum))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    pids = [int(word) for word in done.stdout.split()]
    assert done.returncode == -signum
    assert len(pids) == 2
    assert done.stderr == ""
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
