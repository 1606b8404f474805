"""Every backend of the dynamic convolution against the reference in float64, values and gradients.

Triton's kernels run in its interpreter, which must be chosen before Triton is imported: one test runs this file once
more, in a process of its own, where the backend is Triton's. With a GPU (-m gpu) they run compiled, on larger maps too.
"""

from __future__ import annotations

import os
from itertools import cycle, product

import pytest
import torch
from calls import LAYOUTS, NAMES, make_inputs, with_gradients
from helpers import run_interpreted

from overlock.ops import BACKENDS, backend, contmix

# A gradient of a bias is a sum over tokens whose terms nearly cancel; the order of the sum differs with the processor.
# In 16 bits the kernels themselves are rounded for the weighted sum on a GPU, as weights of attention are.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.5e-2, "float16": 1e-2}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = ("triton",) if INTERPRETED else ("cpu", "torch", "reference")
ON_CUDA = ("triton", "torch", "reference")
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
slow_if_interpreted = pytest.mark.slow if INTERPRETED else lambda test: test


def on_backends(*marks_on_gpu: pytest.MarkDecorator) -> pytest.MarkDecorator:
    on_gpu = [pytest.param(name, "cuda", marks=(*GPU, *marks_on_gpu)) for name in ON_CUDA]
    return pytest.mark.parametrize(("name", "device"), [(name, "cpu") for name in ON_CPU] + on_gpu)


backends = on_backends()
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


HALF = "part_of_channels_last"
CALLS = {
    "the stage at 224": dict(height=14, width=14, kernel_size=13, depth=16, channels=16, grid=7, groups=1),
    "four windows": dict(height=6, width=6, kernel_size=5, depth=8, channels=8, groups=1),
    "one window": dict(height=7, width=7, kernel_size=7, depth=8, channels=16, grid=7, layout=HALF),
    "rectangular map": dict(
        height=5, width=9, kernel_size=5, depth=16, channels=8, grid=3, groups=1, layout="channels_last"
    ),
    "odd widths": dict(height=4, width=5, depth=6, channels=5, grid=3, batch=2, groups=1, layout=HALF),
    "narrower than the kernel": dict(height=7, width=3, kernel_size=5, depth=4, channels=4, groups=1),
    "lower than the kernel": dict(
        height=3, width=17, kernel_size=5, depth=4, channels=12, groups=1, layout="every_second"
    ),
    "smaller than the kernel": dict(height=4, width=6, kernel_size=13, depth=24, channels=24, grid=7, groups=1),
    "one row": dict(height=1, width=20, kernel_size=7, depth=4, channels=4),
    "one column": dict(height=8, width=1, kernel_size=13, depth=8, channels=4, groups=1),
    "one position": dict(height=1, width=1, depth=4, channels=4),
    "even kernel": dict(height=7, width=6, kernel_size=4, depth=4, channels=20, groups=1, layout="transposed"),
    "wide heads": dict(height=4, width=6, depth=64, channels=64, grid=3, groups=1),
    "wide values": dict(height=4, width=5, depth=5, channels=40, grid=5, groups=1),
    "heads of 48": dict(height=5, width=4, kernel_size=5, depth=48, channels=48, grid=7, batch=2, groups=1),
    "heads of 24 and 32": dict(height=4, width=5, depth=24, channels=32, batch=2, groups=1, layout="part_of_channels"),
    "one map for all": dict(height=4, width=5, depth=8, channels=8, grid=3, batch=2, layout="expanded"),
    "no biases": dict(height=6, width=7, kernel_size=5, depth=8, channels=8, groups=1, bias=False, rpb=False),
    "bias alone": dict(height=6, width=5, depth=8, channels=8, groups=1, rpb=False, layout="channels_last"),
    "position bias alone": dict(height=6, width=7, kernel_size=5, depth=8, channels=8, groups=1, bias=False),
    "more than a tile": dict(height=4, width=40, depth=4, channels=4, groups=1),
    "weights in float32": dict(height=5, width=6, depth=8, channels=8, grid=3, weight_dtype=torch.float32),
}
# The 16-bit types differ in the products alone, and the interpreter is slow, as is the compilation for a GPU.
SOME = ("one window", "lower than the kernel", "wide heads", "weights in float32")
SLOWEST = "the stage at 224"  # four windows on more tokens
LARGE = {
    "detection": dict(height=50, width=80, kernel_size=13, depth=16, channels=16, grid=7, groups=8, layout=HALF),
    "segmentation": dict(height=32, width=128, kernel_size=13, depth=16, channels=16, grid=7, batch=2),
    "batch": dict(height=14, width=14, kernel_size=13, depth=24, channels=24, grid=7, groups=6, batch=16, layout=HALF),
    "small kernel": dict(height=50, width=80, kernel_size=5, depth=16, channels=16, grid=7, groups=8),
    "widest": dict(height=20, width=30, kernel_size=7, depth=64, channels=64, grid=7),
    "many regions": dict(height=20, width=30, kernel_size=7, depth=32, channels=64, grid=16),
}

