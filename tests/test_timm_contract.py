"""What timm and the code around it ask of a backbone."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import timm
import torch
from helpers import images, meta, randomise, relative_error
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import overlock

NAMES = list(overlock.VARIANTS)
CROPS = {"overlock_xt": 0.925, "overlock_t": 0.95, "overlock_s": 0.95, "overlock_b": 0.975}
CHANNELS = {
    "overlock_xt": [56, 112, 340, 420],
    "overlock_t": [64, 128, 384, 640],
    "overlock_s": [64, 128, 448, 640],
    "overlock_b": [80, 160, 528, 720],
}


HEADS = re.compile(r"(head\.fc|aux_head)\.")


def atto(**kwargs):
    return timm.create_model("overlock_atto", **kwargs)


@pytest.fixture(scope="module")
def model():
    return randomise(atto(num_classes=10))


@pytest.fixture(scope="module")
def photo():
    return images(2, 3, 96, 64)


@pytest.fixture(scope="module")
def maps(model, photo):
    """The four features."""
    with torch.no_grad():
        return model.forward_intermediates(photo, intermediates_only=True)


# Registration and configuration


def test_registered():
    """import overlock makes the variants timm's, beside the rows of the ablations."""
    assert set(timm.list_models("overlock*", exclude_filters="overlock_*_*")) == set(NAMES)
    assert {name.split(".")[0] for name in timm.list_pretrained("overlock*")} == set(CROPS)


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration(name):
    """The record agrees with the model: input, crop, names of first convolution and classifier."""
    model = meta(name)
    cfg = model.default_cfg
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["num_classes"] == model.num_classes == 1000
    assert cfg["interpolation"] == "bicubic"
    assert cfg["crop_pct"] == CROPS.get(name, 0.925)
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["pool_size"] == (7, 7)
    parameters = dict(model.named_parameters())
    assert parameters[cfg["first_conv"] + ".weight"].shape[1] == 3
    assert parameters[cfg["classifier"] + ".weight"].shape == (1000, model.head_hidden_size)
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])


