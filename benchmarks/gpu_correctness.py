"""Operators and network on a GPU against float64: values, gradients, the same bits twice, training steps."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import NamedTuple

import depthwise
import gpu_fused
import ops
import torch
from gpu_run import Row, Run
from torch import Tensor
from torch.nn import functional as F

from overlock.layers.dilated_repconv import branches_of
from overlock.ops import backend, contmix, depthwise_conv2d, local_conv, response_norm
from overlock.ops.dispatch import TABLE, why_not

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3}
DTYPES = tuple(TOLERANCE)

# Those of OverLoCK-T by name, with small batches of the small maps; and groups of 14, 10 and 8 channels, which are XT's
# and S's.
CONTMIX = {
    "stage3_dense": ops.SHAPES["stage3_dense"],
    "stage3_dense_small": ops.SHAPES["stage3_dense_small"],
    "stage4_dense": ops.SHAPES["stage4_dense"],
    "stage3": ops.SHAPES["stage3"]._replace(batch=3),
    "stage3_small": ops.SHAPES["stage3_small"]._replace(batch=3),
    "stage4": ops.SHAPES["stage4"]._replace(batch=3),
    "xt_stage4": ops.Shape(3, 12, 14, 14, 7, 7, 7),
    "s_stage3": ops.Shape(3, 16, 10, 10, 14, 14, 13),
    "s_stage4": ops.Shape(3, 32, 8, 8, 7, 7, 7),
    "odd": ops.Shape(2, 3, 12, 20, 9, 33, 7),
}
DRY_CONTMIX = {"tiny": ops.Shape(1, 2, 4, 4, 3, 4, 3)}
DEPTHWISE = {name: ((shape[0] or 4, *shape[1:]), size) for name, (shape, size) in depthwise.SHAPES.items()}
DRY_DEPTHWISE = {"tiny": ((1, 2, 3, 4), 7)}
NORMS = {"stage1": (4, 256, 56, 56), "stage4": (4, 2048, 7, 7), "odd": (3, 40, 33, 17)}
DRY_NORMS = {"tiny": (2, 8, 5, 6)}
REPCONV = {"stage1": 17, "stage4": 7, "odd": 13}
DRY_REPCONV = {"tiny": 5}
"""Kernel sizes of a Dilated RepConv, with the shapes of the norms."""


class Case(NamedTuple):
    """A call, given its inputs, and a name for it."""

    operator: str
    by: str
    shape: str
    dtype: str
    weights: str
    dry: bool = False


def cases(dry: bool) -> Iterator[Case]:
    """All of them; autocast has weights of float32 beside 16-bit maps."""
    mixes, filters, norms = (
        (DRY_CONTMIX, DRY_DEPTHWISE, DRY_NORMS) if dry else (CONTMIX, DEPTHWISE, NORMS)
    )  # fmt: skip
    for dtype in DTYPES:
        for shape in mixes:
            yield Case("contmix", "triton", shape, dtype, dtype, dry)
        for shape in filters:
            for part in depthwise.PARTS:
                yield Case(f"depthwise {part}", "triton", shape, dtype, dtype, dry)
            yield Case("depthwise_conv2d", "auto", shape, dtype, dtype, dry)
        for shape in norms:
            for operator in ("response_norm", "local_conv", "dilated_repconv"):
                yield Case(operator, "auto", shape, dtype, dtype, dry)
            for operator in gpu_fused.OPERATORS:
                yield Case(operator, "triton", shape, dtype, dtype, dry)
    shape = next(iter(mixes))
    yield Case("contmix", "triton", shape, "bfloat16", "float32", dry)
    for dtype in DTYPES:
        yield Case("contmix", "torch", shape, dtype, dtype, dry)


def _draw(shape: tuple[int, ...], scale: float, seed: int, device: str) -> Tensor:
    make = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=make, device=device) * scale


def _call_of(case: Case, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The function of a case and its inputs, those of the network's layouts."""
    dtype, weights = getattr(torch, case.dtype), getattr(torch, case.weights)

    def images(shape: tuple[int, ...], seed: int) -> Tensor:
        return _draw(shape, 1.0, seed, device).to(dtype).contiguous(memory_format=torch.channels_last)

    if case.operator == "contmix":
        shape = (DRY_CONTMIX if case.dry else CONTMIX)[case.shape]
        query, key, weight, bias, rpb, value = ops.make_inputs(shape, device, case.dtype, layout="network")
        inputs = [query, key, value, weight.to(weights), bias.to(weights), rpb.to(weights)]
        return partial(contmix, kernel_size=shape.kernel_size), inputs
    if case.operator == "depthwise_conv2d":
        shape, size = (DRY_DEPTHWISE if case.dry else DEPTHWISE)[case.shape]
        weight = _draw((shape[1], 1, size, size), 1 / size, 1, device).to(dtype)
        return depthwise_conv2d, [images(shape, 0), weight, _draw((shape[1],), 1.0, 2, device).to(dtype)]
    shape = (DRY_NORMS if case.dry else NORMS)[case.shape]
    x, bias = images(shape, 0), _draw((shape[1],), 1.0, 2, device).to(dtype)
    if case.operator == "dilated_repconv":
        size = (DRY_REPCONV if case.dry else REPCONV)[case.shape]
        sizes, dilations = zip((size, 1), *branches_of(size), strict=True)
        taps = _draw((sum(k * k for k in sizes), shape[1]), 1 / size, 1, device)
        numbers = [_draw((len(sizes), shape[1]), 1.0, seed, device) for seed in (2, 3)]
        return partial(_repconv, sizes=list(sizes), dilations=list(dilations)), [x, taps, *numbers]
    if case.operator == "response_norm":
        return partial(response_norm, eps=1e-6), [x, _draw((shape[1],), 1.0, 1, device).to(dtype), bias]
    return partial(local_conv, gelu=True), [x, _draw((shape[1], 1, 3, 3), 0.3, 1, device).to(dtype), bias]