KERNEL_SIZES = (3, 5, 7, 13)
SIZES = ((9, 14), (14, 5), (4, 6), (1, 15), (12, 1), (7, 7))
WIDTHS = (4, 8, 16, 24, 32, 48, 64)


def grid(test):
    """A test for each kernel and map of the grid."""
    test = pytest.mark.parametrize("kernel_size", KERNEL_SIZES, ids=lambda size: f"K {size}")(test)
    return pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]} x {size[1]}")(test)


def make_grid() -> dict[tuple[int, tuple[int, int]], dict[str, dict]]:
    """All kernels, sizes of map and widths of query; the rest takes turns, in cycles of different lengths."""
    rest = zip(
        cycle((16, 64, 4, 24, 8, 48, 32, 5, 40)), cycle((3, 7, 7, 3)), cycle((*LAYOUTS, "expanded")), cycle((1, 2, 1)),
        cycle((True, True, True, True, False)), cycle((True, True, False)),
    )  # fmt: skip
    names = ("channels", "grid", "layout", "batch", "bias", "rpb")
    grid: dict[tuple[int, tuple[int, int]], dict[str, dict]] = {}
    for (kernel_size, size, depth), values in zip(product(KERNEL_SIZES, SIZES, WIDTHS), rest, strict=False):
        call = dict(
            zip(names, values, strict=True), kernel_size=kernel_size, height=size[0], width=size[1], depth=depth
        )
        grid.setdefault((kernel_size, size), {})[f"D {depth}"] = call
    return grid


GRID = make_grid()


@pytest.fixture(autouse=True)
def unwritten_memory_holds_nan(request):
    """So that reading it shows. (On a GPU the setting would ask for more than is meant here.)"""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def mix(name: str, kernel_size: int, **inputs: torch.Tensor | None) -> torch.Tensor:
    with backend(name):
        return contmix(**inputs, kernel_size=kernel_size)


