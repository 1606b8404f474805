"""Times of the operators on a GPU, and what part they reach of what the card could do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import depthwise
import ops
import torch
from alternatives import make_flex, make_kernels, make_logits
from gpu_run import Row, Run
from timing import interleave_queued, middle, ratio, spread

from overlock.ops.depthwise import CHOICES, choice_key
from overlock.ops.dispatch import TABLE, why_not

BATCH = 128
SHAPES = {
    "stage3_batch128": ops.SHAPES["stage3"]._replace(batch=BATCH),
    "stage3_small_batch128": ops.SHAPES["stage3_small"]._replace(batch=BATCH),
    "stage4_batch128": ops.SHAPES["stage4"]._replace(batch=BATCH),
    "stage3_dense": ops.SHAPES["stage3_dense"],
    "stage3_dense_small": ops.SHAPES["stage3_dense_small"],
    "stage4_dense": ops.SHAPES["stage4_dense"],
}
COMPILED = ("stage3_batch128", "stage3_dense")  # those for which others are compiled, which takes a while
DRY_SHAPES = {"tiny": ops.Shape(1, 1, 4, 4, 3, 4, 3)}
DRY_FILTERS = {"tiny": ((1, 2, 3, 4), 7)}

# An H100's, where they were not measured: bytes a second, and operations a second of matrix products.
BYTES, OPERATIONS = 3.0e12, {"float32": 60e12, "bfloat16": 700e12, "float16": 700e12}


class Work(NamedTuple):
    """Multiply-adds, and the bytes of inputs and results, each moved once."""

    macs: float
    moved: float


def work_of_contmix(shape: ops.Shape, dtype: str, backward: bool) -> Work:
    """With the key folded into the weight, so that a logit takes D multiply-adds.

    Backward makes the kernels again, D, and takes products with K^2 taps for the kernels (C), the value (C), the query
    (D) and the folded key (D).
    """
    batch, groups, depth, channels, height, width, size = shape
    maps, taps = batch * groups * height * width, size * size
    folding = batch * groups * taps * ops.REGIONS * depth
    macs = maps * taps * (depth + channels) + folding
    numbers = maps * (depth + 2 * channels) + batch * groups * depth * ops.REGIONS + taps * ops.REGIONS
    if backward:
        macs += maps * taps * (3 * depth + 2 * channels) + 2 * folding
        numbers += maps * (2 * depth + 3 * channels) + batch * groups * depth * ops.REGIONS + taps * ops.REGIONS
    return Work(macs, numbers * getattr(torch, dtype).itemsize)


def work_of_filter(shape: tuple[int, ...], size: int, dtype: str) -> Work:
    """Of each of the three parts: two maps and K^2 multiply-adds a number."""
    numbers = shape[0] * shape[1] * shape[2] * shape[3]
    return Work(size * size * numbers, (2 * numbers + shape[1] * size * size) * getattr(torch, dtype).itemsize)


class Ceilings(NamedTuple):
    """What the card gives to a copy, and to matrix products of each type."""

    bytes: float
    operations: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> Ceilings:
        """As the first step measured them, in whichever process."""
        path = run.folder / "versions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found = {row["what"].split()[-1]: 1e12 * row["value"] for row in rows if "what" in row}
        return cls(found.get("copy", BYTES), {name: found.get(name, known) for name, known in OPERATIONS.items()})

    def milliseconds(self, work: Work, dtype: str) -> float:
        """The least that some work can take."""
        return 1e3 * max(2 * work.macs / self.operations[dtype], work.moved / self.bytes)


def table(
    common: Row, calls: dict[str, Callable[[], object]], work: Work, dtype: str, ceilings: Ceilings, repeats: int
) -> Iterator[Row]:
    """A row for each call, of calls that wait in the GPU's queue."""
    if not calls:
        return
    seconds = interleave_queued(calls, repeats=repeats, calls=5 if repeats > 2 else 1)
    least, first = ceilings.milliseconds(work, dtype), next(iter(calls))
    for name, taken in seconds.items():
        yield common | {
            "candidate": name,
            "ms": middle(taken),
            "spread, %": spread(taken),
            "least, ms": least,
            "of the ceiling, %": 100 * least / middle(taken),
            f"over {first}": ratio(taken, seconds[first]),
        }


