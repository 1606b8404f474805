"""fuse(model, precision="bf16"): values of whole parts, and where it cannot run.

Processors without AVX-512 BF16 sum the same products by other instructions, so that values are tested everywhere.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from helpers import images, randomise
from torch import nn
from torch.nn.utils import parametrize

import overlock
from overlock.blocks import BasicBlock, ContMixBlock, DynamicBlock
from overlock.fused import conditions
from overlock.fused.flat_parameters import Packed
from overlock.kernels.numba import simd
from overlock.network.base_net import Stem

# Four channels a group: then the scale of the queries is a half, and scaled weights round as the others do.
PARTS = {
    "basic": (lambda: BasicBlock(24, kernel_size=7, scaled=True), [(2, 24, 14, 9)]),
    "dynamic": (
        lambda: DynamicBlock(24, 20, groups=6, kernel_size=7),
        [(2, 24, 14, 9), (2, 20, 14, 9), (2, 20, 14, 9)],
    ),
    "plug-in": (lambda: ContMixBlock(24, groups=6, kernel_size=7, small_kernel=None), [(2, 24, 14, 9)]),
    "stem": (lambda: Stem(5, 24, 4), [(2, 5, 33, 26)]),
}


HIGH = lambda: BasicBlock(20, kernel_size=3), [(2, 20, 50, 5)]  # product and filter are one kernel there


@pytest.fixture(autouse=True)
def _anywhere(monkeypatch):
    """As on a processor with AVX-512 BF16."""
    monkeypatch.setattr("overlock.fused.fuse.why_not_bf16", lambda: None)


class Rounded(nn.Module):
    def forward(self, x):
        return x.bfloat16().to(x.dtype)


def round_products(folded):
    """The same module in float64, whose convolutions of all channels round what they take; not of squeeze-excite."""
    for name, layer in folded.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and "se." not in name:
            parametrize.register_parametrization(layer, "weight", Rounded())
            layer.register_forward_pre_hook(lambda _, given: tuple(x.bfloat16().double() for x in given))
    return folded


def joined(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else torch.cat(outputs, dim=1)


def mean_error(actual, expected):
    """Root of the mean square, over the deviation of what is expected."""
    return float((actual.double() - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("part", [*PARTS, pytest.param("high basic", marks=pytest.mark.slow)])
@torch.no_grad()
def test_products_alone_are_rounded(part):
    """Against the folded layers in float64, with and without the rounding."""
    build, shapes = HIGH if part == "high basic" else PARTS[part]
    block, inputs = randomise(build()), [images(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = joined(overlock.fuse(block, precision="bf16")(*inputs))
    whole = overlock.fuse(block.double(), kernels=False)
    doubles = [x.double() for x in inputs]
    exact = joined(whole(*doubles))
    expected = joined(round_products(whole)(*doubles))
    assert mean_error(found, expected) < 0.3 * mean_error(expected, exact)
    assert 5e-4 < mean_error(found, exact) < 2e-2


@torch.no_grad()
def test_a_network():
    """Its logits are nearer to those in float64 than a network in bfloat16 throughout has them."""
    model, x = randomise(timm.create_model("overlock_atto", num_classes=100)), images(2, 3, 65, 64)
    fused = overlock.fuse(model, precision="bf16")
    found, usual = fused(x), overlock.fuse(model)(x)
    exact = copy.deepcopy(model).double()(x.double())
    plain = model.bfloat16()(x.bfloat16())
    assert found.dtype == torch.float32
    assert mean_error(usual, exact) < 1e-5
    assert 1e-4 < mean_error(found, exact) < mean_error(plain, exact)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fused))(x), found, rtol=0, atol=0)


@torch.no_grad()
def test_both_precisions_of_the_same_parameters():
    """What is prepared for one is not taken for the other."""
    block, x = randomise(BasicBlock(24, kernel_size=7)), images(2, 24, 14, 9)
    fused = overlock.fuse(block)
    usual = fused(x)
    fused.in_bf16 = True
    assert not torch.equal(fused(x), usual)
    fused.in_bf16 = False
    torch.testing.assert_close(fused(x), usual, rtol=0, atol=0)


def test_only_where_asked_for():
    block = BasicBlock(8, kernel_size=7)
    assert not any(part.in_bf16 for part in overlock.fuse(block).modules() if isinstance(part, Packed))
    assert "products in bfloat16" in repr(overlock.fuse(block, precision="bf16"))


@pytest.mark.parametrize("has", [False, True])
def test_the_reason_is_said(has, monkeypatch):
    monkeypatch.setattr(simd, "HAS_BFLOAT16", has)
    reason = conditions.why_not_bf16()
    monkeypatch.setattr("overlock.fused.fuse.why_not_bf16", conditions.why_not_bf16)
    if has:
        assert reason is None
        return
    assert "no AVX-512 BF16" in reason
    with pytest.raises(ValueError, match="precision 'bf16' cannot run: this processor has no AVX-512 BF16"):
        overlock.fuse(BasicBlock(8, kernel_size=7), precision="bf16")


def test_without_numba(monkeypatch):
    monkeypatch.setattr(conditions, "numba_installed", lambda: False)
    assert conditions.why_not_bf16() == "numba is not installed"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Conv2d(3, 4, 3), dict(precision="int8"), "precision must be 'bf16' or None, got 'int8'"),
        (nn.Conv2d(3, 4, 3), dict(precision="bf16", kernels=False), "kernels=False"),
        (nn.Linear(3, 4), dict(precision="bf16"), "float32 on CPU"),
        (BasicBlock(8, kernel_size=7).bfloat16(), dict(precision="bf16"), r"model\.bfloat16\(\)"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        overlock.fuse(model, **options)
