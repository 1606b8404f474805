"""Triton's kernels compiled ahead of time, without a GPU: registers, spills, shared memory, instructions, occupancy.

    python benchmarks/gpu_compile.py                                        # OverLoCK-T at 224, sm_90, bfloat16
    python benchmarks/gpu_compile.py --kernels '[contmix]' --dtypes '[float32,bfloat16]' --detail true
    python benchmarks/gpu_compile.py --variants '[xt,t,s,b]' --images all --arch '[80,90,100]' --csv FILE

The kernels are those of a training step of the networks (launches.py): whatever the host code of
``overlock.kernels.triton`` launches now, with its tiles, warps and stages. So after a change to a kernel or to its
tiles the same command shows what became of it. ``--kernels`` takes parts of names such as
``contmix_kernels.forward_kernel``; ``--detail`` prints a row per specialisation, else one per kernel, dtype and
architecture with the worst of each column; ``--csv`` always has all of them. What was compiled and read once is kept
(in Triton's cache, ``~/.triton``), so that only what changed is compiled again. A kernel that does not compile is
named, and the next one taken.

Columns, all of machine code (SASS):

    registers     a thread's; 255 is the most there is
    spill         bytes a thread keeps in memory because registers ran out (its stack frame)
    shared        bytes of shared memory a program
    warps / SM    that fit a multiprocessor at once, of 64; few leave memory's latency in the open
    tensor        tensor-core instructions
    loads         loads from global memory, and the share of them by bits a thread: < 32, 32, 64, 128
    loop          instructions of the longest loop that has no other inside, and tensor instructions among them
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from jsonargparse import auto_cli
from launches import Image, Launch, absent_gpu, find_launches
from rich.progress import track
from timing import leave_out, report, write_csv
from triton import knobs

IMAGES = {
    "one": Image(1, 224, 224),
    "batch": Image(128, 224, 224),
    "512": Image(1, 512, 512),
    "dense": Image(1, 800, 1280),
}
SHARED_OF_SM = {80: 164, 90: 228, 100: 228}  # KB of a multiprocessor, one of which each program loses
REGISTERS_OF_SM, WARPS_OF_SM, PROGRAMS_OF_SM = 65536, 64, 32
TENSOR = re.compile(r"^(?:[HIQDB]MMA|[HIQ]GMMA|UTC\w*MMA)")
LOAD = re.compile(r"^(?:LDG|LDGSTS)\.")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)([^;]*);")

Row = dict[str, object]


# ---- machine code ---------------------------------------------------------------------------------------------------


def occupancy(registers: int, shared: int, warps: int, arch: int) -> int:
    """Warps of a kernel that fit a multiprocessor at once (registers are given out by 256 to a warp of a quarter)."""
    of_warp = -(-registers * 32 // 256) * 256
    programs = min(
        REGISTERS_OF_SM // 4 // of_warp * 4 // warps,
        SHARED_OF_SM[arch] * 1024 // (shared + 1024),
        WARPS_OF_SM // warps,
        PROGRAMS_OF_SM,
    )
    return programs * warps


def bits_of_load(name: str) -> int:
    """Of a thread, by a load's name: LDG.E.128, LDG.E.U16, LDG.E (32), LDGSTS.E.BYPASS.128."""
    for part in name.split("."):
        if re.fullmatch(r"[US]?(8|16|64|128)", part):
            return int(part.lstrip("US"))
    return 32