def _others(shape: ops.Shape, inputs: tuple[torch.Tensor, ...], device: str) -> Iterator[tuple[str, ops.Candidate]]:
    """What has to be compiled first."""
    yield "torch, compiled", ops.Candidate(ops.CompiledMix.apply, inputs)
    *made_from, value = inputs
    flex = make_flex(shape.height, shape.width, shape.kernel_size, device)
    yield "FlexAttention", ops.Candidate(lambda *x: flex(make_logits(*x[:-1]), x[-1]), inputs)
    logits = make_logits(*made_from)
    yield "FlexAttention, sum alone", ops.Candidate(flex, (logits, value), makes_kernels=False)


def _plain(inputs: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, ops.Candidate]]:
    for name in ("triton", "torch"):
        yield name, ops.Candidate(lambda *x, name=name: ops.mix(name, *x), inputs)
    yield "unfold", ops.Candidate(lambda *x: ops.by_unfold(make_kernels(*x[:-1]), x[-1]), inputs)


def _contmix(run: Run, name: str, shape: ops.Shape, compiled: bool) -> Iterator[Row]:
    dtype, ceilings = "bfloat16", Ceilings.of(run)
    torch.compiler.reset()
    inputs = ops.make_inputs(shape, run.device, dtype, layout="network")
    for cotangent in (None, torch.ones_like(inputs[-1])):
        with torch.set_grad_enabled(cotangent is not None):
            exact = ops.Candidate(lambda *x: ops.mix("reference", *x), tuple(x.float() for x in inputs))
            expected = ops.make_call(exact, None if cotangent is None else cotangent.float())()
            candidates = list(_plain(inputs))
            if compiled:
                candidates = [candidates[0], *_others(shape, inputs, run.device)]
            if run.dry and cotangent is not None:
                candidates = [x for x in candidates if "FlexAttention" not in x[0]]  # it has no gradients on CPU
            calls = {}
            for candidate, form in candidates:
                with run.attempt(f"{candidate}, {name}, backward: {cotangent is not None}"):
                    call = ops.make_call(form, cotangent)
                    ops.check(candidate, call(), expected, dtype)
                    calls[candidate] = call
            del expected
            common = dict(operator="contmix", shape=name, backward=cotangent is not None)
            work = work_of_contmix(shape, dtype, cotangent is not None)
            yield from table(common, calls, work, dtype, ceilings, 2 if run.dry else 10)


def _filters(run: Run) -> Iterator[Row]:
    """The large depthwise convolution; leaves the table that chooses between its candidates, for ``overlock.ops``."""
    dtype, ceilings, choices = "bfloat16", Ceilings.of(run), {}
    for name, (given, size) in (DRY_FILTERS if run.dry else depthwise.SHAPES).items():
        shape = (given[0] or BATCH, *given[1:])
        x, grad = (
            torch.randn(shape, device=run.device).to(torch.bfloat16, memory_format=torch.channels_last)
            for _ in range(2)
        )  # fmt: skip
        weight = (torch.randn(shape[1], 1, size, size, device=run.device) / size).to(torch.bfloat16)
        for part, operation in depthwise.PARTS.items():
            arguments = (x, weight, None, 1) if part == "forward" else (grad, x, weight, 1)
            calls: dict[str, Callable[[], object]] = {}
            for candidate in ("triton", "torch"):
                with run.attempt(f"{candidate}, {name}, {part}"), torch.no_grad():
                    reason = why_not(operation, candidate, *arguments)
                    if reason:
                        raise ValueError(reason)
                    call = TABLE[operation][candidate].forward
                    call(*arguments)
                    calls[candidate] = lambda call=call, arguments=arguments: call(*arguments)
            common = dict(operator=f"depthwise {part}", shape=name, backward=part != "forward")
            with torch.no_grad():
                work, repeats = work_of_filter(shape, size, dtype), 2 if run.dry else 10
                rows = list(table(common, calls, work, dtype, ceilings, repeats))
            yield from rows
            if len(rows) > 1 and x.is_cuda:
                key = choice_key(operation, x.device, x.dtype, shape, size)
                choices[key] = min(rows, key=lambda row: row["ms"])["candidate"]
                (run.folder / CHOICES.name).write_text(json.dumps(choices, indent=2) + "\n")


def operators(run: Run) -> Iterator[Row]:
    """ContMix and the large depthwise convolution in bfloat16; last, beside what has to be compiled."""
    shapes = DRY_SHAPES if run.dry else SHAPES
    for name, shape in shapes.items():
        with run.attempt(f"contmix, {name}"):
            yield from _contmix(run, name, shape, compiled=False)
    yield from _filters(run)
    for name in shapes if run.dry else COMPILED:
        with run.attempt(f"contmix compiled, {name}"):
            yield from _contmix(run, name, shapes[name], compiled=True)
