"""fuse: fewer and cheaper layers, the same outputs, and the original as it was."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from helpers import images, randomise, relative_error
from timm.layers import LayerNorm2d, SqueezeExcite, StdConv2d
from timm.utils import reparameterize_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import overlock
from overlock.blocks import BasicBlock, DynamicBlock
from overlock.fused.flat_parameters import Packed
from overlock.kernels.numba import plan as programs
from overlock.kernels.numba import runtime as threads
from overlock.layers import (
    GDSA,
    AffineScale,
    ContMix,
    ConvFFN,
    ConvNorm,
    DilatedRepConv,
    LocalConv,
    NormConv,
)
from overlock.layers.conv_ffn import ScaledResidual
from overlock.ops import backend

# Module and shapes of its inputs.
PARTS = {
    "ContMix": (lambda: ContMix(8, groups=2, kernel_size=5, small_kernel=3), [(2, 8, 9, 6)]),
    "ContMix, projected values": (lambda: ContMix(8, groups=2, small_kernel=None, value_proj=True), [(2, 8, 5, 9)]),
    "DilatedRepConv": (lambda: DilatedRepConv(4, 9), [(2, 4, 11, 7)]),
    "LocalConv": (lambda: LocalConv(4), [(2, 4, 5, 6)]),
    "ConvNorm": (lambda: ConvNorm(nn.Conv2d(4, 6, 3, bias=False), 6), [(2, 4, 5, 6)]),
    "ConvNorm of DilatedRepConv": (lambda: ConvNorm(DilatedRepConv(4, 7), 4), [(2, 4, 5, 6)]),
    "NormConv": (lambda: NormConv(4, 6), [(2, 4, 5, 6)]),
    "ConvFFN": (lambda: ConvFFN(4, 12), [(2, 4, 5, 6)]),
    "GDSA": (lambda: GDSA(8, 4, groups=2, kernel_size=7), [(2, 12, 9, 8)]),
    "BasicBlock": (lambda: BasicBlock(8, kernel_size=7), [(2, 8, 9, 8)]),
    "BasicBlock, scaled": (lambda: BasicBlock(8, kernel_size=13, scaled=True, drop_path=0.5), [(2, 8, 9, 8)]),
    "DynamicBlock": (
        lambda: DynamicBlock(8, 4, groups=2, kernel_size=7, drop_path=0.5),
        [(2, 8, 6, 9), (2, 4, 6, 9), (2, 4, 6, 9)],
    ),
    "DynamicBlock, first": (
        lambda: DynamicBlock(8, 4, groups=2, kernel_size=7, first=True),
        [(2, 8, 6, 9), (2, 4, 6, 9), (2, 4, 6, 9)],
    ),
    "ContMixBlock": (lambda: overlock.ContMixBlock(8, groups=2, scaled=True), [(2, 8, 9, 8)]),
    "OverLoCK": (lambda: timm.create_model("overlock_atto", num_classes=7), [(2, 3, 97, 64)]),
    "OverLoCK, merged": (lambda: timm.create_model("overlock_atto", deploy=True), [(1, 3, 64, 64)]),
    "OverLoCK, features": (lambda: timm.create_model("overlock_atto", features_only=True), [(1, 3, 64, 64)]),
    "OverLoCK, pruned": (
        lambda: timm.create_model("overlock_atto", features_only=True, out_indices=(0, 2)),
        [(1, 3, 64, 64)],
    ),
    "Pyramid": (lambda: overlock.Pyramid(timm.create_model("overlock_atto"), overview=True), [(1, 3, 64, 64)]),
    "in a network of somebody's": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), overlock.ContMix(8, groups=1), nn.ReLU()),
        [(1, 3, 12, 12)],
    ),
}
WHOLE = ("ContMix", "ContMixBlock", "DynamicBlock", "OverLoCK", "Pyramid")


def make(part, dtype=torch.float64):
    build, shapes = PARTS[part]
    inputs = [images(*shape, seed=i, dtype=torch.float64).to(dtype) for i, shape in enumerate(shapes)]
    return randomise(build()).to(dtype), inputs


def outputs_of(module, inputs):
    outputs = module(*inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def copy_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_fused_equals_the_original(part):
    """Every part on its own and in every whole, in float64."""
    module, inputs = make(part)
    for actual, expected in zip(outputs_of(overlock.fuse(module), inputs), outputs_of(module, inputs), strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("part", WHOLE)
@pytest.mark.parametrize(("dtype", "mark"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@torch.no_grad()
def test_other_types(part, dtype, mark):
    """In float32, and in bfloat16 to its eight bits; the type stays."""
    module, inputs = make(part, dtype)
    fused = overlock.fuse(module)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    for actual, expected in zip(outputs_of(fused, inputs), outputs_of(module, inputs), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual.float(), expected.float()) < mark


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("training", [False, True])
def test_the_original_stays(part, training):
    """Values, structure, mode and gradients wanted; the copy shares no memory, is in evaluation and frozen."""
    module, _ = make(part)
    module.train(training)
    before, text = copy_of(module), repr(module)
    fused = overlock.fuse(module)
    for tensor in [*fused.parameters(), *fused.buffers()]:
        tensor.data.fill_(3)
    assert repr(module) == text
    assert all(child.training == training for child in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(child.training for child in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_left_to_fold(part):
    """No batch norm, residual convolution or scale of ours is left, but the overview's scale of the dense backbone."""
    module, _ = make(part)
    if part == "in a network of somebody's":
        module = module[2]
    left = {
        name: child
        for name, child in overlock.fuse(module).named_modules()
        if isinstance(child, (nn.BatchNorm2d, LocalConv, ScaledResidual, ConvNorm, NormConv))
        or (isinstance(child, DilatedRepConv) and not child.merged)
        or (isinstance(child, AffineScale) and not name.endswith(("beta", "overview_scale")))
    }
    assert not left