def errors(name: str, call: dict, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest difference from float64 over the largest entry, of the output and of each gradient."""
    inputs = make_inputs(**call, dtype=dtype, device=device, requires_grad=True)
    exact = {key: x if x is None else x.detach().double().requires_grad_() for key, x in inputs.items()}
    kernel_size = call.get("kernel_size", 3)
    output, gradients = with_gradients(lambda **x: mix(name, kernel_size, **x), inputs)
    expected, expected_gradients = with_gradients(lambda **x: mix("reference", kernel_size, **x), exact, dtype)
    assert output.dtype == dtype
    assert output.stride() == torch.empty_like(inputs["value"]).stride()
    keys = ("output", *(key for key in NAMES if inputs[key] is not None))
    found = {}
    for key, a, b in zip(keys, (output, *gradients), (expected, *expected_gradients), strict=True):
        assert a.shape == b.shape
        found[key] = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return found


def failures(name: str, calls: dict[str, dict], dtype: str, device: str) -> dict[str, dict[str, float]]:
    """The calls with an error beyond the tolerance (or none, if not a number), and their errors."""
    found = {key: errors(name, call, getattr(torch, dtype), device) for key, call in calls.items()}
    return {key: e for key, e in found.items() if not all(value <= TOLERANCE[dtype] for value in e.values())}


def refused(name: str, dtype: str) -> bool:
    """Whether the backend for the CPU does not know a type; then it must say so."""
    inputs = make_inputs(dtype=getattr(torch, dtype))
    if name != "cpu" or BACKENDS[name].why_not(*inputs.values(), 3, 3) is None:
        return False
    with pytest.raises(ValueError, match="takes float32 and bfloat16, not"):
        mix(name, 3, **inputs)
    return True


@dtypes
@backends
def test_named_calls(name, device, dtype):
    """What is particular: the network's shapes, odd ones, each memory layout, with and without biases."""
    if refused(name, dtype):
        return
    some = device == "cuda" or (INTERPRETED and dtype != "float32")
    keys = SOME if some else [key for key in CALLS if not (INTERPRETED and key == SLOWEST)]
    assert not failures(name, {key: CALLS[key] for key in keys}, dtype, device)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
@pytest.mark.parametrize("name", ON_CUDA)
def test_all_named_calls_on_cuda(name, dtype):
    assert not failures(name, CALLS, dtype, "cuda")


@slow_if_interpreted
@grid
@dtypes
@on_backends(pytest.mark.slow)
def test_grid(name, device, dtype, kernel_size, size):
    """Every kernel and width of head on every kind of map."""
    if refused(name, dtype):
        return
    assert not failures(name, GRID[kernel_size, size], dtype, device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@dtypes
@pytest.mark.parametrize("call", LARGE)
@pytest.mark.parametrize("name", ON_CUDA)
def test_large_maps(name, call, dtype):
    assert not failures(name, {call: LARGE[call]}, dtype, "cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@backends
def test_logits_of_ten_thousand(name, device, dtype):
    """They mix to finite values, with finite gradients."""
    if refused(name, dtype):
        return
    call = dict(height=4, width=5, depth=16, channels=8, grid=7, groups=1, logits=5000.0)
    inputs = make_inputs(**call, dtype=getattr(torch, dtype), device=device, requires_grad=True)
    affinity = torch.einsum("bgdhw,bgds->bghws", inputs["query"].float(), inputs["key"].float())
    assert (affinity @ inputs["weight"].float().t()).abs().max() > 1e4
    output, gradients = with_gradients(lambda **x: mix(name, 3, **x), inputs)
    assert all(x.isfinite().all() for x in (output, *gradients))


@torch.no_grad()
@backends
def test_the_same_bits_again(name, device):
    """Two calls give equal bits, on several threads too."""
    inputs = make_inputs(height=6, width=9, kernel_size=5, batch=2, dtype=torch.float32, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (mix(name, 5, **inputs) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ON_CPU)
def test_the_same_gradients_again(name):
    """Two calls give equal bits on two threads, for many maps and for one, which is cut into pieces."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for call in (dict(height=6, width=7, batch=2), dict(height=9, width=15, groups=1))[: 1 if INTERPRETED else 2]:
            inputs = make_inputs(**call, depth=8, kernel_size=5, dtype=torch.float32, requires_grad=True)
            (_, first), (_, second) = (with_gradients(lambda **x: mix(name, 5, **x), inputs) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_the_cpu_backend_has_gradients_of_its_own(monkeypatch):
    """What is held to the reference above is not PyTorch's backward under another name."""
    if INTERPRETED:
        pytest.skip("this is the process with the interpreter")
    monkeypatch.setattr("overlock.kernels.torch.contmix.Mixing", None)
    inputs = make_inputs(dtype=torch.float32, requires_grad=True)
    with_gradients(lambda **x: mix("cpu", 3, **x), inputs)
    with pytest.raises(TypeError):
        with_gradients(lambda **x: mix("torch", 3, **x), inputs)


# ---- Triton's interpreter -------------------------------------------------------------------------------------------

outside = pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")


@outside
def test_triton_in_the_interpreter():
    """The tests above, with Triton's kernels: in the types whose code differs, and not whether bits repeat, as an
    interpreter's do.
    """
    pytest.importorskip("triton", minversion="3.3")
    run_interpreted(__file__, "-m", "not slow and not gpu", "-k", "not float16 and not again or bfloat16 and named")


@outside
@pytest.mark.slow
@grid
@dtypes
def test_grid_in_the_interpreter(dtype, kernel_size, size):
    """The grid with Triton's kernels."""
    pytest.importorskip("triton")
    height, width = size
    run_interpreted(f"{__file__}::test_grid[triton-cpu-{dtype}-K {kernel_size}-{height} x {width}]")


@outside
def test_why_triton_cannot():
    """Without a GPU that is the reason, whatever the call."""
    pytest.importorskip("triton")
    inputs = make_inputs(dtype=torch.float64)
    assert "CUDA device" in BACKENDS["triton"].why_not(*inputs.values(), 3, 3)


LIMITS = {
    "not float64": dict(dtype=torch.float64),
    "at most 128 channels": dict(channels=129),
    "400 region centres": dict(depth=64, grid=20),
    "at most 32 x 32": dict(height=33, width=33, kernel_size=33),
}


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process with the interpreter")
def test_old_triton(monkeypatch):
    """Its lack is told before a kernel meets it."""
    monkeypatch.delattr("triton.language.gather")
    inputs = make_inputs(dtype=torch.float32)
    assert "Triton 3.3" in BACKENDS["triton"].why_not(*inputs.values(), 3, 3)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process with the interpreter")
def test_images_beyond_32_bits():
    """A map too large for the kernels' offsets is refused, and the largest below is not."""
    inputs = make_inputs(dtype=torch.float32)
    for width, words in ((2**13, None), (2**15, "32 bits")):
        inputs["query"] = inputs["value"] = torch.empty(1, 2, 3, 2**14, width, device="meta")
        reason = BACKENDS["triton"].why_not(*inputs.values(), 3, 3)
        assert reason is None if words is None else words in reason


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process with the interpreter")
def test_tiles():
    """However the work is cut, results are right; other rows hold inside the block alone."""
    from overlock.kernels.triton.contmix_tiles import TILES, Tile, use_tiles

    other = {
        "bands forward": Tile(1, 0, 1, 1), "bands query": Tile(2, 0, 4, 1), "bands value": Tile(2, 16, 1, 1),
        "bands taps": Tile(1, 0, 2, 1), "windows forward": Tile(16, 16, 2, 1), "windows query": Tile(32, 16, 2, 1),
        "windows value": Tile(16, 32, 1, 1), "windows taps": Tile(16, 16, 1, 1),
    }  # fmt: skip
    assert other.keys() == {name.removesuffix(" float32") for name in TILES}
    other |= {name: other[name.removesuffix(" float32")] for name in TILES}
    before = dict(TILES)
    for call in (dict(height=5, width=18, batch=3, groups=1), dict(height=4, width=5, kernel_size=4, batch=2)):
        with use_tiles(other):
            assert not failures("triton", {"call": call}, "float32", "cpu")
    assert before == TILES


@pytest.mark.skipif(not INTERPRETED, reason="runs in the process with the interpreter")
@pytest.mark.parametrize(("words", "call"), LIMITS.items())
def test_what_is_beyond_the_kernels(words, call):
    """Reasons in words."""
    call = {"dtype": torch.float32, "kernel_size": 3, **call}
    size = call["kernel_size"]
    assert words in BACKENDS["triton"].why_not(*make_inputs(**call).values(), size, size)
