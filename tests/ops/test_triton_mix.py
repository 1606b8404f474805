"""The Triton kernels of the dynamic convolution against the float64 reference.

On the CPU they run in Triton's interpreter, which must be chosen before Triton is imported: in one process of its own,
this file as a script, that prints the errors of all calls. With a GPU (-m gpu) they run compiled, on larger maps too.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
NAMES = ("query", "key", "value", "weight", "bias", "rpb")
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-2}


class Call(NamedTuple):
    """Shape of a call; H, W and K of the map and kernel as pairs."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    depth: int
    channels: int
    grid: int = 3
    batch: int = 1
    groups: int = 1
    bias: bool = True
    rpb: bool = True
    layout: str = "contiguous"
    weight_dtype: str | None = None
    scale: float = 1.0


SMALL = {
    "the stage at 224": Call((14, 14), (13, 13), 16, 16, grid=7),
    "one window": Call((7, 7), (7, 7), 8, 16, grid=7, groups=2, layout="half of channels last"),
    "rectangular map": Call((5, 9), (5, 5), 16, 8, groups=2, layout="channels last"),
    "odd widths, a batch": Call((4, 5), (3, 3), 6, 5, batch=2, groups=2, layout="half of channels last"),
    "width of the kernel": Call((9, 5), (5, 5), 4, 4, grid=2, layout="transposed"),
    "one row of windows": Call((3, 17), (3, 5), 4, 12, grid=2, layout="every second"),
    "one row": Call((1, 20), (1, 7), 4, 4, grid=2),
    "one column": Call((8, 1), (3, 1), 4, 4, grid=2),
    "one position": Call((1, 1), (1, 1), 4, 4, grid=2),
    "even kernel": Call((7, 6), (4, 4), 4, 20, grid=2),
    "wide heads": Call((4, 6), (3, 3), 64, 64, grid=3),
    "wide values": Call((4, 5), (3, 3), 5, 40, grid=5),
    "no biases": Call((6, 7), (3, 5), 8, 8, batch=2, bias=False, rpb=False),
    "bias alone": Call((6, 7), (5, 3), 8, 8, rpb=False, layout="channels last"),
    "position bias alone": Call((6, 7), (5, 5), 8, 8, bias=False),
    "more than a tile": Call((4, 40), (3, 3), 4, 4, grid=2),
    "weights in float32": Call((5, 6), (3, 3), 8, 8, weight_dtype="float32"),
    "logits of 1e4": Call((6, 7), (5, 5), 16, 8, scale=5000.0),
}
LARGE = {
    "detection": Call((50, 80), (13, 13), 16, 16, grid=7, groups=8, layout="half of channels last"),
    "segmentation": Call((32, 128), (13, 13), 16, 16, grid=7, groups=2, batch=2, layout="channels last"),
    "batch": Call((14, 14), (13, 13), 24, 24, grid=7, groups=6, batch=16, layout="half of channels last"),
    "small kernel": Call((50, 80), (5, 5), 16, 16, grid=7, groups=8),
    "widest": Call((20, 30), (7, 7), 64, 64, grid=7, groups=2),
    "many regions": Call((20, 30), (7, 7), 32, 64, grid=16, groups=2),
}
# Values and gradients in float32 everywhere; the 16-bit types, whose kernels differ only in the products, on some.
HALF = ("rectangular map", "wide heads", "wide values", "weights in float32", "one row")
GRID = [(name, "float32") for name in SMALL if name != "logits of 1e4"]
GRID += [(name, dtype) for dtype in ("bfloat16", "float16") for name in HALF]
GRID += [("logits of 1e4", "float16")]


def make_map(draw, call: Call, part: int) -> Tensor:
    """(B, G, part, H, W) in one of the memory layouts that networks bring."""
    batch, groups, (height, width) = call.batch, call.groups, call.size
    if call.layout == "channels last":
        return draw(batch, groups, height, width, part).permute(0, 1, 4, 2, 3)
    if call.layout == "half of channels last":
        whole = draw(batch, height, width, 2 * groups * part).permute(0, 3, 1, 2)
        return whole[:, groups * part :].unflatten(1, (groups, part))
    if call.layout == "transposed":
        return draw(batch, groups, part, width, height).transpose(3, 4)
    if call.layout == "every second":
        return draw(batch, groups, part, 2 * height, 2 * width)[..., ::2, 1::2]
    return draw(batch, groups, part, height, width)


