"""The blocks of the fused network as operations on CPU: against the blocks in float64, and where they do not apply."""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import images, randomise, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Conv2d
from torch.utils.flop_counter import FlopCounterMode

import overlock
from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock
from overlock.fused import blocks, conditions, layers, stage_operators
from overlock.fused.packing import unpack
from overlock.kernels.numba import runtime as threads
from overlock.network.base_net import BlockStack, Stem, make_embedding
from overlock.network.focus_net import FocusStage
from overlock.ops import release_workspace

TOLERANCE = 1e-5  # of the largest magnitude, after a dozen layers


def basic(channels=24, kernel_size=7, size=(2, 14, 9), **options):
    return BasicBlock(channels, kernel_size=kernel_size, **options), [(channels, *size[1:])], size[0]


def dynamic(channels=24, beside=20, groups=3, kernel_size=7, size=(2, 14, 9), **options):
    block = DynamicBlock(channels, beside, groups=groups, kernel_size=kernel_size, **options)
    return block, [(channels, *size[1:]), *[(beside, *size[1:])] * 2], size[0]


def plugin(channels=24, groups=3, kernel_size=7, size=(2, 14, 9), **options):
    block = ContMixBlock(channels, groups=groups, kernel_size=kernel_size, **options)
    return block, [(channels, *size[1:])], size[0]


def stem(channels=24, size=(2, 14, 9), stride=4):
    return Stem(5, channels, stride), [(5, *size[1:])], size[0]


def stage(depth=3, channels=24, size=(2, 14, 9), stride=2):
    blocks = [BasicBlock(channels, kernel_size=7) for _ in range(depth)]
    return BlockStack(make_embedding(5, channels, stride), blocks), [(5, *size[1:])], size[0]


def focus(depth=3, channels=24, beside=20, size=(2, 14, 9)):
    blocks = [DynamicBlock(channels, beside, groups=3, kernel_size=7, first=i == 0) for i in range(depth)]
    return FocusStage(blocks), [(channels, *size[1:]), *[(beside, *size[1:])] * 2], size[0]


def convolution(channels, width, kernel_size, stride=1, size=(2, 9, 8), bias=True):
    padding = kernel_size // 2
    return Conv2d(channels, width, kernel_size, stride, padding, bias=bias), [(channels, *size[1:])], size[0]


KINDS = {"basic": basic, "dynamic": dynamic, "plugin": plugin, "stem": stem, "stage": stage, "focus": focus}
CASES = [
    lambda: basic(size=(1, 1, 1)),
    lambda: basic(8, 3, (3, 1, 9), scaled=True),
    lambda: basic(17, 17, (2, 8, 1)),
    lambda: basic(64, 5, (5, 7, 7), scaled=True, ffn_ratio=3),
    lambda: basic(100, 13, (1, 30, 33)),
    lambda: basic(56, 15, (1, 56, 40)),
    lambda: basic(336, 7, (2, 7, 7), scaled=True),
    lambda: basic(20, 3, (2, 25, 1)),  # high enough for the product and the filter in one
    lambda: basic(9, 3, (1, 51, 270), scaled=True, ffn_ratio=3),  # more columns than tokens at once
    lambda: dynamic(first=True),
    lambda: dynamic(64, 24, 4, 9, (1, 16, 31)),
    lambda: dynamic(8, 4, 2, 7, (3, 7, 7)),
    lambda: dynamic(40, 7, 5, 11, (2, 12, 11), ffn_ratio=2),
    lambda: dynamic(336, 84, 12, 7, (2, 7, 8)),
    lambda: plugin(scaled=True),
    lambda: plugin(64, 4, 9, (1, 33, 9), small_kernel=None),
    lambda: plugin(8, 1, 7, (3, 7, 7), region_grid=3),
    lambda: stem(56, (3, 45, 64)),
    lambda: stem(8, (1, 1, 3), stride=2),
    lambda: stage(1),
    lambda: stage(4, 40, (3, 33, 18), stride=1),
    lambda: focus(2, 36, 10, (3, 8, 9)),
    lambda: focus(4),
    lambda: convolution(1, 1, 3, size=(1, 1, 2)),
    lambda: convolution(3, 28, 3, 2, (1, 224, 60)),
    lambda: convolution(28, 33, 5, 2),
    lambda: convolution(112, 256, 3, 2, bias=False),
    lambda: convolution(257, 40, 3, 3),  # two spans, one of them padded
    lambda: convolution(520, 7, 3),
    lambda: convolution(20, 16, 7, size=(1, 2, 3)),
]


