"""Derivatives beyond the first, in forward mode and by torch.func, of every operator: against the same call in float64.

What they are held to is the plain form in float64, in float32 and where the operator runs by its kernels.
"""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from calls import make_inputs
from torch import func
from torch.autograd import forward_ad
from torch.nn import functional as F

from overlock.fused import layer_operators
from overlock.kernels.torch import depthwise as plain
from overlock.kernels.torch import grn as grn_plain
from overlock.ops import backend

OPERATORS = torch.ops.overlock
# The modules, whose functions of the same names hide them.
contmix, depthwise, residual_depthwise, grn = (
    importlib.import_module(f"overlock.ops.{name}") for name in ("contmix", "depthwise", "residual_depthwise", "grn")
)


def normal(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def mixing(**options):
    return [x for x in make_inputs(batch=2, **options).values() if x is not None]


def bare(call):
    """Without biases."""
    return lambda query, key, value, weight: call(query, key, value, weight, None, None, 5, 5)


IMAGES = (2, 4, 6, 7)
# Operator, plain form, inputs.
CASES = {
    "depthwise": (
        lambda *a: OPERATORS.depthwise_conv2d(*a, 1),
        lambda *a: plain.convolve(*a, 1),
        normal(IMAGES, (4, 1, 5, 5), (4,)),
    ),
    "dilated": (
        lambda x, w: OPERATORS.depthwise_conv2d(x, w, None, 2),
        lambda x, w: plain.convolve(x, w, None, 2),
        normal(IMAGES, (4, 1, 3, 3)),
    ),
    "local_conv": (
        lambda *a: OPERATORS.local_conv(*a, True),
        lambda *a: plain.local_conv(*a, True),
        normal(IMAGES, (4, 1, 3, 3), (4,)),
    ),
    "response_norm": (
        lambda *a: OPERATORS.global_response_norm(*a, 1e-6),
        lambda *a: grn_plain.twice_differentiable(*a, 1e-6),
        normal(IMAGES, (4,), (4,)),
    ),
    "contmix": (
        lambda *a: OPERATORS.contmix(*a, 3, 0),
        lambda *a: contmix._mix_plainly(*a, 3, 0),
        mixing(),
    ),
    "contmix of an enlarged map": (
        bare(OPERATORS.contmix),
        bare(contmix._mix_plainly),
        mixing(kernel_size=5, height=3, bias=False, rpb=False),
    ),
    "region_centres": (
        lambda x: OPERATORS.region_centres(x, 3, 7),
        lambda x: contmix._centres_forward(x, 3, 7),
        normal((2, 4, 5, 9)),
    ),
    "linear of the fused network": (OPERATORS.linear, F.linear, normal((2, 6, 7, 4), (5, 4), (5,))),
    "depthwise of the fused network": (
        lambda *a: OPERATORS.depthwise(*a, True),
        lambda *a: layer_operators._filter(*a, True),
        normal(IMAGES, (3, 3, 4), (4,)),
    ),
}


def scalar(call):
    return lambda *inputs: call(*inputs).square().sum() + call(*inputs).sin().sum()


def each(inputs):
    return tuple(range(len(inputs)))


def tangents(inputs):
    return tuple(0.5 - x for x in inputs)


def of_penalty(call, inputs, order=2):
    """The gradient of a gradient's square, as a gradient penalty's; of a third order the same again."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = scalar(call)(*inputs)
    for _ in range(order - 1):
        gradients = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        value = sum(x.square().mean() for x in gradients)
    return torch.autograd.grad(value, inputs)


def of_dual(call, inputs):
    """Forward mode, of the result and of the gradients."""
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(x.clone().requires_grad_(), t) for x, t in zip(inputs, tangents(inputs), strict=True)
        ]
        results = [call(*dual), *torch.autograd.grad(scalar(call)(*dual), dual)]
        return [forward_ad.unpack_dual(x).tangent for x in results]


def of_dual_without_gradients(call, inputs):
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents(inputs), strict=True)]
        return [forward_ad.unpack_dual(call(*dual)).tangent]


def forward_over_reverse(call, inputs):
    return func.jvp(func.grad(scalar(call), each(inputs)), tuple(inputs), tangents(inputs))[1]


def reverse_over_reverse(call, inputs):
    return func.vjp(func.grad(scalar(call), each(inputs)), *inputs)[1](tangents(inputs))


def reverse_over_forward(call, inputs):
    return func.grad(lambda *x: func.jvp(scalar(call), x, tangents(inputs))[1], each(inputs))(*inputs)


def vmapped_gradients(call, inputs):
    def gradients(scale):
        return func.grad(scalar(call), each(inputs))(*[scale * x for x in inputs])

    return func.vmap(gradients)(torch.tensor([0.5, 1.0, 2.0]).to(inputs[0]))


DERIVATIVES = {
    "second": of_penalty,
    "third": lambda call, inputs: of_penalty(call, inputs, order=3),
    "forward mode": of_dual,
    "forward mode without gradients": of_dual_without_gradients,
    "func.jvp": lambda call, inputs: func.jvp(call, tuple(inputs), tangents(inputs)),
    "func.grad": lambda call, inputs: func.grad(scalar(call), each(inputs))(*inputs),
    "forward over reverse": forward_over_reverse,
    "reverse over reverse": reverse_over_reverse,
    "reverse over forward": reverse_over_forward,
    "hessian": lambda call, inputs: [func.hessian(scalar(call), len(inputs) - 1)(*inputs)],
    "jacrev": lambda call, inputs: [func.jacrev(lambda *x: call(*x)[0, 0], len(inputs) - 1)(*inputs)],
    "jacfwd": lambda call, inputs: [func.jacfwd(lambda *x: call(*x)[0, 0], len(inputs) - 1)(*inputs)],
    "vmap of grad": vmapped_gradients,
}

cases = pytest.mark.parametrize("case", CASES)


def check(actual, expected):
    assert len(actual) == len(expected)
    for ours, wanted in zip(actual, expected, strict=True):
        assert wanted.abs().max() > 0
        assert ours.dtype == torch.float32
        assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@cases
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives(case, derivative):
    """In float32, as the plain form's in float64; and not a warning."""
    call, plain, inputs = CASES[case]
    derive = DERIVATIVES[derivative]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered")
        actual = derive(call, [x.float() for x in inputs])
    check(actual, derive(plain, inputs))


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_second_derivatives_of_other_backends(name):
    call, plain, inputs = CASES["contmix"]
    with backend(name):
        check(of_penalty(call, [x.float() for x in inputs]), of_penalty(plain, inputs))


@pytest.mark.parametrize("case", ["contmix", "depthwise", "local_conv", "response_norm"])
def test_numerically(case):
    """In float64, where the operator has kernels of its own or not: differences of gradients."""
    call, _, inputs = CASES[case]
    inputs = [x[:1] if x.dim() > 3 and x.shape[0] == 2 else x for x in inputs]
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)


