"""Table 6: the figures that the paper prints, the contract with timm, and that every row learns."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from helpers import images, randomise, relative_error
from runs import make_images, run, settings
from torch import nn
from torch.nn import functional as F

import overlock
from overlock.ablation import ROADMAP
from overlock.analysis import count_network
from overlock.checkpoints import load_model
from overlock.training.classification import make_job

ROWS = list(ROADMAP)
LAST = ROWS[-1]


def small(row: str, **kwargs) -> nn.Module:
    return timm.create_model(f"overlock_roadmap_{row}", **{"size": "small", "num_classes": 4, **kwargs})


@pytest.mark.parametrize("row", ROWS)
def test_figures_of_the_paper(row):
    """As printed, but for XT's own, whose multiply-adds do not come out in Table 2 either."""
    model = timm.create_model(f"overlock_roadmap_{row}", device="meta", deploy=True).eval()
    cost, paper = count_network(model), ROADMAP[row].paper
    if row == LAST:
        assert cost.macs / 1e9 == pytest.approx(paper.macs, rel=0.03)
        assert cost.params / 1e6 == pytest.approx(paper.params, rel=0.005)
    else:
        assert round(cost.macs / 1e9, 1) == paper.macs
        assert round(cost.params / 1e6, 1) == paper.params


def test_the_last_row_is_the_network_itself():
    """The same class, weights by the same names, the same outputs to the bit."""
    row = timm.create_model("overlock_roadmap_gate", num_classes=3, aux_head=True)
    xt = timm.create_model("overlock_xt", num_classes=3, aux_head=True)
    assert type(row) is type(xt)
    assert row.variant == xt.variant
    xt.load_state_dict(row.state_dict())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(row.eval()(x), xt.eval()(x))


def test_rows_begin_alike():
    """Where names and shapes agree, so do the initial values of a seed; another seed gives others."""
    states = []
    for row in ROWS:
        torch.manual_seed(7)
        states.append({name: x for name, x in small(row).state_dict().items() if x.dim() > 1})
    for before, after in itertools.pairwise(states):
        common = [name for name in before.keys() & after.keys() if before[name].shape == after[name].shape]
        assert len(common) > 10
        for name in common:
            assert torch.equal(before[name], after[name]), name
    torch.manual_seed(8)
    name = "base_net.stages.0.embed.0.conv.weight"
    assert not torch.equal(small("plain").state_dict()[name], states[0][name])


def train(model: nn.Module, steps: int = 4) -> list[float]:
    """The losses on one batch, the auxiliary one among them."""
    x, labels = images(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        outputs = model.train()(x)
        logits = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(F.cross_entropy(y, labels) for y in logits)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item() / len(logits))
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if row in ("local", "gate") else pytest.mark.slow) for row in ROWS]
)
def test_learns(row):
    """A few steps lower the loss, and all parameters take part."""
    torch.manual_seed(0)
    aux = dict(aux_head=True) if ROADMAP[row].has_aux_head else {}
    model = small(row, stem_stride=2, **aux)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("row", ["plain", "se", "recurrent", "no_feed", "dynamic", "initial_prior"])
@torch.no_grad()
def test_fused(row):
    """The inference copy gives the same logits."""
    model, x = randomise(small(row)), images(1, 3, 64, 96)
    assert relative_error(overlock.fuse(model)(x), model(x)) < 1e-4


# timm's contract; of OverLoCK itself in test_timm_contract.py

BUILT = ["plain", "recurrent", "dds", "no_feed", "dynamic"]


@pytest.mark.parametrize("row", BUILT)
@torch.no_grad()
def test_features(row):
    """As described, whichever are asked for, and the last one leads to the logits."""
    model, x = randomise(small(row)), images(2, 3, 64, 96)
    last, features = model.forward_intermediates(x)
    assert torch.equal(last, features[-1])
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    for info, feature in zip(model.feature_info, features, strict=True):
        stride = info["reduction"]
        assert feature.shape == (2, info["num_chs"], 64 // stride, 96 // stride)
        assert model.get_submodule(info["module"]) is not None
    for early in range(4):
        (feature,) = model.forward_intermediates(x, [early], stop_early=True, intermediates_only=True)
        assert torch.equal(feature, features[early])
    part = small(row, features_only=True, out_indices=(1, 2)).eval()
    part.model.load_state_dict(model.state_dict(), strict=False)
    assert part.feature_info.channels() == [info["num_chs"] for info in model.feature_info[1:3]]
    for feature, expected in zip(part(x), features[1:3], strict=True):
        assert torch.equal(feature, expected)


@pytest.mark.parametrize("row", BUILT)
@torch.no_grad()
def test_arguments(row):
    """Classes, channels, pooling, rates, another classifier, checkpoints of gradients."""
    model = small(row, num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, stem_stride=1).eval()
    assert model(images(1, 1, 16, 16)).shape == (1, 7)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.2)
    model.reset_classifier(0)
    assert model(images(1, 1, 16, 16)).shape == (1, model.head_hidden_size)
    model.reset_classifier(3, "max")
    assert model(images(1, 1, 16, 16)).shape == (1, 3)
    assert model.get_classifier() is model.head.fc
    model.set_grad_checkpointing()
    with torch.enable_grad():
        model.train()(images(2, 1, 32, 32)).sum().backward()


@pytest.mark.parametrize("row", BUILT)
def test_wrong_arguments_are_refused(row):
    for wrong in (dict(size="tiny"), dict(drop_path_rate=1.0), dict(stem_stride=3), dict(num_classes=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            small(row, **wrong)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        small(row)(images(1, 3, 31, 64))
    with pytest.raises(TypeError, match="drop_path_rat"):
        small(row, drop_path_rat=0.1)


@pytest.mark.parametrize("row", ["plain", "dds", "gate"])
def test_trained_by_the_command(row, tmp_path):
    """As any other model: with the auxiliary loss from its row on, and the weights load again without its head."""
    data = make_images(tmp_path / "data", 4)
    changes = dict(model=f"overlock_roadmap_{row}", model_args={"size": "small"}, stem_stride=2, epochs=1)
    config = settings(data, tmp_path / "run", **changes)
    job = make_job(config)
    assert (getattr(job.network, "aux_head", None) is not None) == ROADMAP[row].has_aux_head
    run(config)
    network, record = load_model(tmp_path / "run")
    assert record.model_args["size"] == "small"
    assert network(images(1, 3, 32, 32)).shape == (1, 3)