@torch.no_grad()
def test_fusing_twice_changes_nothing():
    """A fused model is its own fused form."""
    module, inputs = make("OverLoCK")
    fused = overlock.fuse(module)
    again = overlock.fuse(fused)
    assert relative_error(again(*inputs), fused(*inputs)) < 1e-12
    assert {k: t.shape for k, t in again.state_dict().items()} == {k: t.shape for k, t in fused.state_dict().items()}


def test_fused_model_has_fewer_parameters():
    """Merging the branches is what saves them."""
    module, _ = make("OverLoCK")
    assert sum(p.numel() for p in overlock.fuse(module).parameters()) < sum(p.numel() for p in module.parameters())


def test_gradients_pass_through_to_the_input():
    """The copy's parameters are frozen, its input need not be."""
    module, (x,) = make("OverLoCK")
    gradients = []
    for model in (module, overlock.fuse(module)):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-10


# timm's re-parameterisation


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@torch.no_grad()
def test_reparameterize_model_of_timm(inplace, training):
    """It merges every Dilated RepConv; the result loads where the model is built merged."""
    module, (x,) = make("OverLoCK")
    expected = module(x)
    before = copy_of(module)
    merged = reparameterize_model(module.train(training), inplace=inplace).eval()
    assert relative_error(merged(x), expected) < 1e-12
    built = timm.create_model("overlock_atto", num_classes=7, deploy=True).double().eval()
    built.load_state_dict(merged.state_dict())
    assert relative_error(built(x), expected) < 1e-12
    assert relative_error(overlock.fuse(merged)(x), expected) < 1e-12
    if not inplace:
        after = module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_merged_model_trains():
    """The merged form has gradients everywhere."""
    module = reparameterize_model(timm.create_model("overlock_atto", num_classes=7)).train()
    module(images(2, 3, 64, 64)).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in module.parameters())


def test_layer_norms_and_response_norms_stay():
    """What is not linear is not folded: the count of layer norms is the same."""
    module, _ = make("OverLoCK")

    def count(model):
        return sum(isinstance(child, LayerNorm2d) for child in model.modules())

    assert count(overlock.fuse(module)) == count(module) > 0


@torch.no_grad()
def test_batch_norm_without_statistics_stays():
    """It normalises by its batch in evaluation too, which no convolution does."""
    module = NormConv(4, 4)
    module.norm = nn.BatchNorm2d(4, track_running_stats=False)
    x = images(2, 4, 5, 6)
    assert relative_error(overlock.fuse(module)(x), module.eval()(x)) < 1e-5


