"""What was changed by hand keeps its own form: the fused copy gives what the changed network gives, hooks and all."""

from __future__ import annotations

import copy
import io
import logging
from collections import OrderedDict

import pytest
import torch
from helpers import images, randomise, relative_error, tiny
from torch import nn
from torch.export import export
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FeaturePyramidNetwork

import overlock
from overlock.blocks import BasicBlock, MixerBlock
from overlock.fused.flat_parameters import Packed
from overlock.layers import ConvNorm, DilatedRepConv, LocalConv, NormConv
from overlock.layers.depthwise_conv import DepthwiseConv

BASIC = "base_net.stages.1.blocks.0"
SCALED = "base_net.stages.2.blocks.0"
DYNAMIC = "focus_net.stage3.blocks.1"
AGGREGATOR = f"{DYNAMIC}.mixer.aggregator"


class Lora(nn.Module):
    """A layer beside which two small ones are trained, as peft wraps it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        same = base.groups if isinstance(base, nn.Conv2d) else 1
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        else:
            self.down = nn.Conv2d(base.in_channels, 2 * same, 1, groups=same)
            self.up = nn.Conv2d(2 * same, base.out_channels, 1, stride=base.stride, groups=same)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class AddedWeight(nn.Module):
    """A convolution whose weight is read, as loralib does it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.delta = nn.Parameter(0.3 * torch.randn_like(conv.weight))

    def forward(self, x):
        return self.conv._conv_forward(x, self.conv.weight + self.delta, self.conv.bias)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledBlock(BasicBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def put(model, name, new):
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, new)


def replaced(name, make):
    """A change that puts something made of a module in its place."""

    def change(model):
        put(model, name, make(model.get_submodule(name)))

    return change


def set_to(name, attribute, value):
    return lambda model: setattr(model.get_submodule(name), attribute, value)


def of_class(name, kind):
    return set_to(name, "__class__", kind)


def conv_like(**options):
    def make(conv):
        given = dict(stride=conv.stride, padding=conv.padding, groups=conv.groups, bias=conv.bias is not None)
        return nn.Conv2d(conv.in_channels, conv.out_channels, **{"kernel_size": conv.kernel_size, **given, **options})

    return make


def spectral(name):
    return lambda model: parametrizations.spectral_norm(model.get_submodule(name).eval())


def weight_norm(name):
    def change(model):
        layer = parametrizations.weight_norm(model.get_submodule(name))
        layer.parametrizations.weight.original0.mul_(2)

    return change


def share_module(model):
    put(model, "focus_net.stage3.blocks.1.ffn", model.get_submodule("focus_net.stage3.blocks.0.ffn"))


def share_parameters(model):
    first, second = (model.get_submodule(f"focus_net.stage3.blocks.{i}.mixer.aggregator.proj.conv") for i in (0, 1))
    second.weight, second.bias = first.weight, first.bias


def share_memory(model):
    first, second = (model.get_submodule(f"focus_net.stage3.blocks.{i}.mixer.aggregator.proj.conv") for i in (0, 1))
    second.weight.data, second.bias.data = first.weight.data, first.bias.data


def patch_forward(model):
    block = model.get_submodule(BASIC)
    block.forward = lambda x, block=block: 2 * type(block).forward(block, x)