def innermost_loops(code: list[tuple[int, str, str]]) -> list[list[str]]:
    """Names of the instructions in each loop, a branch back to its start, that has no other inside."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    spans = []
    for i, (address, name, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            spans.append((places[int(target[1], 16)], i))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [[name for _, name, _ in code[a : b + 1]] for a, b in inner]


def read_code(dump: str, arch: int, shared: int, warps: int) -> Row:
    """The columns of a kernel, from what ``cuobjdump -sass -res-usage`` prints."""
    code = [(int(m[1], 16), m[2], m[3]) for m in map(INSTRUCTION.match, dump.splitlines()) if m]
    names = [name for _, name, _ in code]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    if usage is None or not code:
        raise RuntimeError("cuobjdump shows no code")
    registers, stack = int(usage[1]), int(usage[2])
    loads = [bits_of_load(name) for name in names if LOAD.match(name)]
    loop = max(innermost_loops(code), key=len, default=[])
    share = Counter(min(max(bits, 16), 128) for bits in loads)
    return {
        "registers": registers,
        "spill": stack,
        "shared": shared,
        "warps": warps,
        "warps / SM": occupancy(registers, shared, warps, arch),
        "instructions": len(names),
        "tensor": sum(1 for name in names if TENSOR.match(name)),
        "loads": len(loads),
        **{f"{label}, %": round(100 * share[bits] / max(len(loads), 1)) for bits, label in LABELS.items()},
        "loop": len(loop),
        "loop's tensor": sum(1 for name in loop if TENSOR.match(name)),
    }


LABELS = {16: "< 32", 32: "32", 64: "64", 128: "128"}


def dump_code(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- compilation ----------------------------------------------------------------------------------------------------


def function_of(launch: Launch) -> Any:
    module, _, name = json.loads(launch.specialization)["name"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def kept_at(launch: Launch) -> Path:
    """File for the row of a kernel as its source, Triton and this file are now."""
    parts = (launch.specialization, launch.arch, function_of(launch).cache_key, triton.__version__)
    digest = hashlib.sha256(repr((parts, Path(__file__).read_bytes())).encode()).hexdigest()
    return Path(knobs.cache.dir) / "gpu_compile" / f"{digest}.json"


def compile_launch(launch: Launch) -> Row:
    """Columns of one kernel; ``failed`` has the reason where it does not compile."""
    file = kept_at(launch)
    if file.exists():
        return json.loads(file.read_text())
    try:
        with absent_gpu(launch.arch):
            kernel = function_of(launch).preload(launch.specialization)
        row = read_code(dump_code(kernel.asm["cubin"]), launch.arch, kernel.metadata.shared, kernel.metadata.num_warps)
    except Exception as error:  # noqa: BLE001 - whatever the compiler fails with is the finding
        return {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(row))
    unfinished.replace(file)
    return row


def describe(launch: Launch) -> Row:
    """The first columns: which kernel, for what."""
    what = json.loads(launch.specialization)
    names = function_of(launch).arg_names
    pointers = (kind for kind in what["signature"].values() if kind.startswith("*"))
    constants = {names[key[0]]: value for key, value in zip(what["constant_keys"], what["constant_vals"], strict=True)}
    return {
        "kernel": what["name"].removeprefix("overlock.kernels.triton."),
        "dtype": next(pointers).lstrip("*"),
        "sm": launch.arch,
        "network": launch.network,
        "call": launch.call,
        "constants": " ".join(f"{name}={value}" for name, value in constants.items()),
    }


def compile_all(launches: list[Launch], processes: int) -> list[Row]:
    """A row of each, in order, by several processes."""
    found: dict[Launch, Row] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[Row], Launch] = {pool.submit(compile_launch, launch): launch for launch in launches}
        for future in track(as_completed(futures), "compiling", total=len(futures)):
            found[futures[future]] = future.result()
    return [describe(launch) | found[launch] for launch in launches]


# ---- the table ------------------------------------------------------------------------------------------------------

WORST_IS_LEAST = ("warps", "warps / SM", "tensor", "loads", "64, %", "128, %", "loop's tensor")


def summarise(rows: Iterable[Row]) -> list[Row]:
    """A row per kernel, dtype and architecture, with the worst value of each column."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"], row["sm"]), []).append(row)
    table = []
    for (kernel, dtype, arch), members in sorted(groups.items(), key=lambda item: repr(item[0])):
        columns = [name for name in members[0] if isinstance(members[0][name], int) and name != "sm"]
        worst = {
            name: (min if name in WORST_IS_LEAST else max)(row[name] for row in members)  # type: ignore[type-var]
            for name in columns
        }
        table.append({"kernel": kernel, "dtype": dtype, "sm": arch, "kinds": len(members), **worst})
    return table


def main(
    variants: list[Literal["xt", "t", "s", "b"]] | None = None,
    images: list[Literal["one", "batch", "512", "dense"]] | Literal["all"] | None = None,
    dtypes: list[Literal["float32", "bfloat16", "float16"]] | None = None,
    arch: list[Literal[80, 90, 100]] | None = None,
    kernels: list[str] | None = None,
    detail: bool = False,
    csv: str | None = None,
    processes: int = 2,
) -> None:
    """Compile, read the machine code, print a table.

    Args:
        variants: of OverLoCK.
        images: one and batch (128) are of 224 x 224, 512 and dense (800 x 1280) one image.
        dtypes: of the network.
        arch: compute capabilities without their point.
        kernels: parts of kernels' names; all by default.
        detail: a row of each specialisation instead of the worst of all.
        csv: file for the table of all specialisations.
        processes: that compile at the same time.
    """
    sizes = list(IMAGES.values()) if images == "all" else [IMAGES[name] for name in images or ["batch"]]
    types = [getattr(torch, name) for name in dtypes or ["bfloat16"]]
    launches = find_launches([f"overlock_{name}" for name in variants or ["t"]], sizes, types, list(arch or [90]))
    if kernels:
        launches = [x for x in launches if any(part in str(describe(x)["kernel"]) for part in kernels)]
    rows = compile_all(launches, processes)
    whole = [row for row in rows if "failed" not in row]
    for row in rows:
        if "failed" in row:
            leave_out(f"{row['kernel']} {row['dtype']} sm_{row['sm']} {row['constants']}", str(row["failed"]))
    if whole:
        report(f"Compiled by Triton {triton.__version__}", whole if detail else summarise(whole), None)
        if csv:
            write_csv(whole, csv)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
