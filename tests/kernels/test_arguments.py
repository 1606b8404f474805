"""Calls of kernels: arguments by name, checked, in a plan and directly; and what a plan does with its buffers."""

from __future__ import annotations

import pytest
import torch

from overlock.kernels.numba.arguments import FLOAT64, INT64, POINTER, STRIDES, Arguments
from overlock.kernels.numba.channel_statistics import response_scale
from overlock.kernels.numba.gemm import gemm
from overlock.kernels.numba.plan import Plan, input_buffer
from overlock.kernels.numba.runtime import run

BATCH, CHANNELS, SPLITS = 2, 5, 3


def arguments(**others):
    """Of one call of response_scale."""
    squares = torch.rand(BATCH, SPLITS, CHANNELS, generator=torch.Generator().manual_seed(0))
    return dict(
        squares=squares, weight=torch.linspace(-1, 1, CHANNELS), scale=torch.zeros(BATCH, CHANNELS), eps=0.5,
        batch=BATCH, channels=CHANNELS, splits=SPLITS,
    ) | others  # fmt: skip


def by_run(kernel, given):
    run(kernel, BATCH, **given)


def by_plan(kernel, given):
    plan = Plan()
    plan.add(kernel, BATCH, **given)
    plan.finish().run()


@pytest.fixture(params=[by_run, by_plan])
def call(request):
    return request.param


def test_names_in_any_order(call):
    given = arguments()
    call(response_scale, dict(reversed(given.items())))
    norms = given["squares"].sum(1).sqrt()
    expected = 1 + given["weight"] * norms / (norms.mean(1, keepdim=True) + given["eps"])
    torch.testing.assert_close(given["scale"], expected)


def test_missing_name(call):
    given = arguments()
    del given["weight"], given["eps"]
    with pytest.raises(TypeError, match=r"response_scale lacks eps, weight; its arguments are squares, weight, scale"):
        call(response_scale, given)


def test_unknown_name(call):
    with pytest.raises(TypeError, match="a call of response_scale has no tokens"):
        call(response_scale, arguments(tokens=4))


def test_misspelt_name(call):
    given = arguments()
    given["split"] = given.pop("splits")
    with pytest.raises(TypeError, match="response_scale lacks splits, has no split"):
        call(response_scale, given)


def test_name_given_twice():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'eps'"):
        run(response_scale, BATCH, eps=1.0, **arguments())
    with pytest.raises(TypeError, match="multiple values for keyword argument 'eps'"):
        Plan().add(response_scale, BATCH, eps=1.0, **arguments())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("squares", torch.zeros(9, dtype=torch.float64), "float32 tensor is wanted, got torch.float64"),
        ("squares", 1234, "tensor or a buffer of the plan is wanted, got int"),
        ("channels", 5.0, "integer"),
        ("channels", torch.zeros(3), "integer"),
        ("eps", "small", "float"),
    ],
)
def test_kinds(call, name, value, words):
    """An address is no number, and a number no address."""
    with pytest.raises(TypeError, match=rf"{name} of response_scale: .*{words}"):
        call(response_scale, arguments(**{name: value}))


def test_strides_are_four():
    declared = Arguments("four", dict(strides=STRIDES))
    assert declared.flatten(dict(strides=torch.empty(2, 3, 4, 5).stride())) == [60, 20, 5, 1]
    with pytest.raises(TypeError, match="strides of four: four strides are wanted, got 3"):
        declared.flatten(dict(strides=(1, 2, 3)))


def test_records_have_the_fields_in_order():
    """A kernel reads by name where Python writes in this order."""
    declared = Arguments("some", dict(x=POINTER, strides=STRIDES, eps=FLOAT64, count=INT64))
    offsets = {
        name: declared.record_type.offset(name) for name in ("function", "tasks", "x", "strides", "eps", "count")
    }
    assert list(offsets.values()) == [0, 8, 16, 24, 56, 64]
    assert declared.layout.size == declared.record_type.size == 72
    assert gemm.arguments.layout.size == gemm.arguments.record_type.size


def test_buffers_are_used_again():
    plan = Plan()
    first = plan.alloc(3, 5)
    with plan.scratch():
        inside = plan.alloc(100)
    after = plan.alloc(7)
    assert inside == after != first
    assert plan.peak * 4 == 64 + 448  # whole lines of the cache
    assert first + 2 == (first.base, first.offset + 8)


def test_buffers_of_inputs_and_workspace():
    given = arguments()
    plan = Plan()
    between = plan.alloc(BATCH, CHANNELS)
    plan.add(response_scale, BATCH, **given | dict(scale=between))
    plan.add(response_scale, BATCH, **given | dict(squares=between, scale=input_buffer(0), splits=1))
    out = torch.zeros(BATCH, CHANNELS)
    plan.finish().run(out)
    by_run(response_scale, given)
    last = arguments(squares=given["scale"], splits=1)
    by_run(response_scale, last)
    assert torch.equal(out, last["scale"])
