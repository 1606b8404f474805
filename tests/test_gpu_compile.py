"""benchmarks/gpu_compile.py: Triton's kernels compile without a GPU, need little of a multiprocessor, and are read."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
knobs = pytest.importorskip("triton.knobs", reason="Triton 3.4 or newer shows what it would compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_compile  # noqa: E402
import torch  # noqa: E402
from launches import Call, Image, Laid, Launch, calls_of, launches_of  # noqa: E402


def convolution(size: int = 7, side: int = 7) -> Call:
    """A large depthwise convolution of four images of 64 channels, channels last."""
    x = Laid((4, 64, side, side), (64 * side * side, 1, 64 * side, 64), None)
    weight = Laid((64, 1, size, size), (size * size, size * size, size, 1), None)
    return Call(torch.ops.overlock.depthwise_conv2d.default, (x, weight, None, 1))


def test_calls_of_a_network():
    """A training step has each operator forward and backward, and its maps are channels last as on a GPU."""
    calls = calls_of("overlock_xt", Image(2, 64, 64))
    names = {str(call.operator).split(".")[1] for call in calls}
    trained = {"contmix", "local_conv", "global_response_norm", "dilated_repconv"}
    assert {"depthwise_conv2d"} | trained | {f"{name}_backward" for name in trained} <= names
    maps = [call.arguments[0] for call in calls if str(call).startswith("depthwise_conv2d ")]
    assert maps
    assert all(x.stride[1] == 1 for x in maps)


def test_a_kernel_compiles_and_is_read(tmp_path, monkeypatch):
    """The forward's two kernels, bfloat16, sm_90: tensor cores, wide loads, no spills, room for other programs."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    launches = [Launch(text, 90, "call", "network") for text in launches_of(convolution(), torch.bfloat16, 90)]
    rows = {gpu_compile.describe(launch)["kernel"]: gpu_compile.compile_launch(launch) for launch in launches}
    assert set(rows) == {"depthwise.band_kernel", "depthwise.conv_kernel"}
    for row in rows.values():
        assert row["spill"] <= 64
        assert row["shared"] < 100_000
        assert row["warps / SM"] >= 8
    row = rows["depthwise.conv_kernel"]
    assert row["tensor"] > 0
    assert row["128, %"] == 100
    assert gpu_compile.compile_launch(launches[0]) == rows["depthwise.band_kernel"]  # as it was kept


def test_a_failure_is_told():
    text = launches_of(convolution(), torch.bfloat16, 90)[0]
    launch = Launch(re.sub(r'"num_warps": \d', '"num_warps": 3', text), 90, "call", "network")
    assert "power of 2" in gpu_compile.compile_launch(launch)["failed"]


CODE = """
 Function kernel:
  REG:40 STACK:16 SHARED:0
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/               @P1 BRA 0x10 ;
        /*0040*/                   BRA 0x40 ;
"""


def test_code_is_read_by_line():
    """Loads by their bits, the loop that works (not the last line, on which a program ends), a thread's stack."""
    row = gpu_compile.read_code(CODE, 90, shared=1024, warps=4)
    assert (row["registers"], row["spill"], row["loads"], row["tensor"]) == (40, 16, 2, 1)
    assert (row["< 32, %"], row["32, %"], row["128, %"]) == (50, 0, 50)
    assert (row["loop"], row["loop's tensor"]) == (3, 1)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "expected"),
    [(32, 0, 4, 90, 64), (255, 0, 8, 90, 8), (128, 0, 4, 90, 16), (32, 100_000, 4, 90, 8), (32, 100_000, 4, 80, 4)],
)
def test_occupancy(registers, shared, warps, arch, expected):
    """By registers, by shared memory, by the most there may be."""
    assert gpu_compile.occupancy(registers, shared, warps, arch) == expected