def make_inputs(call: Call, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    taps, regions = call.kernel[0] * call.kernel[1], call.grid**2
    weights = [
        draw(taps, regions) / call.grid,
        draw(taps) if call.bias else None,
        draw(call.groups, 2 * call.kernel[0] - 1, 2 * call.kernel[1] - 1) if call.rpb else None,
    ]
    if call.weight_dtype:
        weights = [x if x is None else x.to(getattr(torch, call.weight_dtype)) for x in weights]
    query = make_map(draw, call, call.depth)
    query *= call.scale / call.depth**0.5
    return [query, draw(call.batch, call.groups, call.depth, regions), make_map(draw, call, call.channels), *weights]


def results(call: Call, inputs: list[Tensor | None]) -> dict[str, Tensor]:
    """Output and gradients of the kernels, and the cotangent that they were given."""
    from overlock.ops import triton_mix

    assert triton_mix.why_not(*inputs, *call.kernel) is None
    output = triton_mix.forward(*inputs, *call.kernel)
    assert output.stride() == torch.empty_like(inputs[2]).stride()
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    gradients = triton_mix.backward(cotangent, *inputs, *call.kernel)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert (x is None) == (gradient is None)
        assert x is None or (x.shape, x.dtype) == (gradient.shape, gradient.dtype)
    found = {name: x for name, x in zip(NAMES, gradients, strict=True) if x is not None}
    return {"output": output, "cotangent": cotangent, **found}


def measure(call: Call, dtype: str, device: str) -> dict[str, float]:
    """Largest differences from the float64 reference, relative to its largest entry, by name of output or gradient."""
    from overlock.ops import reference

    inputs = make_inputs(call, getattr(torch, dtype), device)
    found = results(call, inputs)
    exact = [x if x is None else x.detach().double().requires_grad_() for x in inputs]
    output = reference.contmix(*exact, *call.kernel)
    kept = [name for name, x in zip(NAMES, exact, strict=True) if x is not None]
    gradients = torch.autograd.grad(output, [x for x in exact if x is not None], found["cotangent"].double())
    expected = {"output": output.detach(), **dict(zip(kept, gradients, strict=True))}
    return {name: float((found[name] - x).abs().max() / x.abs().max().clamp_min(1e-30)) for name, x in expected.items()}


def outcome(name: str, dtype: str, device: str = "cpu") -> dict[str, float]:
    """Errors of a call; for huge logits, where no tolerance holds, 0 where results are finite; 0 where they repeat."""
    call = (SMALL | LARGE)[name]
    inputs = make_inputs(call, getattr(torch, dtype), device)
    if call.scale > 1:
        affinity = torch.einsum("bgdhw,bgds->bghws", inputs[0].float(), inputs[1].float())
        assert torch.einsum("bghws,ns->bghwn", affinity, inputs[3].float()).abs().max() > 1e4
        return {key: float(not x.isfinite().all()) for key, x in results(call, inputs).items()}
    errors = measure(call, dtype, device)
    if name == "rectangular map" or device == "cuda":
        first, second = results(call, inputs), results(call, inputs)
        errors["repeat"] = float(not all(torch.equal(first[key], second[key]) for key in first))
    return errors


@functools.cache
def interpreted() -> subprocess.CompletedProcess:
    """Outcomes of the whole grid in Triton's interpreter, as this file prints them."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True, check=False
    )


def check(errors: dict[str, float], dtype: str) -> None:
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize(("name", "dtype"), GRID)
def test_values_and_gradients_in_the_interpreter(name, dtype):
    process = interpreted()
    assert process.returncode == 0, process.stderr
    check(json.loads(process.stdout)[f"{name}, {dtype}"], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SMALL | LARGE)
def test_values_and_gradients_on_a_gpu(name, dtype):
    if SMALL.get(name, LARGE.get(name)).scale > 1 and dtype != "float16":
        pytest.skip("float16 is the type whose range is short")
    check(outcome(name, dtype, "cuda"), dtype)


def test_why_not():
    """Reasons in words: first the device, and with one, what the kernels have no room or no accuracy for."""
    code = """
import torch
from overlock.ops.triton_mix import why_not

def reason(depth=4, channels=4, regions=9, kernel=3, dtype=torch.float32):
    maps = [torch.zeros(1, 1, part, 5, 5, dtype=dtype) for part in (depth, channels)]
    key, weight = torch.zeros(1, 1, depth, regions, dtype=dtype), torch.zeros(kernel**2, regions, dtype=dtype)
    return str(why_not(maps[0], key, maps[1], weight, None, None, kernel, kernel))

for reasons in (reason(), reason(dtype=torch.float64), reason(channels=129), reason(64, 4, 400), reason(kernel=65)):
    print(reasons)
"""
    for interpret, words in (
        ("1", ["None", "not float64", "at most 128 channels", "400 region centres", "at most 64 x 64"]),
        ("0", ["CUDA device"] * 5),
    ):
        environment = os.environ | {"TRITON_INTERPRET": interpret}
        lines = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).splitlines()
        assert all(word in line for word, line in zip(words, lines, strict=True)), lines


def main() -> None:
    """Print the outcomes of the grid. Unwritten memory holds NaN, so that it shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    print(json.dumps({f"{name}, {dtype}": outcome(name, dtype) for name, dtype in GRID}))  # noqa: T201


if __name__ == "__main__":
    main()
