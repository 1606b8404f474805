"""ContMix's dynamic convolution: every backend that runs here, against unfold, a loop over shifts and FlexAttention.

python benchmarks/ops.py [--shapes '[stage3_dense, ...]'] [--repeats N] [--csv FILE]
python benchmarks/ops.py --device cuda --dtype bfloat16 --backward true --compiled true

The table says of each candidate whether it makes the kernels or is given them. The backends never store kernels, so
theirs is the whole operation, also beside a weighted sum alone. Times are those of calls as a program makes them: on a
GPU and a small map mostly the launch. Results are checked against the reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from alternatives import by_shifts, by_unfold, make_flex, make_kernels, make_logits
from timing import interleave, leave_out, middle, report, spread
from torch import Tensor

from overlock.kernels.numba.contmix import numba_installed
from overlock.kernels.torch import contmix as portable
from overlock.ops import BACKENDS, backend, contmix


class Shape(NamedTuple):
    batch: int
    groups: int
    depth: int
    channels: int
    height: int
    width: int
    kernel_size: int


# Focus-Net of OverLoCK-T: stages 3 and 4, large and small kernel, of a 224 x 224 and an 800 x 1280 image.
SHAPES = {
    "stage3_dense": Shape(1, 8, 16, 16, 50, 80, 13),
    "stage3_dense_small": Shape(1, 8, 16, 16, 50, 80, 5),
    "stage4_dense": Shape(1, 16, 16, 16, 25, 40, 7),
    "stage3": Shape(1, 8, 16, 16, 14, 14, 13),
    "stage3_small": Shape(1, 8, 16, 16, 14, 14, 5),
    "stage4": Shape(1, 16, 16, 16, 7, 7, 7),
    "stage3_batch8": Shape(8, 8, 16, 16, 14, 14, 13),
    "stage4_batch8": Shape(8, 16, 16, 16, 7, 7, 7),
}
REGIONS = 49
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # kernels stored in 16 bits are rounded


class Candidate(NamedTuple):
    """One way to compute it. The value comes last among the inputs."""

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    makes_kernels: bool = True
    differentiable: bool = True


Layout = Literal["contiguous", "network"]


def make_inputs(shape: Shape, device: str, dtype: str, layout: Layout = "contiguous") -> tuple[Tensor, ...]:
    """query, key, weight, bias, rpb, value with logits of a few units, as trained networks have them.

    In the network query and value are channels last, and the value is half of the channels of a map.
    """
    b, g, d, c, h, w, k = shape
    make = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=make, device=device) * scale).to(getattr(torch, dtype))

    weights = normal(k * k, REGIONS, scale=REGIONS**-0.5), normal(k * k), normal(g, 2 * k - 1, 2 * k - 1)
    query, key, value = normal(b, g, d, h, w, scale=d**-0.5), normal(b, g, d, REGIONS), normal(b, g, c, h, w)
    if layout == "network":
        both = torch.cat([value, value], dim=2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        query = query.flatten(1, 2).contiguous(memory_format=torch.channels_last).unflatten(1, (g, d))
        value = both[:, g * c :].unflatten(1, (g, c))
    return query, key, *weights, value


def mix(
    name: str, query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor, value: Tensor
) -> Tensor:  # fmt: skip
    with backend(name):
        return contmix(query, key, value, weight, bias, rpb, (rpb.shape[1] + 1) // 2)


class CompiledMix(torch.autograd.Function):
    """The torch backend, forward and backward, through torch.compile."""

    forward_call = staticmethod(torch.compile(portable.forward, dynamic=False))
    backward_call = staticmethod(torch.compile(portable.backward, dynamic=False))

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        query, key, weight, bias, rpb, value = inputs
        ctx.save_for_backward(query, key, value, weight, bias, rpb)
        k = (rpb.shape[1] + 1) // 2
        return CompiledMix.forward_call(query, key, value, weight, bias, rpb, k, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        k = (ctx.saved_tensors[5].shape[1] + 1) // 2
        query, key, value, weight, bias, rpb = CompiledMix.backward_call(grad, *ctx.saved_tensors, k, k)
        return query, key, weight, bias, rpb, value


def candidates(
    shape: Shape, inputs: tuple[Tensor, ...], device: str, compiled: bool
) -> Iterator[tuple[str, Candidate]]:  # fmt: skip
    """Name and candidate; those that cannot run here are named with the reason."""
    *made_from, value = inputs
    logits = make_logits(*made_from)
    kernels = logits.softmax(dim=2)
    yield "unfold", Candidate(lambda *x: by_unfold(make_kernels(*x[:-1]), x[-1]), inputs)
    yield "unfold, sum alone", Candidate(by_unfold, (kernels, value), makes_kernels=False)
    shifts = Candidate(lambda *x: by_shifts(make_kernels(*x[:-1]), x[-1]), inputs, differentiable=False)
    yield "shifts", shifts
    yield "shifts, sum alone", Candidate(by_shifts, (kernels, value), makes_kernels=False, differentiable=False)
    query, key, weight, bias, rpb = made_from
    for name, implementation in BACKENDS.items():
        reason = implementation.why_not(query, key, value, weight, bias, rpb, shape.kernel_size, shape.kernel_size)
        if reason:
            leave_out(name, reason)
        elif name != "reference":
            yield name, Candidate(lambda *x, name=name: mix(name, *x), inputs)
    if compiled:
        yield "torch, compiled", Candidate(CompiledMix.apply, inputs)
        flex = make_flex(shape.height, shape.width, shape.kernel_size, device)
        yield "FlexAttention", Candidate(lambda *x: flex(make_logits(*x[:-1]), x[-1]), inputs)
        yield "FlexAttention, sum alone", Candidate(flex, (logits, value), makes_kernels=False)


def make_call(candidate: Candidate, cotangent: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """A call without arguments: the result, and with a cotangent the gradients of all inputs after it."""
    if cotangent is None:
        return lambda: (candidate.run(*candidate.inputs),)
    leaves = [x.detach().requires_grad_() for x in candidate.inputs]

    def run() -> tuple[Tensor, ...]:
        output = candidate.run(*leaves)
        return output, *torch.autograd.grad(output, leaves, cotangent)

    return run


def check(name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: str) -> None:
    """The result, and the gradient of the value, are the reference's."""
    pairs = [(found[0], expected[0]), (found[-1], expected[-1])]
    error = max(float((a.detach().float() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs)
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"{name} is {error:.1e} from the reference, beyond {TOLERANCE[dtype]} for {dtype}")


def runnable(
    shape: Shape, inputs: tuple[Tensor, ...], cotangent: Tensor | None, device: str, dtype: str, compiled: bool
) -> Iterator[tuple[str, bool, Callable[[], tuple[Tensor, ...]]]]:
    """Name of each candidate, whether it makes the kernels, and its call, once it gave the reference's result."""
    exact = Candidate(lambda *x: mix("reference", *x), tuple(x.float() for x in inputs))
    expected = make_call(exact, None if cotangent is None else cotangent.float())()
    for name, candidate in candidates(shape, inputs, device, compiled):
        if cotangent is not None and not candidate.differentiable:
            continue
        call = make_call(candidate, cotangent)
        try:
            found = call()
        except RuntimeError as error:  # FlexAttention and the compiler have limits of their own
            if name in BACKENDS:
                raise
            leave_out(name, str(error).partition("\n")[0])
            continue
        check(name, found, expected, dtype)
        yield name, candidate.makes_kernels, call


def peak_extra_memory(run: Callable[[], object], device: str) -> float:
    """MiB that a call needs beyond its inputs, with the workspace that the CPU's kernels keep for the next one."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    release = _workspace_of_kernels()
    release()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    kept = release()
    run()  # so that what is timed next finds a workspace again
    sizes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sizes:
        held += event.nbytes()
        peak = max(peak, held)
    return (peak + kept) / 2**20


def _workspace_of_kernels() -> Callable[[], int]:
    if not numba_installed():
        return lambda: 0
    from overlock.kernels.numba.plan import release_workspace  # noqa: PLC0415

    return release_workspace


def main(
    shapes: list[str] | None = None,
    repeats: int = 20,
    csv: str | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    backward: bool = False,
    compiled: bool = False,
) -> None:
    """Time the operation and print medians.

    Args:
        shapes: names of shapes, all by default.
        repeats: interleaved calls of each candidate.
        csv: file for the table.
        device: cpu or cuda.
        dtype: of all inputs.
        backward: time forward and backward together too.
        compiled: also the torch backend through torch.compile, and FlexAttention; minutes to compile.
    """
    rows: list[dict[str, object]] = []
    for name in shapes or SHAPES:
        torch.compiler.reset()  # it compiles a function for so many shapes only
        inputs = make_inputs(SHAPES[name], device, dtype)
        for cotangent in (None, torch.ones_like(inputs[-1])) if backward else (None,):
            with torch.set_grad_enabled(cotangent is not None):
                calls = list(runnable(SHAPES[name], inputs, cotangent, device, dtype, compiled))
                seconds = interleave({candidate: call for candidate, _, call in calls}, repeats=repeats)
                times = {candidate: middle(values) for candidate, values in seconds.items()}
                for candidate, makes_kernels, call in calls:
                    rows.append(
                        {
                            "shape": name,
                            "backward": "no" if cotangent is None else "yes",
                            "candidate": candidate,
                            "kernels": "made" if makes_kernels else "given",
                            "ms": times[candidate],
                            "spread, %": spread(seconds[candidate]),
                            "unfold over it": times["unfold"] / times[candidate] if makes_kernels else "",
                            "unfold's sum over it": times["unfold, sum alone"] / times[candidate],
                            "extra memory, MiB": peak_extra_memory(call, device),
                        }
                    )
    report(f"ContMix's dynamic convolution, {dtype}", rows, csv)


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, so that others need not have it

    auto_cli(main, as_positional=False)
