"""Inputs that do not fit are refused in one sentence, by every operator, before a kernel could read beyond them."""

from __future__ import annotations

import pytest
import torch
from calls import make_inputs

from overlock.ops import contmix, depthwise_conv2d, local_conv, region_centres, response_norm

FILTER = {
    "rank of x": ({"x": torch.zeros(8, 5, 6)}, r"x of NAME must be \(B, C, H, W\); got \(8, 5, 6\)"),
    "channels": ({"x": torch.zeros(1, 7, 5, 6)}, r"weight of NAME must be \(C, 1, K, K\) with C = 7; got \(8, 1"),
    "a dense filter": ({"weight": torch.zeros(8, 8, 3, 3)}, r"weight of NAME must be \(C, 1, K, K\)"),
    "not square": ({"weight": torch.zeros(8, 1, 3, 5)}, "weight of NAME must be"),
    "an even filter": ({"weight": torch.zeros(8, 1, 4, 4)}, "weight of NAME must have an odd K"),
    "bias": ({"bias": torch.zeros(4)}, r"bias of NAME must be \(C\) with C = 8; got \(4,\)"),
    "whole numbers": ({"x": torch.zeros(1, 8, 5, 6, dtype=torch.int64)}, "floating-point type; got int64"),
    "weights of whole numbers": ({"weight": torch.zeros(8, 1, 3, 3, dtype=torch.int32)}, "weight of NAME must be of a"),
    "types": ({"weight": torch.zeros(8, 1, 3, 3, dtype=torch.float64)}, "must be float32 as x is; got float64"),
    "devices": ({"bias": torch.zeros(8, device="meta")}, "must be on cpu as x is; it is on meta"),
}  # fmt: skip
CONTMIX = {
    "rank of query": ({"query": torch.zeros(1, 2, 6, 7)}, r"query of contmix must be \(B, G, D, H, W\)"),
    "key": ({"key": torch.zeros(1, 2, 4, 4)}, r"key of contmix must be \(B, G, D, S\^2\) with B = 1, G = 2, D = 3"),
    "value": ({"value": torch.zeros(1, 2, 2, 6, 6)}, "value of contmix must be .* with B = 1, G = 2, H = 6, W = 7"),
    "weight": ({"weight": torch.zeros(9, 5)}, r"weight of contmix must be \(K\^2, S\^2\) with K\^2 = 9, S\^2 = 4"),
    "bias": ({"bias": torch.zeros(8)}, r"bias of contmix must be \(K\^2\) with K\^2 = 9; got \(8,\)"),
    "rpb": ({"rpb": torch.zeros(2, 3, 3)}, r"rpb of contmix must be \(G, 2K-1, 2K-1\) with G = 2, 2K-1 = 5"),
    "kernel_size": ({"kernel_size": 0}, "kernel_size of contmix must be at least 1; got 0"),
    "min_side": ({"min_side": -1}, "min_side of contmix must be at least 0"),
    "whole numbers": ({"value": torch.zeros(1, 2, 2, 6, 7, dtype=torch.int64)}, "value of contmix must be of a"),
    "devices": ({"rpb": torch.zeros(2, 5, 5, device="meta")}, "rpb of contmix must be on cpu"),
}  # fmt: skip
NORM = {
    "rank of x": ({"x": torch.zeros(8, 5)}, r"x of response_norm must be \(B, C, H, W\)"),
    "weight": ({"weight": torch.zeros(1, 8, 1, 1)}, r"weight of response_norm must be \(C\) with C = 8"),
    "bias": ({"bias": torch.zeros(9)}, "bias of response_norm must be"),
    "whole numbers": ({"weight": torch.zeros(8, dtype=torch.int64)}, "weight of response_norm must be of a floating"),
    "devices": ({"weight": torch.zeros(8, device="meta")}, "weight of response_norm must be on cpu"),
}
CENTRES = {
    "rank": ({"context": torch.zeros(8, 5, 6)}, r"context of region_centres must be \(B, C, H, W\)"),
    "whole numbers": ({"context": torch.zeros(1, 8, 5, 6, dtype=torch.int64)}, "floating-point type"),
    "no regions": ({"region_grid": 0}, "region_grid of region_centres must be at least 1"),
}


def filter_inputs():
    return {"x": torch.ones(2, 8, 5, 6), "weight": torch.ones(8, 1, 3, 3), "bias": torch.ones(8)}


OPERATORS = {
    "depthwise_conv2d": (
        depthwise_conv2d, lambda: filter_inputs() | {"dilation": 1},
        FILTER | {"dilation": ({"dilation": 0}, "dilation of NAME must be at least 1")},
    ),
    "local_conv": (local_conv, lambda: filter_inputs() | {"gelu": True}, FILTER),
    "response_norm": (response_norm, lambda: filter_inputs() | {"weight": torch.ones(8), "eps": 1e-6}, NORM),
    "region_centres": (region_centres, lambda: {"context": torch.ones(1, 8, 5, 6), "region_grid": 3}, CENTRES),
    "contmix": (
        contmix, lambda: make_inputs(dtype=torch.float32) | {"kernel_size": 3, "min_side": 0}, CONTMIX,
    ),
}  # fmt: skip
CASES = [(name, case) for name, (_, _, cases) in OPERATORS.items() for case in cases]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_refused(name, case, training):
    """In evaluation and where kernels for training would run, by the public function."""
    function, make, cases = OPERATORS[name]
    change, message = cases[case]
    inputs = make() | change
    if training:
        inputs = {
            key: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for key, x in inputs.items()
        }
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        function(**inputs)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_refused_by_the_operator(name, case):
    """And by what graphs call."""
    _, make, cases = OPERATORS[name]
    change, message = cases[case]
    operator = getattr(torch.ops.overlock, {"response_norm": "global_response_norm"}.get(name, name))
    with pytest.raises(ValueError, match=message.replace("NAME", name)):
        operator(*(make() | change).values())


@pytest.mark.parametrize("name", OPERATORS)
def test_right_inputs_pass(name):
    """What the cases above change is all that was wrong with them."""
    function, make, _ = OPERATORS[name]
    assert function(**make()).isfinite().all()


@pytest.mark.parametrize("name", ["depthwise_conv2d_input_gradient", "depthwise_conv2d_weight_gradient"])
def test_gradients_of_another_shape_are_refused(name):
    """By the operators of the gradients."""
    x, weight, _ = filter_inputs().values()
    with pytest.raises(ValueError, match="gradient given to depthwise_conv2d"):
        getattr(torch.ops.overlock, name)(x[:1], x, weight, 1, "auto")


@pytest.mark.parametrize("name", ["local_conv", "response_norm", "region_centres", "contmix"])
def test_gradients_of_another_shape_are_refused_too(name):
    """By those that one declaration makes."""
    _, make, _ = OPERATORS[name]
    operator = {"response_norm": "global_response_norm"}.get(name, name)
    with pytest.raises(ValueError, match="gradient given to"):
        getattr(torch.ops.overlock, f"{operator}_backward")(torch.ones(2, 3), "auto", *make().values())


def test_autocast_takes_mixed_types():
    """It casts them."""
    x, weight, bias = filter_inputs().values()
    with torch.autocast("cpu", torch.bfloat16):
        assert local_conv(x.bfloat16(), weight, bias).dtype == torch.bfloat16
        assert depthwise_conv2d(x.bfloat16(), weight.requires_grad_(), bias).dtype == torch.bfloat16
