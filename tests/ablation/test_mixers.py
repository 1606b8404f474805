"""Table 7: the figures that the paper prints, each mixer against plain sums, and the frame that they stand in."""

from __future__ import annotations

import doctest

import mixer_references
import pytest
import timm
import torch
from helpers import images, randomise, relative_error
from test_roadmap import train
from torch import nn

import overlock
from overlock.ablation import MIXERS, add_mixer, models
from overlock.analysis import count_network

ROWS = list(MIXERS)
DETERMINED = ("window", "natten", "volo", "dcnv3", "contmix")
USUAL = dict(dyconv=(1.83, 12.52), odconv=(1.83, 12.42), involution=(1.99, 12.69))
"""What the others come to at their papers' own settings, in G and M: docs/ablations.md says why."""


def small(row: str, **kwargs) -> nn.Module:
    return timm.create_model(f"overlock_mixer_{row}", **{"size": "small", "num_classes": 4, **kwargs})


@pytest.mark.parametrize("row", ROWS)
def test_figures_of_the_paper(row):
    model = timm.create_model(f"overlock_mixer_{row}", device="meta", deploy=True).eval()
    cost, paper = count_network(model), MIXERS[row].paper
    macs, params = cost.macs / 1e9, cost.params / 1e6
    if row in DETERMINED:
        assert macs == pytest.approx(paper.macs, rel=0.025)
        assert params == pytest.approx(paper.params, rel=0.005)
    else:
        assert (round(macs, 2), round(params, 2)) == USUAL[row]


def mixer_of(row: str, block: int) -> nn.Module:
    """The mixer of stage 2 or, for an odd block, of the second block of stage 3, in float64."""
    network = randomise(small(row))
    mixer = (network.stages[2].blocks[1] if block else network.stages[1].blocks[0]).mixer
    if row == "window":
        mixer.attention.init_non_persistent_buffers()  # places in its table, no longer those once drawn at random
    return mixer.double()


@pytest.mark.parametrize(
    ("row", "block", "size"),
    [(row, 0, (9, 8)) for row in ROWS] + [("window", 1, (9, 15)), ("window", 1, (7, 14)), ("natten", 0, (5, 8))],
)
def test_against_plain_sums(row, block, size):
    """Values, and the gradients of the input and of every parameter."""
    mixer = mixer_of(row, block)
    channels = (64, 128)[block]
    x = images(2, channels, *size).double().requires_grad_()
    inputs = [x, *mixer.parameters()]
    results = []
    for forward in (mixer, lambda x: getattr(mixer_references, row)(mixer, x)):
        y = forward(x)
        weights = images(*y.shape).double()
        results.append((y, torch.autograd.grad((y * weights).sum(), inputs, materialize_grads=True)))
    (y, gradients), (expected, expected_gradients) = results
    assert relative_error(y, expected) < 1e-10
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() <= 1e-9 * max(1.0, wanted.abs().max())


def test_windows_are_shifted_in_every_second_block():
    shifts = [block.mixer.shift for block in small("window").stages[2].blocks]
    assert shifts == [0, 3]


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if row in ("contmix", "dcnv3") else ()) for row in ROWS]
)
def test_learns(row):
    """A few steps lower the loss, and all parameters take part."""
    torch.manual_seed(0)
    model = small(row)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_fused(row):
    """The inference copy gives the same logits, for images of any size."""
    model = randomise(small(row))
    for x in (images(1, 3, 64, 96), images(1, 3, 32, 32)):
        assert relative_error(overlock.fuse(model)(x), model(x)) < 1e-4


def test_mixers_begin_alike():
    """All but the mixers."""
    states = []
    for row in ("dyconv", "natten"):
        torch.manual_seed(1)
        states.append({name: x for name, x in small(row).state_dict().items() if ".mixer." not in name})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


@torch.no_grad()
def test_the_frame_as_a_backbone():
    """Features, classifier, pooling, rates, gradient checkpointing, refusals."""
    model, x = randomise(small("involution", in_chans=1, drop_path_rate=0.2, drop_rate=0.1)), images(2, 1, 64, 96)
    last, features = model.forward_intermediates(x)
    assert torch.equal(model.forward_head(last), model(x))
    for info, feature, stride in zip(model.feature_info, features, (4, 8, 16, 32), strict=True):
        assert feature.shape == (2, info["num_chs"], 64 // stride, 96 // stride)
    part = small("involution", in_chans=1, features_only=True, out_indices=(0, 3)).eval()
    part.model.load_state_dict(model.state_dict(), strict=False)
    assert all(torch.equal(a, b) for a, b in zip(part(x), (features[0], features[3]), strict=True))
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    model.set_grad_checkpointing()
    with torch.enable_grad():
        model.train()(x).sum().backward()
    for wrong in (dict(size="tiny"), dict(drop_path_rate=1.0), dict(stem_stride=3)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            small("volo", **wrong)


def test_one_of_ones_own():
    """The example of the documentation, and names that will not do."""
    try:
        results = doctest.DocTestRunner(verbose=False)
        for test in doctest.DocTestFinder().find(add_mixer, globs=vars(models) | {"timm": timm, "torch": torch}):
            results.run(test)
        assert results.summarize(verbose=False) == (0, 3)
        assert "overlock_mixer_pooling" in timm.list_models("overlock_mixer_*")
        with pytest.raises(ValueError, match="there is a mixer 'pooling' already"):
            add_mixer("pooling", lambda channels, _: nn.Identity())
        with pytest.raises(ValueError, match="name must be letters"):
            add_mixer("my pooling", lambda channels, _: nn.Identity())
    finally:
        MIXERS.pop("pooling", None)