CHANGES = {
    # activations
    "GELU of the stem by tanh": replaced("base_net.stages.0.embed.1", lambda _: nn.GELU(approximate="tanh")),
    "SiLU in the stem": replaced("base_net.stages.0.embed.3", lambda _: nn.SiLU()),
    "SiLU in squeeze-excite": replaced(f"{BASIC}.se.act", lambda _: nn.SiLU()),
    "another gate of squeeze-excite": replaced(f"{AGGREGATOR}.se.gate", lambda _: nn.Hardsigmoid()),
    "max pool in squeeze-excite": set_to(f"{SCALED}.se", "add_maxpool", True),
    "no GELU in a ConvFFN": set_to(f"{BASIC}.ffn.local", "gelu", False),
    "GELU as the gate": replaced(f"{AGGREGATOR}.gate_act", lambda _: nn.GELU()),
    "SiLU in the fusion": replaced(f"{DYNAMIC}.mixer.fusion.act", lambda _: nn.SiLU()),
    "SiLU in the head": replaced("head.hidden.act", lambda _: nn.GELU()),
    # hyper-parameters
    "padding of an embedding": set_to("base_net.stages.1.embed.conv", "padding_mode", "reflect"),
    "padding of the stem": set_to("base_net.stages.0.embed.2.conv", "padding_mode", "circular"),
    "padding between the stages": set_to("focus_net.embed_features.conv", "padding_mode", "replicate"),
    "dilated embedding": replaced("base_net.stages.1.embed.conv", conv_like(dilation=2, padding=2)),
    "wider embedding": replaced("base_net.stages.1.embed.conv", conv_like(kernel_size=5, padding=2)),
    "even embedding": replaced("base_net.stages.1.embed.conv", conv_like(kernel_size=2, padding=0)),
    "embedding in groups": replaced("base_net.stages.1.embed.conv", conv_like(groups=4)),
    "eps of a norm": set_to(f"{BASIC}.norm", "eps", 0.3),
    "eps of a batch norm": set_to(f"{BASIC}.large_kernel.norm", "eps", 0.3),
    "scale of ContMix": set_to(f"{AGGREGATOR}.mixer", "scale", 3.0),
    # other layers
    "LoRA on a projection": replaced(f"{BASIC}.ffn.project", Lora),
    "LoRA on an expansion": replaced(f"{DYNAMIC}.ffn.expand", Lora),
    "LoRA below a batch norm": replaced(f"{AGGREGATOR}.mixer.query.conv", Lora),
    "LoRA after a batch norm": replaced(f"{AGGREGATOR}.proj.conv", Lora),
    "LoRA on a large kernel": replaced(f"{BASIC}.large_kernel.conv.large", Lora),
    "LoRA on an embedding": replaced("focus_net.embed_features.conv", Lora),
    "weight added to a projection": replaced(f"{BASIC}.ffn.project", AddedWeight),
    "weight added to a local convolution": replaced(f"{BASIC}.local", AddedWeight),
    "weight added to the reduction": replaced("overview_net.reduce", AddedWeight),
    "subclass of a convolution": of_class(f"{BASIC}.ffn.expand", DoubledConv),
    "subclass below a batch norm": of_class("base_net.stages.1.embed.conv", DoubledConv),
    "subclass of a block": of_class(BASIC, DoubledBlock),
    "another forward": patch_forward,
    "spectral norm": spectral(f"{BASIC}.ffn.expand"),
    "spectral norm below a batch norm": spectral(f"{AGGREGATOR}.gate.conv"),
    "weight norm": weight_norm(f"{BASIC}.ffn.project"),
    "weight norm of a large kernel": weight_norm(f"{BASIC}.large_kernel.conv.large"),
    "weight norm of a linear layer": weight_norm(f"{AGGREGATOR}.mixer.kernels"),
    # norms
    "group norm": replaced(f"{BASIC}.large_kernel.norm", lambda x: nn.GroupNorm(4, x.num_features)),
    "group norm before a convolution": replaced(f"{AGGREGATOR}.proj.norm", lambda x: nn.GroupNorm(4, x.num_features)),
    "group norm in a Dilated RepConv": replaced(
        f"{BASIC}.large_kernel.conv.norm", lambda x: nn.GroupNorm(4, x.num_features)
    ),
    "group norm in a branch": replaced(
        f"{BASIC}.large_kernel.conv.branches.k3_r1.norm", lambda x: nn.GroupNorm(4, x.num_features)
    ),
    "no norm in a Dilated RepConv": replaced(f"{BASIC}.large_kernel.conv.norm", lambda _: nn.Identity()),
    "no norm": replaced(f"{AGGREGATOR}.gate.norm", lambda _: nn.Identity()),
    "no norm before a convolution": replaced(f"{AGGREGATOR}.proj.norm", lambda _: nn.Identity()),
    "no layer norm": replaced(f"{DYNAMIC}.norm2", lambda _: nn.Identity()),
    "no response norm": replaced(f"{BASIC}.ffn.norm", lambda _: nn.Identity()),
    "batch norm without statistics": replaced(
        "head.hidden.proj.norm", lambda x: nn.BatchNorm2d(x.num_features, track_running_stats=False)
    ),
    "batch norm without parameters": replaced(
        f"{AGGREGATOR}.proj.norm", lambda x: nn.BatchNorm2d(x.num_features, affine=False)
    ),
    "layer norm without a bias": replaced(
        f"{BASIC}.norm", lambda x: type(x)(x.normalized_shape[0], bias=False)
    ),
    "nothing in place of squeeze-excite": replaced(f"{BASIC}.se", lambda _: nn.Identity()),
    "something in the branch": replaced(f"{SCALED}.drop_path", lambda _: nn.Tanh()),
    # parameters in several places
    "a module twice": share_module,
    "parameters twice": share_parameters,
    "memory twice": share_memory,
}  # fmt: skip


def make(seed=0):
    """A network and an image that has room for the kernels of stage 3."""
    return randomise(tiny(), seed), images(1, 3, 160, 168)


def outputs(model, x):
    last, features = model.forward_intermediates(x)
    return [*features, model.forward_head(last)]


def largest_error(actual, expected):
    return max(map(relative_error, actual, expected))


