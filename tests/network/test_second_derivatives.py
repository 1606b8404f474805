"""Second derivatives and forward mode of a whole network, in float32 against float64; and of the fused one's input."""

from __future__ import annotations

import pytest
import torch
from helpers import images, randomise, relative_error, tiny
from torch import func
from torch.autograd import forward_ad
from torch.export import export

import overlock


def make(form):
    """A network in float32."""
    model = randomise(tiny(aux_head=form == "training"))
    if form == "fused":
        return overlock.fuse(model)
    return model.train(form == "training")


def double():
    return randomise(tiny()).double()


def joined(outputs):
    return outputs if isinstance(outputs, torch.Tensor) else torch.cat(outputs, dim=1)


def gradient_penalty(model, x):
    """Gradients of the squared gradient at the image: of the image and of parameters that want one."""
    x = x.clone().requires_grad_()
    slope = torch.autograd.grad(joined(model(x)).square().sum(), x, create_graph=True)[0]
    wanted = {"image": x} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(slope.square().sum(), list(wanted.values()), materialize_grads=True)
    return dict(zip(wanted, gradients, strict=True))


def check(actual, expected):
    largest = max(x.abs().max() for x in expected.values())
    for name, ours in actual.items():
        wanted = expected[name]
        assert (ours - wanted).abs().max() <= 5e-3 * wanted.abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("form", ["training", "evaluation", "fused"])
def test_gradient_penalty(form):
    """As in WGAN-GP or input-gradient regularisation; batch norms by the batch in training."""
    x, model = images(2, 3, 64, 64), make(form)
    reference = double() if form != "training" else randomise(tiny(aux_head=True)).double().train()
    actual, expected = gradient_penalty(model, x), gradient_penalty(reference, x.double())
    assert "image" in actual
    assert len(actual) == (1 if form == "fused" else len(expected))
    check(actual, expected)


def test_hessian_vector_product():
    """Of the loss over all parameters, forward over reverse and reverse over reverse."""
    x = images(1, 3, 64, 64)

    def product(model, x, way):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        vector = {name: images(*p.shape, seed=i).to(p.dtype) for i, (name, p) in enumerate(parameters.items())}
        gradient = func.grad(lambda p: func.functional_call(model, p, (x,)).square().sum())
        if way == "forward over reverse":
            return func.jvp(gradient, (parameters,), (vector,))[1]
        return func.vjp(gradient, parameters)[1](vector)[0]

    expected = product(double(), x.double(), "reverse over reverse")
    for way in ("forward over reverse", "reverse over reverse"):
        actual = product(make("evaluation"), x, way)
        assert actual.keys() == expected.keys()
        check(actual, expected)


@pytest.mark.parametrize("form", ["evaluation", "fused"])
def test_forward_mode(form):
    """Directional derivatives, by torch.func and by dual tensors."""
    model, x, direction = make(form), images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1)
    expected = func.jvp(double(), (x.double(),), (direction.double(),))[1]
    assert relative_error(func.jvp(model, (x,), (direction,))[1], expected) < 1e-4
    with torch.no_grad(), forward_ad.dual_level():
        assert (
            relative_error(forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent, expected) < 1e-4
        )


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_at_the_image_of_a_fused_network(compiled):
    """As saliency maps and adversarial examples take it; the parameters are frozen."""
    model, x = make("fused"), images(1, 3, 64, 64)
    if compiled:
        model = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            model(x)  # which makes a graph without gradients, not taken below
    gradients = []
    for network, image in ((model, x), (double(), x.double())):
        image.requires_grad_()
        gradients.append(torch.autograd.grad(network(image)[0, 1], image)[0])
    assert relative_error(*gradients) < 1e-4
    torch.compiler.reset()


def test_an_exported_fused_network_refuses_gradients():
    """It is made of operations for inference, and says what to do."""
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        program = export(make("fused"), (x,), strict=False).module()
    torch.testing.assert_close(program(x), make("fused")(x), rtol=1e-4, atol=1e-5)
    outputs = program(x.requires_grad_())
    with pytest.raises(NotImplementedError, match=r"no gradients; .*fuse\(model, kernels=False\)"):
        outputs.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no gradients"):
        program(forward_ad.make_dual(x.detach(), x.detach()))