# The form for CPU


@pytest.fixture
def on_cpu():
    """Network and fused network in float32, and images whose maps have room for the kernels."""
    module, _ = make("OverLoCK", torch.float32)
    return module, overlock.fuse(module), images(2, 3, 224, 225)


def has_cpu_form(model):
    return any(isinstance(child, Packed) for child in model.modules())


def set_eps(model):
    model.base_net.stages[0].blocks[-1].norm.eps = 0.3


def set_eps_of_response(model):
    model.focus_net.stage3.blocks[0].ffn.norm.eps = 0.3


def set_scale(model):
    model.focus_net.stage3.blocks[-1].mixer.aggregator.mixer.scale *= 300


@pytest.mark.parametrize("change", [set_eps, set_eps_of_response, set_scale])
@torch.no_grad()
def test_blocks_of_their_own_settings(change):
    """A block that differs from those beside it keeps what it was given."""
    module, _ = make("OverLoCK", torch.float32)
    x = images(1, 3, 224, 225)
    usual = module(x)
    change(module)
    expected, fused = module(x), overlock.fuse(module)
    assert relative_error(expected, usual) > 1e-3
    assert relative_error(fused(x), expected) < 1e-4
    assert has_cpu_form(fused)


@torch.no_grad()
def test_without_numba(monkeypatch, on_cpu):
    """The network is fused in PyTorch's layers."""
    module, fused, x = on_cpu
    assert has_cpu_form(fused)
    monkeypatch.setattr("overlock.fused.fuse.numba_installed", lambda: False)
    plain = overlock.fuse(module)
    assert not has_cpu_form(plain)
    assert relative_error(plain(x), module(x)) < 1e-4


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1),
        lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        lambda: nn.Conv2d(8, 8, 3, stride=(1, 2), padding=1),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
        lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
        lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(8, 8, 4, padding=2),
        lambda: nn.Conv2d(8, 8, (3, 5), padding=(1, 2)),
        lambda: nn.Conv2d(8, 8, 3),
        lambda: nn.Conv2d(8, 8, 1, stride=2),
        lambda: nn.Conv2d(8, 8, 3, padding="same"),
        lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        lambda: StdConv2d(8, 8, 3, padding=1),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)),
        lambda: SqueezeExcite(8),
        lambda: SqueezeExcite(8, act_layer=nn.GELU),
        lambda: SqueezeExcite(8, act_layer=nn.GELU, bias=False),
        lambda: SqueezeExcite(8, act_layer=nn.GELU, add_maxpool=True),
        lambda: SqueezeExcite(8, act_layer=nn.GELU, gate_layer="hard_sigmoid"),
    ],
)
@torch.no_grad()
def test_layers_of_other_kinds(make_layer):
    """Layers that our forms do not do are left as they are, and the others give what they gave."""
    torch.manual_seed(0)
    layer, x = make_layer().eval(), images(2, 8, 9, 7)
    fused = overlock.fuse(nn.Sequential(layer))
    assert relative_error(fused(x), layer(x)) < 1e-5
    with pytest.raises((RuntimeError, ValueError)):
        fused(x[:, :-1])
    if isinstance(layer, nn.Conv2d):
        assert relative_error(fused(x[0]), layer(x[0])) < 1e-5


@pytest.mark.parametrize("name", ["torch", "reference", "cpu"])
@torch.no_grad()
def test_backend_asked_for_is_taken(on_cpu, name, monkeypatch):
    """No kernel of numba's runs under another backend."""
    module, fused, x = on_cpu
    calls = []
    for user, start in ((programs, "run_all"), (threads, "start")):
        call = getattr(user, start)
        monkeypatch.setattr(user, start, lambda *a, call=call: (calls.append(a), call(*a)))
    with backend(name):
        assert relative_error(fused(x), module(x)) < 1e-4
    assert bool(calls) == (name == "cpu")


@torch.no_grad()
def test_copies_and_files(on_cpu):
    """deepcopy, torch.save of the whole, and state dicts, which take effect after a first call."""
    _, fused, x = on_cpu
    expected = fused(x)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for same in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert torch.equal(same(x), expected)
    other = overlock.fuse(randomise(timm.create_model("overlock_atto", num_classes=7), seed=1))
    assert not torch.allclose(other(x), expected)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), expected)