@pytest.fixture(scope="module")
def usual():
    model, x = make()
    with torch.no_grad():
        return outputs(model, x)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_changed_network(name, usual):
    """Fused as far as that goes, with the outputs of the changed network."""
    torch.manual_seed(0)
    model, x = make()
    CHANGES[name](model)
    expected = outputs(model.eval(), x)
    assert largest_error(expected, usual) > 3e-4
    for kernels in (True, False):
        fused = overlock.fuse(model, kernels=kernels)
        assert largest_error(outputs(fused, x), expected) < 1e-4
        assert kernels == any(isinstance(module, Packed) for module in fused.modules())


@torch.no_grad()
def test_every_convolution_wrapped():
    """Nothing of them is taken for what it was."""
    model, x = make()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convolutions:
        put(model, name, Lora(model.get_submodule(name)))
    randomise(model)
    assert relative_error(overlock.fuse(model)(x), model(x)) < 1e-4


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        nn.utils.spectral_norm,
        lambda layer: setattr(layer, "last_result", layer.weight * 2),
    ],
)
def test_results_that_modules_keep(change):
    """Weights that a hook makes before each call, or what a module keeps of its last one, with its graph."""
    model, x = make()
    change(model.get_submodule(f"{BASIC}.ffn.expand"))
    fused = overlock.fuse(model)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-4


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("make_graph", [torch.jit.script, lambda model: export(model, (images(1, 8, 9, 9),)).module()])
def test_graphs_are_refused(make_graph):
    with pytest.raises(TypeError, match="fuse it first"):
        overlock.fuse(make_graph(LocalConv(8).eval()))


@torch.no_grad()
def test_a_mixer_of_somebodys():
    """A convolution of it that has the name of our last one need not be the last."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.proj(x).tanh()

    block, x = randomise(MixerBlock(8, hidden_channels=16, mixer=Mixer())), images(2, 8, 9, 7)
    assert relative_error(overlock.fuse(block).mix(x), block.mix(x)) < 1e-5


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: DepthwiseConv(8, 3, dilation=2),
        lambda: LocalConv(8, gelu=True),
        lambda: ConvNorm(nn.Conv2d(8, 8, 3, stride=2, padding_mode="reflect", padding=1), 8),
        lambda: nn.Sequential(AddedWeight(DepthwiseConv(8, 5))),
        lambda: nn.Sequential(AddedWeight(nn.Conv2d(8, 8, 1))),
    ],
)
@torch.no_grad()
def test_layers(make_layer):
    layer, x = randomise(make_layer()), images(2, 8, 11, 9)
    assert relative_error(overlock.fuse(layer)(x), layer(x)) < 1e-5


@torch.no_grad()
def test_norms_in_float32():
    """Beside convolutions in bfloat16, as mixed precision often keeps them."""
    layers = [ConvNorm(nn.Conv2d(8, 8, 3, padding=1), 8), NormConv(8, 8), DilatedRepConv(8, 7)]
    for layer in map(randomise, layers):
        layer.bfloat16()
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        x = images(2, 8, 9, 9).bfloat16()
        assert relative_error(overlock.fuse(layer)(x).float(), layer(x).float()) < 0.05


@torch.no_grad()
def test_one_block_in_another_type():
    """The others have their kernels nevertheless."""
    model, x = make()
    stage = model.base_net.stages[0]
    stage.double()
    stage.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    stage.register_forward_hook(lambda _, __, output: output.float())
    fused = overlock.fuse(model)
    assert relative_error(fused(x), model(x)) < 1e-4
    assert not any(isinstance(module, Packed) for module in fused.base_net.stages[0].modules())
    assert any(isinstance(module, Packed) for module in fused.modules())


def test_convolutions_of_libraries_have_kernels():
    """Their modules call them, which somebody's own module need not do."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight, self.conv.bias, padding="same")

    pyramid, head, x = FeaturePyramidNetwork([8], 8).eval(), Head(), images(1, 8, 9, 9)
    fused = overlock.fuse(nn.Sequential(OrderedDict(pyramid=pyramid, head=head)))
    assert {type(layer).__name__ for layer in fused.pyramid.modules()} >= {"Pointwise", "ConvStack"}
    with torch.no_grad():
        assert relative_error(fused.head(x), head(x)) < 1e-5
        assert relative_error(fused.pyramid({"x": x})["x"], pyramid({"x": x})["x"]) < 1e-5


# Hooks

