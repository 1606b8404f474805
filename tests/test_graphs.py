"""Tracing, scripting, compiling and exporting: one model, any size afterwards where the tool allows it."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from helpers import images, randomise, relative_error, tiny
from torch.export import Dim, export

import overlock

FORMS = {
    "training form": lambda: randomise(tiny()),
    "merged": lambda: randomise(tiny(deploy=True)),
    "fused": lambda: overlock.fuse(randomise(tiny()), kernels=False),
    "features": lambda: randomise(timm.create_model("overlock_atto", features_only=True)),
    "pyramid": lambda: randomise(overlock.Pyramid(tiny(), overview=True)),
}
# Batch and size: with maps above and below the kernels, odd, not square. PyTorch's graphs of dynamic size tell sides of
# one position from longer ones: images of 32 pixels, whose last maps are one position wide, need a graph of their own.
SIZES = [(2, 96, 64), (3, 33, 47), (1, 224, 320), (2, 160, 161)]
SMALLEST = (1, 32, 32)
DYNAMIC = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)}

forms = pytest.mark.parametrize("form", FORMS)
# The same with the slower forms left for a run by hand.
SLOW = {"features", "pyramid", "merged"}
quick_forms = pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if form in SLOW else ()) for form in FORMS]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


def assert_same(module, model, sizes=SIZES):
    """A graph gives what the model gives at each size."""
    for batch, height, width in sizes:
        x = images(batch, 3, height, width, seed=height)
        with torch.no_grad():
            actual, expected = module(x), model(x)
        pairs = [(actual, expected)] if isinstance(expected, torch.Tensor) else zip(actual, expected, strict=True)
        for ours, wanted in pairs:
            assert ours.shape == wanted.shape
            assert relative_error(ours, wanted) < 1e-4


@forms
def test_jit_trace(form):
    """torch.jit.trace, at the traced size."""
    model = FORMS[form]()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images(2, 3, 96, 64, seed=96), check_trace=False)  # is checked below
    assert_same(traced, model, SIZES[:1])


@pytest.mark.parametrize("form", ["training form", "merged", "fused"])
def test_jit_script(form):
    """torch.jit.script, at any size."""
    model = FORMS[form]()
    assert_same(torch.jit.script(model), model, [*SIZES, SMALLEST])


def test_jit_script_of_a_model_in_training():
    """Gradients pass through the scripted model."""
    model = tiny().train()
    scripted = torch.jit.script(model)
    scripted(images(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@forms
def test_fx(form):
    """torch.fx.symbolic_trace, at any size."""
    model = FORMS[form]()
    assert_same(torch.fx.symbolic_trace(model), model, [*SIZES, SMALLEST])


def test_fx_of_a_model_in_training():
    """Traced in training, every parameter gets its gradient."""
    model = tiny(aux_head=True).train()
    traced = torch.fx.symbolic_trace(model)
    logits, aux = traced(images(2, 3, 64, 64))
    (logits.square().mean() + aux.square().mean()).backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_feature_extraction_of_torchvision():
    """torchvision's extractor finds the stages by name."""
    from torchvision.models.feature_extraction import create_feature_extractor

    model = FORMS["training form"]()
    extractor = create_feature_extractor(model, {"base_net.stages.1.blocks.0.residual": "mid"})
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(extractor(x)["mid"], model.forward_intermediates(x, [1], intermediates_only=True)[0])


@quick_forms
def test_compile_without_a_break(form):
    """torch.compile(fullgraph=True)."""
    model = FORMS[form]()
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager"), model, [SIZES[0], SMALLEST])


def test_compile_of_a_training_step():
    """Compiled forward and backward give the model's gradients."""
    gradients = []
    for compiled in (False, True):
        model = randomise(tiny(aux_head=True)).train()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        logits, aux = call(images(2, 3, 64, 64))
        (logits.square().mean() + 0.4 * aux.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        scale = expected.abs().max()
        assert (gradients[1][name] - expected).abs().max() <= 1e-3 * scale + 1e-5, name


@pytest.mark.slow
def test_compile_dynamic():
    """One graph for all sizes."""
    model = FORMS["training form"]()
    counter = torch._dynamo.testing.CompileCounter()
    sizes = [(batch, height, width) for batch, height, width in SIZES if batch > 1]
    assert_same(torch.compile(model, fullgraph=True, dynamic=True, backend=counter), model, sizes)
    assert counter.frame_count == 1


@pytest.mark.slow
@forms
def test_compile_with_inductor(form):
    """The default backend, code and all."""
    model = FORMS[form]()
    assert_same(torch.compile(model, fullgraph=True), model, SIZES[:2])


@quick_forms
def test_export_for_any_batch_and_size(form):
    """torch.export with dynamic batch, height and width; run at all sizes."""
    model = FORMS[form]()
    program = export(model, (images(2, 3, 96, 64),), dynamic_shapes=(DYNAMIC,), strict=False)
    assert_same(program.module(), model)


@pytest.mark.slow
def test_strict_export():
    """The stricter tracer too."""
    model = FORMS["training form"]()
    program = export(model, (images(2, 3, 96, 64),), dynamic_shapes=(DYNAMIC,), strict=True)
    assert_same(program.module(), model)


def test_export_of_the_smallest_images():
    """A graph of their own."""
    model = FORMS["training form"]()
    program = export(model, (images(2, 3, 32, 32),), dynamic_shapes=({0: DYNAMIC[0]},), strict=False)
    assert_same(program.module(), model, [SMALLEST, (5, 32, 32)])


def test_export_survives_a_file(tmp_path):
    """Saved, loaded and run."""
    model = FORMS["fused"]()
    dynamic = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = export(model, (images(2, 3, 96, 64),), dynamic_shapes=(dynamic,), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    assert_same(torch.export.load(tmp_path / "model.pt2").module(), model)


def test_export_of_the_contmix_module():
    """The plug-and-play module alone."""
    model = randomise(overlock.ContMix(8, groups=2))
    dynamic = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=2), 3: Dim("width", min=2)}
    program = export(model, (images(2, 8, 14, 9),), dynamic_shapes=(dynamic,), strict=False)
    for size in ((14, 9), (5, 9), (3, 3), (20, 41)):
        x = images(1, 8, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