@torch.no_grad()
def test_fused_model_takes_other_types(on_cpu):
    """Fused in float32, then moved."""
    module, fused, x = on_cpu
    expected = copy.deepcopy(module).double()(x.double())
    assert relative_error(copy.deepcopy(fused).double()(x.double()), expected) < 1e-5
    assert relative_error(copy.deepcopy(fused).bfloat16()(x.bfloat16()).double(), expected) < 0.2
    assert relative_error(copy.deepcopy(fused).half()(x.half()).double(), expected) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(fused(x).double(), expected) < 0.2
    fused(x)
    assert relative_error(fused.double().float()(x), expected) < 1e-4


@torch.no_grad()
def test_fused_model_on_meta(on_cpu):
    """Shapes alone, and back with other memory."""
    _, fused, x = on_cpu
    expected, state = fused(x), copy.deepcopy(fused.state_dict())
    moved = fused.to("meta")
    assert moved(x.to("meta")).shape == expected.shape
    back = moved.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), expected)


@torch.no_grad()
def test_wrappers_of_compile_are_taken_off(on_cpu):
    """From a network and from a part of one; the fused copy can be compiled anew."""
    module, fused, x = on_cpu
    expected, names = module(x), {name for name, _ in fused.named_modules()}
    module.base_net.stages[1] = torch.compile(module.base_net.stages[1], backend="eager")
    again = overlock.fuse(torch.compile(module, backend="eager"))
    assert {name for name, _ in again.named_modules()} == names
    assert relative_error(again(x), expected) < 1e-4


@torch.no_grad()
def test_a_list_beside_the_modules():
    """Blocks that a network calls from a list of its own stay as they were."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = BasicBlock(8, kernel_size=7), overlock.ContMixBlock(8, groups=2)
            self.blocks = [self.first, self.second]

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    network, x = randomise(Network()), images(1, 8, 9, 9)
    assert relative_error(overlock.fuse(network)(x), network(x)) < 1e-5


@torch.no_grad()
def test_changes_made_in_inference_mode(on_cpu):
    """A network fused and loaded there has the new parameters at the next call."""
    _, fused, x = on_cpu
    with torch.inference_mode():
        other = overlock.fuse(randomise(timm.create_model("overlock_atto", num_classes=7), seed=1))
        other(x)
        other.load_state_dict(fused.state_dict())
        assert torch.equal(other(x), fused(x))


@torch.no_grad()
def test_changes_in_place(on_cpu):
    """Those that PyTorch counts are followed."""
    module, fused, x = on_cpu
    fused(x)
    for factor in (2.0, 0.5):
        for parameter in fused.parameters():
            parameter.mul_(factor)
        fused(x)
    assert relative_error(fused(x), module(x)) < 1e-4


@torch.no_grad()
def test_probing_a_fused_network(on_cpu):
    """A new classifier trains on frozen features."""
    _, fused, x = on_cpu
    fused.reset_classifier(3)
    with torch.enable_grad():
        fused(x).square().sum().backward()
    assert [name for name, parameter in fused.named_parameters() if parameter.grad is not None] == [
        "head.fc.weight", "head.fc.bias",
    ]  # fmt: skip


def test_gradients_of_the_form_for_cpu(on_cpu):
    """To the images."""
    module, fused, x = on_cpu
    gradients = []
    for model in (module, fused):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-3


@torch.no_grad()
def test_graphs_of_the_form_for_cpu(on_cpu):
    """One graph for every size of the batch, compiled and exported."""
    _, fused, x = on_cpu
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    batches = [x[:1].repeat(size, 1, 1, 1) for size in (2, 3, 5)]
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=True)
    exported = torch.export.export(
        fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    ).module()
    frames = []
    for batch in batches:
        expected = fused(batch)
        assert relative_error(compiled(batch), expected) < 1e-5
        assert relative_error(exported(batch), expected) < 1e-5
        frames.append(counter.frame_count)
    assert frames[0] > 0
    assert len(set(frames)) == 1  # nothing is compiled for another size