def make(kind, seed=0, **options):
    """Block, fused block and inputs."""
    block, shapes, batch = KINDS[kind](**options) if isinstance(kind, str) else kind()
    block = randomise(block, seed)
    return block, overlock.fuse(block), [images(batch, *shape, seed=i) for i, shape in enumerate(shapes)]


def joined(outputs):
    return outputs if isinstance(outputs, Tensor) else torch.cat(outputs, dim=1)


def expected_of(block, inputs):
    return joined(copy.deepcopy(block).double()(*[x.detach().double() for x in inputs]))


def check(actual, expected, tolerance=TOLERANCE):
    assert relative_error(joined(actual).double(), expected) <= tolerance


@pytest.fixture
def calls(monkeypatch):
    """Those of the operations."""
    seen = []
    for user, name in ((layers, "basic_stack"), (blocks, "basic_stack"), (blocks, "mixer_stack")):
        run = getattr(user, name)
        monkeypatch.setattr(user, name, lambda *a, run=run: (seen.append(a), run(*a))[1])
    return seen


kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_values(case, layout, calls):
    """Counts of channels, maps, batches and kernels of all kinds."""
    block, fused, inputs = make(case)
    result = fused(*[x.contiguous(memory_format=layout) for x in inputs])
    check(result, expected_of(block, inputs))
    assert len(calls) == 1
    assert joined(result).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_views():
    """Features and context as the block before gives them, side by side."""
    block, fused, (x, context, prior) = make("dynamic")
    both = torch.cat([x, context], dim=1).contiguous(memory_format=torch.channels_last)
    x, context = both.split([24, 20], dim=1)
    check(fused(x, context, prior), expected_of(block, [x, context, prior]))
    transposed = [y.mT for y in (x, context, prior)]
    check(fused(*transposed), expected_of(block, transposed))


@kinds
@torch.no_grad()
def test_parts_of_a_batch(kind, monkeypatch):
    """Some images at a time, in parts of two sizes."""
    block, fused, inputs = make(kind, size=(7, 14, 9))
    expected = fused(*inputs)
    monkeypatch.setattr(stage_operators, "CHUNK", 300_000)
    check(fused(*inputs), expected_of(block, inputs))
    assert torch.equal(joined(fused(*inputs)), joined(fused(*inputs)))
    check(fused(*inputs), joined(expected).double(), 5e-6)


@kinds
@torch.no_grad()
def test_threads_agree_and_runs_repeat(kind, monkeypatch):
    """The same numbers at every run; one thread, two, five, and two without OpenMP differ by rounding at most."""
    _, fused, inputs = make(kind, size=(1, 50, 20))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 5, 2):
            torch.set_num_threads(count)
            results.append(joined(fused(*inputs)))
            assert torch.equal(joined(fused(*inputs)), results[-1])
        monkeypatch.setattr(threads, "_parallel_region", lambda: None)
        assert torch.equal(joined(fused(*inputs)), results[-1])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        check(result, results[0].double(), 5e-6)


@torch.no_grad()
def test_the_workspace_is_given_back_and_taken_again():
    _, fused, inputs = make("basic")
    expected = joined(fused(*inputs))
    assert release_workspace() >= 4 * expected.numel()
    assert release_workspace() == 0
    assert torch.equal(joined(fused(*inputs)), expected)


def run_all(results):
    torch.set_num_threads(1)
    results.put({kind: run(kind) for kind in KINDS})


@torch.no_grad()
def run(kind):
    _, fused, inputs = make(kind)
    return joined(fused(*inputs)).sum().item()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_process():
    """On one thread, as in a worker of DataLoader: more than one hang in OpenMP, PyTorch's operations too."""
    expected = {kind: run(kind) for kind in KINDS}
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=run_all, args=(results,))
    process.start()
    try:
        assert results.get(timeout=60) == pytest.approx(expected, rel=1e-4)
    finally:
        process.kill()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@kinds
