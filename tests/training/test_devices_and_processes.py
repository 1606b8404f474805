"""Memory that a training process keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from overlock.training.runtime import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if {keep}:
    keep_freed_memory()
torch.ones(1)
before = resident()
x = torch.ones(50_000_000)
held = resident() - before
del x
print(held, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="for glibc on Linux")
@pytest.mark.parametrize("keep", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_freed_memory_stays(keep):
    """200 MB stay with the process, where they went back to the system before."""
    command = [sys.executable, "-c", SCRIPT.format(keep=keep)]
    held, left = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert held > 190e6
    assert (left > 190e6) == keep
