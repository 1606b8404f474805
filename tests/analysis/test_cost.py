"""Costs against the paper's tables and against a count of each layer by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overlock import VARIANTS, ContMix, OverLoCK
from overlock.analysis import DENSE_TASKS, count_cost, count_dense_cost


def by_name(model: str, **kwargs):
    return {cost.name: cost for cost in count_cost(model, **kwargs)}


PAPER = [name for name, variant in VARIANTS.items() if variant.paper]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "overlock_xt" else pytest.mark.slow) for name in PAPER]
)
def test_agrees_with_table_2(name):
    total, paper = by_name(name)["total"], VARIANTS[name].paper
    assert round(total.params / 1e6) == paper.params
    assert total.macs / 1e9 == pytest.approx(paper.macs, rel=0.03 if name == "overlock_xt" else 0.02)


@pytest.mark.parametrize(
    ("name", "mixing"), [("overlock_xt", 0.030), pytest.param("overlock_s", 0.100, marks=pytest.mark.slow)]
)
def test_mixing_is_half_of_the_channels_for_each_kernel(name, mixing):
    variant = VARIANTS[name]
    channels = variant.dims[2:]
    expected = sum(
        depth * (width // 2) * (25 + kernel**2) * side**2
        for depth, width, kernel, side in zip(
            variant.focus_depths, channels, variant.kernel_sizes[2:], (14, 7), strict=True
        )
    )
    parts = by_name(name)
    assert parts["focus_net"].mixing == expected
    assert parts["base_net"].mixing == parts["overview_net"].mixing == parts["head"].mixing == 0
    assert expected / 1e9 == pytest.approx(mixing, abs=0.001)


def count_by_hooks(network: OverLoCK, images: torch.Tensor) -> int:
    """Multiply-adds of the layers a hook sees, and the affinities and kernels of each ContMix."""
    total = 0

    def convolution(layer, inputs, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    def linear(layer, inputs, output):
        nonlocal total
        total += output.numel() * layer.in_features

    def contmix(layer, inputs, output):
        nonlocal total
        height, width = output.shape[-2:]
        tokens, regions = height * width, layer.region_grid**2
        total += tokens * regions * layer.query.conv.out_channels  # query . key
        total += layer.groups * tokens * regions * (layer.small_taps + layer.kernel_size**2)

    hooks = {nn.Conv2d: convolution, nn.Linear: linear, ContMix: contmix}
    kernels = {id(m.kernels) for m in network.modules() if isinstance(m, ContMix)}
    for module in network.modules():
        for kind, hook in hooks.items():
            if isinstance(module, kind) and id(module) not in kernels:
                module.register_forward_hook(hook)
    with torch.no_grad():
        network(images)
    return total


def test_counts_what_hooks_count():
    network = OverLoCK(VARIANTS["overlock_nano"], deploy=True).eval()
    counted = count_by_hooks(network, torch.zeros(1, 3, 352, 416))
    cost = by_name("overlock_nano", image_size=(352, 416))["total"]
    assert cost.macs == counted
    assert cost.params == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("size", [(32, 32), (33, 95), (224, 320)])
def test_any_size(size):
    costs = count_cost("overlock_atto", image_size=size, num_classes=7)
    *parts, total = costs
    assert total.name == "total"
    for field in ("params", "macs", "mixing"):
        assert getattr(total, field) == sum(getattr(part, field) for part in parts)
    assert all(part.macs > 0 for part in parts)


def test_small_maps_are_mixed_enlarged():
    """At 32 x 32 stage 3 has 2 x 2 positions, mixed as 9 x 9 (overlock_atto), and stage 4 one, mixed as 7 x 7."""
    variant = VARIANTS["overlock_atto"]
    depths, widths = variant.focus_depths, variant.dims[2:]
    expected = depths[0] * widths[0] // 2 * (25 + 81) * 81 + depths[1] * widths[1] // 2 * (25 + 49) * 49
    assert by_name("overlock_atto", image_size=(32, 32))["total"].mixing == expected


def test_refuses_what_is_unknown_or_too_small():
    with pytest.raises(ValueError, match="unknown model 'resnet18'"):
        count_cost("resnet18")
    with pytest.raises(ValueError, match="at least 32 x 32"):
        count_cost("overlock_atto", image_size=(16, 64))


DENSE = [(name, task) for name in ("overlock_t", "overlock_s", "overlock_b") for task in DENSE_TASKS]
QUICK = [("overlock_t", "mask_rcnn")]


@pytest.mark.parametrize(
    ("name", "task"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in DENSE]
)
def test_agrees_with_tables_3_to_5(name, task):
    total = count_dense_cost(name, task)[-1]
    macs, params = DENSE_TASKS[task].paper[name]
    assert total.params / 1e6 == pytest.approx(params, rel=0.015)
    assert total.macs / 1e9 == pytest.approx(macs, rel=0.015)


def test_dense_parts_add_up():
    *parts, total = count_dense_cost("overlock_atto", "cascade_mask_rcnn", image_size=(128, 96))
    assert total.macs == sum(part.macs for part in parts)
    assert [part.name for part in parts].count("mask head 3") == 1
    box, other = (part for part in parts if part.name in ("box head 1", "box head 2"))
    assert box.params == other.params > 256 * 49 * 1024


@pytest.mark.parametrize(("model", "task"), [("overlock_z", "upernet"), ("overlock_t", "uppernet")])
def test_unknown_dense_cost(model, task):
    with pytest.raises(ValueError, match="unknown"):
        count_dense_cost(model, task)