def test_a_map_of_zeros_gives_finite_derivatives():
    """Its norm has a corner there, where the first derivative is taken as zero, and so are the others."""
    call, _, (x, weight, bias) = CASES["response_norm"]
    x = x.float()
    x[0, 1] = 0
    assert all(y.isfinite().all() for y in of_penalty(call, [x, weight.float(), bias.float()]))


@pytest.mark.parametrize("case", [pytest.param("contmix", marks=pytest.mark.slow), "response_norm", "region_centres"])
def test_second_derivatives_of_bfloat16(case):
    """Of the operators that run in it on CPU."""
    call, plain, inputs = CASES[case]
    inputs = [x.bfloat16() for x in inputs]
    for actual, expected in zip(of_penalty(call, inputs), of_penalty(plain, [x.double() for x in inputs]), strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in ("contmix of an enlarged map", "region_centres") else ())
        for case in CASES
    ],
)
@pytest.mark.parametrize("derivative", ["forward over reverse", "reverse over reverse", "func.jvp"])
def test_compiled(case, derivative):
    """In one graph."""
    call, plain, inputs = CASES[case]
    derive = DERIVATIVES[derivative]
    compiled = torch.compile(lambda *x: derive(call, x), fullgraph=True, backend="aot_eager")
    check(compiled(*[x.float() for x in inputs]), derive(plain, inputs))
    torch.compiler.reset()


def test_a_compiled_call_refuses_second_derivatives():
    """Which PyTorch has not for what it compiles, and says so."""
    call, _, inputs = CASES["depthwise"]
    with pytest.raises(RuntimeError, match="double backward"):
        of_penalty(torch.compile(call, backend="aot_eager"), [x.float() for x in inputs])
    torch.compiler.reset()


@pytest.mark.parametrize("case", [case for case in CASES if "fused" not in case])
def test_first_order_training_takes_the_kernels(case, monkeypatch):
    """Also with create_graph: the plain form runs when its gradients are asked for, not before."""
    call, _, inputs = CASES[case]
    ran = []
    monkeypatch.setattr(torch.func, "vjp", lambda *_: ran.append(1))
    inputs = [x.float().requires_grad_() for x in inputs]
    torch.autograd.grad(scalar(call)(*inputs), inputs, create_graph=True)
    scalar(call)(*inputs).backward()
    assert not ran