HOOKED = [
    "", "base_net", "base_net.stages.1", "base_net.stages.0.embed", "base_net.stages.0.embed.1",
    "base_net.stages.1.embed.conv", BASIC, f"{BASIC}.local", f"{BASIC}.norm", f"{BASIC}.se", f"{BASIC}.se.fc1",
    f"{BASIC}.large_kernel", f"{BASIC}.large_kernel.conv", f"{BASIC}.large_kernel.conv.branches.k3_r1",
    f"{BASIC}.ffn", f"{BASIC}.ffn.local", f"{BASIC}.ffn.norm", f"{BASIC}.ffn.project", f"{BASIC}.residual",
    f"{SCALED}.residual", f"{SCALED}.drop_path", f"{SCALED}.ffn.project", DYNAMIC, f"{DYNAMIC}.context_update",
    f"{DYNAMIC}.context_update.beta", f"{DYNAMIC}.mixer", f"{DYNAMIC}.mixer.fusion", f"{AGGREGATOR}.mixer",
    f"{AGGREGATOR}.proj", f"{AGGREGATOR}.proj.conv", f"{AGGREGATOR}.gate_act", "focus_net.stage4",
    "focus_net.embed_context", "overview_net.reduce", "head.hidden.proj",
]  # fmt: skip


def first_of(value):
    return value if isinstance(value, torch.Tensor) else value[0]


@pytest.mark.parametrize("name", HOOKED)
@torch.no_grad()
def test_forward_hooks(name):
    """They see the same, as often, and what they return is taken."""
    model, x = make()
    seen = []
    hooked = model.get_submodule(name)
    hooked.register_forward_hook(lambda _, __, output: seen.append(first_of(output).clone()))
    hooked.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    expected = model(x)
    wanted, seen[:] = list(seen), []
    assert wanted
    fused = overlock.fuse(model)
    assert relative_error(fused(x), expected) < 1e-4
    assert len(seen) == len(wanted)
    for actual, value in zip(seen, wanted, strict=True):
        assert relative_error(actual, value) < 1e-4


@torch.no_grad()
def test_a_hook_that_changes_the_result():
    model, x = make()
    usual = model(x)
    model.get_submodule(BASIC).register_forward_hook(lambda _, __, output: 2 * output)
    expected = model(x)
    assert relative_error(expected, usual) > 1e-2
    assert relative_error(overlock.fuse(model)(x), expected) < 1e-4


@pytest.mark.parametrize("pre", [False, True])
def test_backward_hooks(pre):
    """Of a module within a stage, while gradients go to the image."""
    model, x = make()
    seen = []
    block = model.get_submodule(BASIC)
    if pre:
        block.register_full_backward_pre_hook(lambda *_: seen.append(1))
    else:
        block.register_full_backward_hook(lambda *_: seen.append(1))
    overlock.fuse(model)(x.requires_grad_()).sum().backward()
    assert seen == [1]


@torch.no_grad()
def test_hooks_for_all_modules():
    """As profilers have them: they see the layers of a fused block."""
    model, x = make()
    fused, seen = overlock.fuse(model), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        result = fused(x)
    finally:
        handle.remove()
    assert {BasicBlock, nn.Conv2d, nn.GELU} <= set(seen)
    assert relative_error(result, model(x)) < 1e-4


# What is told


def test_the_log_names_what_was_left_and_why(caplog):
    model, _ = make()
    CHANGES["SiLU in squeeze-excite"](model)
    with caplog.at_level(logging.DEBUG, logger="overlock.fused.fuse"):
        overlock.fuse(model)
    assert f"left as it is: model.{BASIC}.se.act is SiLU, not GELU" in caplog.text


def test_a_network_as_it_is_built_is_fused_whole(caplog):
    with caplog.at_level(logging.DEBUG, logger="overlock.fused.fuse"):
        fused = overlock.fuse(randomise(tiny(drop_path_rate=0.2, aux_head=True)))
    assert not caplog.records
    stages = [*fused.base_net.stages, fused.overview_net.stage, fused.focus_net.stage3, fused.focus_net.stage4]
    assert all(isinstance(stage, Packed) for stage in stages)


# Evaluation


@pytest.mark.parametrize("kernels", [True, False])
@torch.no_grad()
def test_it_stays_in_evaluation(kernels):
    """Dropped paths, dropout, batch norms and the auxiliary head stay asleep; as a part of another network too."""
    model = randomise(tiny(drop_path_rate=0.9, drop_rate=0.9, aux_head=True))
    put(model, f"{BASIC}.large_kernel.norm", nn.GroupNorm(4, 12))
    x = images(2, 3, 64, 64)
    fused = overlock.fuse(model, kernels=kernels)
    expected = fused(x)
    assert fused.train() is fused
    assert not any(module.training for module in fused.modules())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for same in (fused, copy.deepcopy(fused), torch.load(file, weights_only=False)):
        teacher = nn.Sequential(same).train()
        assert teacher.training
        assert same.train() is same
        assert torch.equal(teacher(x), expected)
    assert F.mse_loss(model(x), expected) < 1e-6