def _repconv(
    x: Tensor, taps: Tensor, scale: Tensor, shift: Tensor, *, sizes: list[int], dilations: list[int]
) -> Tensor:
    return torch.ops.overlock.dilated_repconv(x, taps, scale, shift, sizes, dilations, 1e-5)[0]


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor | None) -> list[Tensor]:
    """The result and the gradients of all inputs; the cotangent is noise where none is given."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = run(*leaves)
    given = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, given if cotangent is None else cotangent)]


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number; not a number is infinitely far."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check_part(case: Case, device: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    """A part of the depthwise convolution, twice, each time beside float64."""
    part = depthwise.PARTS[case.operator.removeprefix("depthwise ")]
    _, (x, weight, bias) = _call_of(case._replace(operator="depthwise_conv2d"), device)
    call = (x, weight, bias) if part == depthwise.FORWARD else (torch.flip(x, (3,)), x, weight)
    reason = why_not(part, case.by, *call, 1)
    if reason:
        raise ValueError(f"{case.by} cannot run it: {reason}")
    expected = TABLE[part]["torch"].forward(*(t.double() for t in call), 1)
    return [([TABLE[part][case.by].forward(*call, 1)], [expected]) for _ in range(2)]


def check_fused(case: Case, device: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    """A kernel of the fused network, twice, beside the plain form in float64."""
    shape, dtype = (DRY_NORMS if case.dry else NORMS)[case.shape], getattr(torch, case.dtype)
    run, exact, shapes = gpu_fused.OPERATORS[case.operator]
    inputs = [_draw(size, 0.3 if i else 1.0, i, device).to(dtype) for i, size in enumerate(shapes(*shape))]
    inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    expected = gpu_fused.as_list(exact(*(x.double() for x in inputs)))
    return [(gpu_fused.as_list(run(*inputs)), expected) for _ in range(2)]


def check_operator(case: Case, device: str) -> list[tuple[list[Tensor], list[Tensor]]]:
    """An operator and its gradients, twice, each time beside float64."""
    run, inputs = _call_of(case, device)
    exact = [x.double() for x in inputs]
    plain = F.conv2d if case.operator == "depthwise_conv2d" else run
    if plain is F.conv2d:
        size = inputs[1].shape[3]
        plain = partial(F.conv2d, padding=size // 2, groups=inputs[0].shape[1])
    with backend("reference"):
        expected = with_gradients(plain, exact, None)
    with backend(case.by):
        return [(with_gradients(run, inputs, None), expected) for _ in range(2)]


def check(case: Case, device: str) -> Row:
    """One row: errors of the result and of each gradient, and whether a second call gave the same bits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if device == "cpu":
        torch.set_num_threads(1)
    kinds = {"depthwise": check_part} | dict.fromkeys(gpu_fused.OPERATORS, check_fused)
    (found, expected), (again, _) = kinds.get(case.operator.partition(" ")[0], check_operator)(case, device)
    errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    row = case._asdict()
    del row["dry"]
    right = max(errors) <= TOLERANCE[case.dtype] and (same or case.by != "triton")
    return row | dict(right=right, same_bits=same, worst=max(errors), errors=" ".join(f"{e:.1e}" for e in errors))


def correctness(run: Run) -> Iterator[Row]:
    """All cases, many at a time: most of the time is Triton's compilation, on one core each."""
    everything = list(cases(run.dry))
    if run.jobs == 1:
        for case in everything:
            with run.attempt(str(case)):
                yield _judged(run, check(case, run.device))
        return
    with ProcessPoolExecutor(run.jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            tasks = {pool.submit(check, case, run.device): case for case in everything}
            for task in as_completed(tasks):
                with run.attempt(str(tasks[task])):
                    yield _judged(run, task.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _judged(run: Run, row: Row) -> Row:
    if not row["right"]:
        run.fail(f"{row['operator']}, {row['by']}, {row['shape']}, {row['dtype']}", f"wrong: {row}")
    return row