@torch.no_grad()
def test_what_is_not_finite_comes_out(kind, value):
    """In the image that has it, not in the other."""
    block, fused, inputs = make(kind)
    inputs[0][1, 3, 6, 4] = value
    actual, expected = joined(fused(*inputs)), expected_of(block, inputs)
    assert not expected[1].isfinite().any(dim=0).all()
    assert torch.equal(actual.isfinite(), expected.isfinite())


def wrong_shapes(kind):
    """Images of too few and too many channels, one image alone; context and prior of another size and batch."""
    _, _, (x, *beside) = make(kind)
    yield from ([y, *beside] for y in (x[:, :-1], torch.cat([x, x], dim=1), x[0]))
    for i, y in enumerate(beside):
        for wrong in (y[:, :, 1:], y[:1], y[:, 1:]):
            yield [x, *beside[:i], wrong, *beside[i + 1 :]]


@kinds
@torch.no_grad()
def test_wrong_shapes_are_refused(kind):
    """Before a kernel reads what is not there."""
    _, fused, _ = make(kind)
    for inputs in wrong_shapes(kind):
        if kind == "stem" and inputs[0].dim() == 3:
            assert fused(*inputs).dim() == 3  # as convolutions take it
            continue
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            fused(*inputs)


# Where they do not apply


@kinds
@torch.no_grad()
def test_other_types(kind, calls):
    """The block itself, folded in float32."""
    block, fused, inputs = make(kind)
    check(fused.double()(*[x.double() for x in inputs]), expected_of(block, inputs))
    assert not calls


def named(packed):
    """The gradients of a packed module's parameters by their names in the module."""
    return dict(
        zip(packed.names, filter(lambda x: x is not None, unpack(packed.packed.grad, packed.layout)), strict=True)
    )


@pytest.mark.parametrize("which", ["images", "parameters"])
@kinds
def test_gradients(kind, which, calls):
    """Those of the block, to the images and to parameters that want them."""
    block, fused, inputs = make(kind)
    plain, grads = overlock.fuse(copy.deepcopy(block).double()), []
    for module, cast in ((fused, Tensor.float), (plain, Tensor.double)):
        given = [cast(x).clone() for x in inputs]
        for leaf in given if which == "images" else module.parameters():
            leaf.requires_grad_()
        joined(module(*given)).square().sum().backward()
        if which == "images":
            grads.append([x.grad for x in given])
        else:
            parameters = named(module) if module is fused else {n: p.grad for n, p in module.named_parameters()}
            grads.append([parameters[name] for name in parameters if name.endswith(("fc1.bias", "2.bias"))])
    assert grads[0]
    assert not calls
    for actual, expected in zip(*grads, strict=True):
        check(actual, expected, 1e-4)


@kinds
@torch.no_grad()
def test_without_numba(kind, monkeypatch, calls):
    block, fused, inputs = make(kind)
    monkeypatch.setattr(conditions, "numba_installed", lambda: False)
    check(fused(*inputs), expected_of(block, inputs))
    assert not calls


@kinds
@torch.no_grad()
def test_plain_layers_on_several_threads(kind, calls):
    """None sees another's tensors come and go."""
    block, fused, inputs = make(kind)
    fused, inputs = fused.double(), [x.double() for x in inputs]
    expected = expected_of(block, inputs)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: joined(fused(*inputs)), range(12)):
            check(result, expected)
    assert not calls


@kinds
@torch.no_grad()
def test_copies_and_files(kind, tmp_path):
    """A copy goes on by itself; a pickled one is the same."""
    block, fused, inputs = make(kind)
    expected = expected_of(block, inputs)
    check(fused(*inputs), expected)
    check(fused.double()(*[x.double() for x in inputs]), expected)
    copied = copy.deepcopy(fused).float()
    for parameter in fused.parameters():
        parameter.zero_()
    check(copied(*inputs), expected)
    torch.save(copied, tmp_path / "fused.pt")
    assert (tmp_path / "fused.pt").stat().st_size < 4 * sum(p.numel() for p in copied.parameters()) + 200_000
    check(torch.load(tmp_path / "fused.pt", weights_only=False)(*inputs), expected)


