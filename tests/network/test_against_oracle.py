"""The whole network with random weights against the slow implementation, in float64."""

from __future__ import annotations

import oracle
import pytest
import timm
import torch
from helpers import images, randomise, relative_error

import overlock
from overlock.weights import to_official

STEMS = {4: (2, 1, 2, 1), 2: (2, 1, 1, 1), 1: (1, 1, 1, 1)}
SIZES = [(32, 32), (33, 47), (97, 64), (160, 160), (224, 224)]
MARK = 1e-10


@pytest.fixture(scope="module")
def model():
    return randomise(timm.create_model("overlock_atto", aux_head=True, num_classes=10).double())


@pytest.fixture(scope="module")
def state(model):
    return to_official(model.state_dict())


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_logits_and_features(size, model, state):
    """Logits, auxiliary logits and the four features, over sizes with and without enlarged maps."""
    x = images(2 if size[0] < 100 else 1, 3, *size, dtype=torch.float64)
    maps, overview = oracle.features(state, x)
    logits = oracle.logits(state, maps[3])
    last, intermediates = model.forward_intermediates(x)
    for actual, expected in zip(intermediates, maps, strict=True):
        assert relative_error(actual, expected) < MARK
    assert torch.equal(last, intermediates[3])
    assert relative_error(model(x), logits) < MARK
    assert relative_error(model.forward_head(model.forward_features(x)), logits) < MARK
    assert relative_error(overlock.fuse(model)(x), logits) < MARK
    assert (
        relative_error(model.aux_head(model.overview_net(model.base_net(x)[-1])[0]), oracle.aux_logits(state, overview))
        < MARK
    )


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 97)])
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_stem_strides(stride, size):
    """The same network behind a finer stem."""
    model = randomise(timm.create_model("overlock_atto", stem_stride=stride, num_classes=10).double())
    x = images(1, 3, *(s * stride // 2 for s in size), dtype=torch.float64)
    maps, _ = oracle.features(to_official(model.state_dict()), x, STEMS[stride])
    for actual, expected in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        assert relative_error(actual, expected) < MARK
    assert relative_error(model(x), oracle.logits(to_official(model.state_dict()), maps[3])) < MARK


@pytest.mark.parametrize("size", [(33, 47), (160, 160), (97, 64)])
@pytest.mark.parametrize("overview", [False, True])
@torch.no_grad()
def test_dense_backbone(overview, size):
    """The four normed features, with and without the overview on the last."""
    model = randomise(overlock.Pyramid(timm.create_model("overlock_atto"), overview=overview).double())
    state = to_official(model.state_dict(), kind="pyramid")
    x = images(1, 3, *size, dtype=torch.float64)
    expected = oracle.dense(state, *oracle.features(state, x))
    for outputs in (model(x), overlock.fuse(model)(x)):
        for actual, wanted in zip(outputs, expected, strict=True):
            assert relative_error(actual, wanted) < MARK


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [(14, 14), (5, 9), (9, 6)])
@torch.no_grad()
def test_stand_alone_block(scaled, size):
    """The plug-in block."""
    block = randomise(overlock.ContMixBlock(16, groups=2, scaled=scaled).double())
    x = images(2, 16, *size, dtype=torch.float64)
    expected = oracle.contmix_block(to_official(block.state_dict(), kind="block"), x)
    assert relative_error(block(x), expected) < MARK
    assert relative_error(overlock.fuse(block)(x), expected) < MARK


@torch.no_grad()
def test_larger_variant():
    """Other depths, groups and kernels (XT's are held to the released outputs)."""
    model = randomise(timm.create_model("overlock_nano").double())
    state = to_official(model.state_dict())
    x = images(1, 3, 64, 96, dtype=torch.float64)
    assert relative_error(model(x), oracle.logits(state, oracle.features(state, x)[0][3])) < MARK


@torch.no_grad()
def test_merged_form():
    """Built merged, with weights of its own."""
    merged = randomise(timm.create_model("overlock_atto", deploy=True, num_classes=10).double())
    state = to_official(merged.state_dict())
    x = images(1, 3, 64, 64, dtype=torch.float64)
    assert relative_error(merged(x), oracle.logits(state, oracle.features(state, x)[0][3])) < MARK


def test_gradients_of_all_parameters():
    """Autograd through the network and through the loops agree, in evaluation, enlarged maps included."""
    model = randomise(timm.create_model("overlock_atto", num_classes=3).double())
    state = {name: tensor.clone() for name, tensor in to_official(model.state_dict()).items()}
    parameters = to_official(dict(model.named_parameters()))
    for name in parameters:
        state[name].requires_grad_()
    x = images(1, 3, 64, 40, dtype=torch.float64)
    cotangent = images(1, 3, seed=1, dtype=torch.float64)
    model(x).backward(cotangent)
    oracle.logits(state, oracle.features(state, x)[0][3]).backward(cotangent)
    ours = to_official({name: parameter.grad for name, parameter in model.named_parameters()})
    for name in parameters:
        scale = state[name].grad.abs().max()
        assert (ours[name] - state[name].grad).abs().max() <= 1e-9 * scale + 1e-12, name