@pytest.mark.parametrize("name", NAMES)
def test_feature_info(name):
    """Channels, strides and modules of section 3.1's features."""
    model = meta(name, features_only=True)
    assert model.feature_info.channels() == CHANNELS.get(name, model.feature_info.channels())
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    features = model(torch.empty(2, 3, 256, 192, device="meta"))
    for x, width, stride in zip(features, model.feature_info.channels(), (4, 8, 16, 32), strict=True):
        assert x.shape == (2, width, 256 // stride, 192 // stride)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_all_variants(name):
    """Features, hidden layer and logits have the widths that the model states."""
    model = meta(name, num_classes=7).eval()
    x = model.forward_features(torch.empty(2, 3, 224, 224, device="meta"))
    assert x.shape == (2, model.num_features, 7, 7)
    assert model.forward_head(x, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(x).shape == (2, 7)


# Arguments of create_model


@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", ""])
def test_classes_and_pooling(num_classes, global_pool, photo):
    """Pooled or not, classified or not."""
    model = atto(num_classes=num_classes, global_pool=global_pool).eval()
    width = num_classes or model.head_hidden_size
    y = model(photo)
    assert y.shape == ((2, width) if global_pool else (2, width, 3, 2))
    hidden = model.forward_head(model.forward_features(photo), pre_logits=True)
    assert hidden.shape[:2] == (2, model.head_hidden_size)
    if num_classes == 0:
        assert isinstance(model.get_classifier(), nn.Identity)
        torch.testing.assert_close(hidden, y)


def test_pooling_pools(photo):
    """avg is the mean of the unpooled map, max its maximum; the classifier is the same."""
    avg, highest, none = (randomise(atto(num_classes=0, global_pool=pool)) for pool in ("avg", "max", ""))
    hidden = none(photo)
    torch.testing.assert_close(avg(photo), hidden.mean((2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(highest(photo), hidden.amax((2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_chans", [1, 4, 6])
def test_in_chans(in_chans):
    """Images of any number of channels."""
    assert atto(in_chans=in_chans, num_classes=3).eval()(images(1, in_chans, 32, 32)).shape == (1, 3)


def test_drop_rate(photo):
    """Dropout acts on the hidden layer, in training only."""
    model = randomise(atto(drop_rate=0.9, num_classes=0))
    assert (model(photo) == 0).float().mean() < 0.1
    dropped = (model.train()(photo) == 0).float().mean()
    assert 0.8 < dropped < 0.97


def test_drop_path_rate_rises_over_all_sub_networks():
    """Linearly from 0, in the order base, overview, focus."""
    model = meta("overlock_xt", drop_path_rate=0.16)
    stages = [*(stage.blocks for stage in model.base_net.stages), model.overview_net.stage.blocks,
              model.focus_net.stage3.blocks, model.focus_net.stage4.blocks]  # fmt: skip
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for blocks in stages for block in blocks]
    assert rates == pytest.approx([0.16 * i / 16 for i in range(17)])


def test_drop_path_drops(photo):
    """In training two passes differ, in evaluation they do not."""
    model = randomise(atto(drop_path_rate=0.5, num_classes=4))
    assert torch.equal(model(photo), model(photo))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    model.train()
    assert not torch.equal(model(photo), model(photo))


def test_aux_head(photo):
    """Two logits in training, one in evaluation; without the head one in both."""
    model = atto(aux_head=True, num_classes=4)
    logits, aux = model.train()(photo)
    assert logits.shape == aux.shape == (2, 4)
    assert model.eval()(photo).shape == (2, 4)
    assert atto(num_classes=4).train()(photo).shape == (2, 4)


def test_checkpoint_path(model, photo, tmp_path):
    """A file of ours loads by timm's argument."""
    torch.save({"state_dict": model.state_dict()}, tmp_path / "ours.pth")
    loaded = atto(num_classes=10, checkpoint_path=str(tmp_path / "ours.pth")).eval()
    assert torch.equal(loaded(photo), model(photo))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_and_dtype(device, dtype):
    """Built where and as what is asked."""
    model = atto(device=device, dtype=dtype)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}


def test_unknown_arguments_are_refused():
    """A misspelt keyword does not vanish."""
    with pytest.raises(TypeError, match="drop_path_rat"):
        atto(drop_path_rat=0.1)


WRONG = {
    "in_chans": [0, -1, 2.5, "3", True],
    "num_classes": [-1, 2.5, "10"],
    "drop_rate": [-0.1, 1.0, 1.5, float("nan")],
    "drop_path_rate": [-0.1, 1.0, 1.5, float("nan")],
    "global_pool": ["mean", "catavgmax", "AVG"],
    "stem_stride": [0, 3],
    "output_stride": [0, 4, 64],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_impossible_arguments_are_refused(name, value):
    """In a sentence that has the argument's name and what came."""
    with pytest.raises(ValueError, match=f"{name} .*got {re.escape(repr(value))}"):
        atto(**{name: value})


@pytest.mark.parametrize("indices", [(4,), (-5,), (0, 1, 2, 3, 4), (), 5, 0, -1])
def test_features_that_do_not_exist_are_refused(indices):
    """Whatever way they are asked for."""
    with pytest.raises(ValueError, match=r"features are 0 to 3 \(or -4 to -1\).*got"):
        atto(features_only=True, out_indices=indices)


def test_rows_of_another_length_are_refused():
    """A variant's own."""
    variant = overlock.VARIANTS["overlock_atto"]
    for name, value in dict(
        dims=(24, 40, 64), base_depths=(1, 1, 2, 3), focus_depths=(3,), groups=(4, 6, 8), kernel_sizes=(7,) * 5
    ).items():
        with pytest.raises(ValueError, match=f"{name} of a variant must be"):
            dataclasses.replace(variant, **{name: value})
    with pytest.raises(ValueError, match="each of base_depths must be a whole number"):
        dataclasses.replace(variant, base_depths=(1, 0, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        dataclasses.replace(variant, dims=(24, 40, 64, 98))


# Parts of the forward pass


def test_forward_in_parts(model, photo):
    """Features, then head."""
    features = model.forward_features(photo)
    torch.testing.assert_close(model.forward_head(features), model(photo))
    torch.testing.assert_close(model.get_classifier()(model.forward_head(features, pre_logits=True)), model(photo))


@pytest.mark.parametrize("indices", [None, 1, 2, [0], [1], [2], [3], [0, 2], [-1], [-2, -1], [0, -1]])
@pytest.mark.parametrize("stop_early", [False, True])
@torch.no_grad()
def test_forward_intermediates(indices, stop_early, model, photo, maps):
    """Any choice of features, with the last or without."""
    wanted = range(4) if indices is None else range(4)[-indices:] if isinstance(indices, int) else indices
    kwargs = {"indices": indices, "stop_early": stop_early}
    last, features = model.forward_intermediates(photo, **kwargs)
    only = model.forward_intermediates(photo, intermediates_only=True, **kwargs)
    for actual, same, i in zip(features, only, sorted(i % 4 for i in wanted), strict=True):
        assert torch.equal(actual, maps[i])
        assert torch.equal(same, maps[i])
    if not stop_early:
        assert torch.equal(last, maps[3])


def test_stop_early_stops():
    """What comes after the last feature asked for is not run."""
    model = atto().eval()
    for late in (model.base_net.stages[1], model.overview_net, model.focus_net):
        late.register_forward_hook(lambda module, args, output: pytest.fail("ran"))
    model.forward_intermediates(images(1, 3, 64, 64), indices=[0], stop_early=True)


@pytest.mark.parametrize("arguments", [{"indices": [4]}, {"indices": 5}, {"output_fmt": "NLC"}])
def test_wrong_intermediates_are_refused(arguments, model, photo):
    """Features that do not exist, and layouts."""
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(photo, **arguments)


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (1, 2), (0, 3), (-1,), (-3, -2)])
@torch.no_grad()
def test_features_only(indices, model, photo, maps):
    """The chosen features, and no parameter that they do not need."""
    part = atto(features_only=True, out_indices=indices).eval()
    missing, _ = part.model.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    positive = [i % 4 for i in indices]
    assert part.feature_info.channels() == [maps[i].shape[1] for i in positive]
    assert part.feature_info.reduction() == [4 * 2**i for i in positive]
    for actual, i in zip(part(photo), positive, strict=True):
        assert torch.equal(actual, maps[i])


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruned_parameters_all_get_gradients(index):
    """After pruning nothing is left that a feature does not depend on."""
    part = atto(features_only=True, out_indices=(index,)).train()
    part(images(2, 3, 64, 64))[0].square().mean().backward()
    assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize("indices", [1, 2, [0], [1], [2], [0, 1], [-1], [-2]])
@torch.no_grad()
def test_prune_intermediate_layers(indices, model, photo, maps):
    """The indices kept, the features unchanged, the head gone, the width stated that of the last one left."""
    pruned = atto(num_classes=10)
    pruned.load_state_dict(model.state_dict())
    pruned.eval()
    expected = model.forward_intermediates(photo, indices, intermediates_only=True)
    take = pruned.prune_intermediate_layers(indices)
    assert take == [next(i for i in range(4) if torch.equal(maps[i], x)) for x in expected]
    for actual, x in zip(pruned.forward_intermediates(photo, take, intermediates_only=True), expected, strict=True):
        assert torch.equal(actual, x)
    assert pruned.num_features == maps[max(take)].shape[1]
    assert pruned.num_classes == 0
    assert torch.equal(pruned.forward_features(photo), maps[max(take)])
    pruned.reset_classifier(5, "avg")
    assert pruned(photo).shape == (2, 5)


# The classifier


def test_reset_classifier(photo):
    """New classes, new pooling; both heads."""
    model = atto(aux_head=True)
    model.reset_classifier(5)
    logits, aux = model.train()(photo)
    assert logits.shape == aux.shape == (2, 5)
    assert model.num_classes == 5
    assert model.get_classifier().out_features == model.get_classifier("aux").out_features == 5
    model.eval().reset_classifier(0, "")
    assert model(photo).shape == (2, model.head_hidden_size, 3, 2)
    model.reset_classifier(4, "max")
    assert model(photo).shape == (2, 4)


def test_auxiliary_head_comes_back(photo):
    """Gone with the classes, there again with new ones, if the network was built with it; not without what it reads."""
    for model in (atto(aux_head=True), atto(aux_head=True, num_classes=0)):
        model.reset_classifier(0)
        assert model.train()(photo).shape == (2, model.head_hidden_size)
        assert model.get_classifier("aux") is None
        model.reset_classifier(5)
        assert [y.shape for y in model.train()(photo)] == [(2, 5), (2, 5)]
    plain = atto()
    plain.reset_classifier(0)
    plain.reset_classifier(5)
    assert plain.train()(photo).shape == (2, 5)
    pruned = atto(aux_head=True)
    pruned.prune_intermediate_layers([1])
    pruned.reset_classifier(5, "avg")
    assert pruned.train()(photo).shape == (2, 5)


def test_what_cannot_be_reset_is_refused():
    """And the model stays as it is."""
    model = atto(num_classes=7)
    for arguments in ((-1,), (3, "catavgmax"), (2.5,)):
        with pytest.raises(ValueError, match=r"num_classes|global_pool"):
            model.reset_classifier(*arguments)
    assert model.num_classes == model.get_classifier().out_features == 7
    with pytest.raises(ValueError, match="'auxiliary'"):
        model.get_classifier("auxiliary")


@pytest.mark.parametrize("global_pool", ["avg", "max", "avgmax", ""])
def test_reset_classifier_keeps_the_pooling(global_pool, photo):
    """Unless another is named."""
    model = atto(global_pool=global_pool).eval()
    model.reset_classifier(3)
    assert model(photo).shape == ((2, 3) if global_pool else (2, 3, 3, 2))
    assert type(model.head.global_pool.pool) is type(atto(global_pool=global_pool).head.global_pool.pool)


def test_reset_classifier_keeps_the_rest():
    """Type, device, mode, what is frozen, and every other weight."""
    model = atto(aux_head=True, dtype=torch.float64).eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not HEADS.match(name)}
    model.reset_classifier(3)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(child.training for child in model.modules())
    fresh = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.fc.weight", "head.fc.bias", "aux_head.fc.weight", "aux_head.fc.bias"} <= fresh
    assert all(name.startswith(("head.fc.", "aux_head.")) for name in fresh)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = atto(device="meta")
    moved.reset_classifier(3)
    assert {p.device.type for p in moved.parameters()} == {"meta"}


# Training


@pytest.mark.parametrize("features", [False, True])
def test_grad_checkpointing(features):
    """The same outputs, gradients and running statistics, recomputed; every block is."""
    x, results = images(2, 3, 64, 64), []
    for enable in (False, True):
        model = randomise(atto(features_only=True) if features else atto(num_classes=3)).train()
        model.set_grad_checkpointing(enable)
        calls = []
        inner = model.model if features else model
        for block in [b for n, b in inner.named_modules() if n.split(".")[-2:-1] == ["blocks"]]:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        outputs = model(x)
        first = len(calls)
        sum(y.square().mean() for y in outputs).backward()
        assert first == sum(inner.variant.depths)
        assert len(calls) == (2 if enable else 1) * first
        results.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    assert len(results[0]) == len(results[1])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    """Of all variants' blocks, in training with the auxiliary head."""
    for name in ("overlock_atto", "overlock_nano"):
        model = timm.create_model(name, aux_head=True, num_classes=3).train()
        logits, aux = model(images(2, 3, 32, 32))
        (logits.square().mean() + aux.square().mean()).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ["overlock_atto", "overlock_xt", "overlock_t"])
def test_layer_decay(name):
    """Learning rates rise from the stem to the head: base, overview, focus, head; every parameter once."""
    model = meta(name, aux_head=True)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))

    def scale_of(module):
        found = {scale[id(p)] for p in module.parameters()}
        return min(found), max(found)

    order = [
        model.base_net.stages[0].embed, model.base_net.stages[0].blocks[-1], model.base_net.stages[2].blocks[-1],
        model.overview_net.stage.blocks[-1], model.focus_net.stage3.blocks[0], model.focus_net.stage3.blocks[-1],
        model.focus_net.stage4.blocks[-1], model.head,
    ]  # fmt: skip
    scales = [scale_of(module) for module in order]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(scales))
    assert scales[-1] == (1.0, 1.0)


def test_coarse_groups():
    """The coarse matcher covers every parameter too."""
    model = meta("overlock_atto", aux_head=True)
    grouped = group_parameters(model, model.group_matcher(coarse=True))
    assert sum(len(names) for names in grouped.values()) == len(list(model.parameters()))


def test_weight_decay_spares_scales_and_biases():
    """The optimiser decays matrices and kernels alone: nothing one-dimensional."""
    model = atto(aux_head=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in spared) == (p.dim() <= 1 or name in model.no_weight_decay()), name


def test_sync_batch_norm(photo):
    """timm's and PyTorch's conversion of the batch norms keeps the outputs."""
    model = randomise(atto(num_classes=3))
    expected, norms = model(photo), sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for convert in (convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
        converted = convert(randomise(atto(num_classes=3))).eval()
        assert sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules()) == norms
        torch.testing.assert_close(converted(photo), expected)
        assert relative_error(overlock.fuse(converted)(photo), expected) < 1e-4