@kinds
@torch.no_grad()
def test_empty_batch(kind):
    _, fused, inputs = make(kind)
    assert joined(fused(*[x[:0] for x in inputs])).shape == (0, *joined(fused(*inputs)).shape[1:])


@kinds
@torch.no_grad()
def test_default_type_is_no_matter(kind):
    """A default of float64 does not change what the kernels read and write."""
    block, fused, inputs = make(kind)
    torch.set_default_dtype(torch.float64)
    try:
        check(fused(*inputs), expected_of(block, inputs))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["dynamic", "plugin", "focus"])
@pytest.mark.parametrize("size", [(2, 5, 9), (1, 6, 6), (3, 11, 2), (2, 1, 1)])
@torch.no_grad()
def test_maps_smaller_than_the_kernel(kind, size, calls):
    """They are enlarged for the mixing, in the same operation."""
    block, fused, inputs = make(kind, size=size)
    check(fused(*inputs), expected_of(block, inputs))
    assert len(calls) == 1


@torch.no_grad()
def test_small_maps_under_autocast():
    """What the call of a size is made of stays in float32."""
    block, fused, inputs = make("dynamic", size=(1, 4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(fused(*inputs), expected_of(block, inputs))


@kinds
@torch.no_grad()
def test_a_changed_parameter_takes_effect(kind):
    """Changed in place, given other memory as Module.to does, or loaded."""
    block, fused, inputs = make(kind)
    fused(*inputs)
    for name, parameter in (*fused.named_parameters(), *block.named_parameters()):
        if name.endswith(("local1.weight", "local.weight", "ffn.project.bias", "layers.2.weight")):
            parameter.data = parameter.data * 1
    check(fused.double().float()(*inputs), expected_of(block, inputs))
    other, fused_other, _ = make(kind, seed=1)
    fused.load_state_dict(fused_other.state_dict())
    check(fused(*inputs), expected_of(other, inputs))
    with torch.inference_mode():
        check(fused(*inputs), expected_of(other, inputs))


@torch.inference_mode()
def test_parameters_made_in_inference_mode():
    """They have no versions to ask for."""
    block, fused, inputs = make("basic")
    check(fused(*inputs), expected_of(block, inputs))


# PyTorch's tools


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@kinds
def test_registration(kind, layout, calls):
    """PyTorch's own checks of an operation: schema, shapes without data, dispatch, graphs."""
    _, fused, inputs = make(kind)
    with torch.no_grad():
        fused(*[x.contiguous(memory_format=layout) for x in inputs])
    name = "basic_stack" if kind in ("basic", "stem", "stage") else "mixer_stack"
    torch.library.opcheck(getattr(torch.ops.overlock, name).default, calls[0])


@kinds
@torch.no_grad()
def test_one_node_of_a_graph(kind):
    """Compiled for any batch, without a break; exported."""
    _, fused, inputs = make(kind)
    nodes = []

    def look(graph, _):
        nodes.append([str(node.target) for node in graph.graph.nodes if "overlock" in str(node.target)])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fused, backend=look, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        given = [x[:1].repeat(batch, 1, 1, 1) for x in inputs]
        check(compiled(*given), joined(fused(*given)).double(), 1e-6)
    assert [len(x) for x in nodes] == [1]


@kinds
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
def test_what_follows_each_operation(kind, calls):
    """A trace, a transform, a mode: they get PyTorch's operations, which they know."""
    block, fused, inputs = make(kind)
    expected = expected_of(block, inputs)
    mapped = torch.func.vmap(lambda *x: joined(fused(*[y[None] for y in x]))[0])(*inputs)
    check(mapped, expected)
    check(torch.jit.trace(fused, tuple(inputs), check_trace=False)(*inputs), expected)
    with FlopCounterMode(display=False) as counter:
        fused(*inputs)
    assert counter.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = joined(fused(*[mode.from_tensor(x) for x in inputs]))
    assert fake.shape == expected.shape
    assert not calls
