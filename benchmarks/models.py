"""Networks of ours and of timm's side by side: inference or a training step, eager or compiled, on CPU or CUDA.

python benchmarks/models.py --models '[overlock_t,convnext_tiny]' [--batch_sizes '[1,16]'] [--sizes '[[224,224]]']
python benchmarks/models.py --models '[overlock_xt]' --mode train --batch_sizes '[8]' --backends '[auto,unfold]'

Weights are random and images are noise. A training step is forward, loss, backward and dropping the gradients, without
an optimiser; the loss is the cross entropy, or of features the sum of their mean squares. 16-bit inference casts the
network, 16-bit training is autocast over float32 parameters. Each batch and size is compiled afresh, so for static
shapes; inference in one graph. On CUDA, cuDNN may pick its algorithms by trial.

GMAC are the forward's multiply-adds an image, in training too: of ours by overlock.analysis.count_cost, of others half
of what torch.utils.flop_counter counts, which leaves out the same (norms, activations, biases).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Literal, NamedTuple
from unittest import mock

import timm
import torch
from alternatives import by_unfold, make_kernels
from ops import peak_extra_memory
from timing import interleave, leave_out, middle, ratio, report, spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import overlock
import overlock.layers.contmix as contmix_layer
from overlock.analysis import count_cost
from overlock.kernels.torch.reference import enlarged
from overlock.ops import backend, contmix
from overlock.ops.contmix import _resize

BackendName = Literal["auto", "triton", "cpu", "torch", "reference", "unfold"]
Form = Literal["eager", "graph", "compiled", "compiled graph"]
"""As it stands, captured as a CUDA graph, compiled by torch.compile, and both."""


def contmix_by_unfold(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor,
    _kernel_size: int, min_side: int,
) -> Tensor:  # fmt: skip
    """overlock.ops.contmix as PyTorch's own operations, to which it leaves the gradients too.

    For maps that, enlarged to ``min_side``, have room for the kernel: those of the networks.
    """
    height, width = value.shape[3:]
    size = enlarged(height, width, min_side)
    if size is not None:
        query, value = _resize(query, size), _resize(value, size)
    mixed = by_unfold(make_kernels(query, key, weight, bias, rpb), value)
    if size is not None:
        mixed = F.adaptive_avg_pool2d(mixed.flatten(1, 2), (height, width)).unflatten(1, mixed.shape[1:3])
    return mixed


def check_unfold() -> None:
    """The unfold form gives the result and the gradients of the operation, on a large map and an enlarged one."""
    make = torch.Generator().manual_seed(0)
    for height, width, k, min_side in ((14, 16, 5, 13), (6, 4, 7, 7)):
        shapes = ((2, 3, 4, height, width), (2, 3, 4, 9), (2, 3, 5, height, width), (k * k, 9), (k * k,))
        inputs = [torch.randn(shape, generator=make) for shape in (*shapes, (3, 2 * k - 1, 2 * k - 1))]
        leaves = [x.requires_grad_() for x in inputs]
        results = []
        for mix in (contmix_by_unfold, contmix):
            output = mix(*leaves, k, min_side)
            cotangent = torch.linspace(-1, 1, output.numel()).view_as(output)
            results.append((output, *torch.autograd.grad(output, leaves, cotangent)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


class Network(NamedTuple):
    """A network, and what its calls run in."""

    name: str
    backend: str
    module: nn.Module
    precision: str | None = None  # of the fused network's products, if not the parameters' own

    @property
    def label(self) -> str:
        backend_name = None if self.backend == "auto" else self.backend
        return ", ".join(filter(None, (self.name, backend_name, self.precision)))

    def context(self) -> AbstractContextManager[object]:
        if self.backend != "unfold":
            return backend(self.backend)
        plain = ExitStack()  # nothing but PyTorch's own operations
        plain.enter_context(backend("torch"))
        plain.enter_context(mock.patch.object(contmix_layer, "contmix", contmix_by_unfold))
        return plain


def build(
    name: str, backend_name: str, *, train: bool, features: bool, fused: bool, device: str, dtype: torch.dtype,
    layout: torch.memory_format, precision: str | None = None,
) -> Network:  # fmt: skip
    """A network in the form in which it is timed, but for the compilation."""
    torch.manual_seed(0)
    module = _create(name, features).to(device=device, memory_format=layout).train(train)
    if not train:
        module = module.to(dtype)
        module = overlock.fuse(module, precision=precision) if fused and name in overlock.VARIANTS else module
    return Network(name, backend_name, module, precision)


def _create(name: str, features: bool) -> nn.Module:
    return timm.create_model(name, **({"features_only": True} if features else {}))


@functools.cache
def count_macs(name: str, size: tuple[int, int], features: bool) -> int:
    """Multiply-adds of an image of a height and width, in the paper's convention."""
    if name in overlock.VARIANTS:
        *parts, total = count_cost(name, image_size=size)
        return sum(part.macs for part in parts if part.name != "head") if features else total.macs
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode():
        _create(name, features).eval()(torch.empty(1, 3, *size))
    return counter.get_total_flops() // 2


def make_call(
    network: Network, form: Form, images: Tensor, *, train: bool, features: bool, dtype: torch.dtype
) -> Callable[[], object]:
    """The network's inference or training step, without arguments."""
    module: Callable[[Tensor], Tensor | list[Tensor]] = network.module
    if form.startswith("compiled"):
        module = torch.compile(network.module, fullgraph=not train)
    classes = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def infer() -> object:
        with torch.inference_mode(), network.context():
            return module(images)

    def loss() -> Tensor:
        with nullcontext() if dtype == torch.float32 else torch.autocast(images.device.type, dtype):
            output = module(images)
            if features:
                return torch.stack([x.float().square().mean() for x in output]).sum()
            return F.cross_entropy(output, classes)

    def step() -> None:
        with network.context():
            loss().backward()
        network.module.zero_grad(set_to_none=True)

    call = step if train else infer
    return capture(call) if form.endswith("graph") else call


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: all its kernels by one launch.

    Raises:
        RuntimeError: for a call that cannot be captured, and without a GPU.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # choices that are timed are made here
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def runnable(
    networks: list[Network], forms: tuple[Form, ...], images: Tensor, **settings: object
) -> Iterator[tuple[Network, Form, Callable[[], object]]]:
    """The calls that run here; those that do not are named with the reason."""
    for form in forms:
        for network in networks:
            try:
                call = make_call(network, form, images, **settings)
                call()
            except RuntimeError as error:  # a graph that breaks, an operation without this dtype, too little memory
                leave_out(f"{network.label}, {form}, batch {len(images)}", str(error).strip().partition("\n")[0])
            else:
                yield network, form, call


def measure(
    networks: list[Network], forms: tuple[Form, ...], images: Tensor, repeats: int, **settings: object
) -> Iterator[dict[str, object]]:
    """Rows of the table for one batch."""
    calls = list(runnable(networks, forms, images, **settings))
    seconds = interleave({f"{network.label}, {form}": call for network, form, call in calls}, repeats=repeats)
    batch, _, *size = images.shape

    def work(network: Network) -> float:
        return batch * count_macs(network.name, tuple(size), settings["features"]) / 1e9

    for network, form, call in calls:
        taken, last = seconds[f"{network.label}, {form}"], seconds.get(f"{networks[-1].label}, {form}")
        yield {
            "model": network.label,
            "form": form,
            "batch": batch,
            "size": "x".join(map(str, size)),
            "ms": middle(taken),
            "spread, %": spread(taken),
            "images/s": 1e3 * batch / middle(taken),
            "GMAC": work(network) / batch,
            "GMAC/s": 1e3 * work(network) / middle(taken),
            "over last model": work(network) / work(networks[-1]) * ratio(last, taken) if last else "",
            "extra memory, MiB": peak_extra_memory(call, images.device.type),
        }


def main(
    models: list[str],
    batch_sizes: list[int] = [1],  # noqa: B006  # read, and shown by --help
    sizes: list[tuple[int, int]] = [(224, 224)],  # noqa: B006
    mode: Literal["inference", "train"] = "inference",
    form: Literal["eager", "graph", "compiled", "compiled graph", "both"] = "eager",
    features: bool = False,
    fused: bool = True,
    bf16: bool = False,
    backends: list[BackendName] = ["auto"],  # noqa: B006
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layout: Literal["channels_last", "contiguous"] = "channels_last",
    repeats: int = 20,
    csv: str | None = None,
) -> None:
    """Time networks by turns and print medians.

    Args:
        models: names that timm knows, ours among them; rates are compared to the last one's, round by round.
        batch_sizes: images in a batch.
        sizes: heights and widths of the images.
        mode: inference, or a training step without an optimiser.
        form: eager, compiled (torch.compile), or both of these; on CUDA, each captured as a graph.
        features: feature maps for dense tasks, in place of the classification.
        fused: in inference, ours through overlock.fuse.
        bf16: ours with products in bfloat16 too, overlock.fuse(model, precision="bf16"), each before the usual one.
        backends: of ContMix in ours, each timed; unfold is the form with every window copied out.
        device: cpu or cuda.
        dtype: of the network in inference, of autocast in training.
        layout: of images and weights.
        repeats: interleaved calls of each network.
        csv: file for the table.
    """
    train, floating = mode == "train", getattr(torch, dtype)
    ours = [name for name in models if name in overlock.VARIANTS]
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2 to tell a spread, got {repeats}")
    if backends != ["auto"] and ours and fused and not train:
        raise ValueError("the fused network chooses how it mixes by itself; with backends, pass --fused false")
    if bf16 and (train or not fused or device != "cpu" or dtype != "float32"):
        raise ValueError("bf16 is for inference of fused networks on CPU, from parameters in float32")
    if "unfold" in backends:
        check_unfold()
    torch.backends.cudnn.benchmark = True
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    networks = [
        build(
            name, choice, train=train, features=features, fused=fused, device=device, dtype=floating,
            layout=memory_format, precision=precision,
        )
        for name in models
        for choice in (backends if name in ours else ["auto"])
        for precision in (("bf16", None) if bf16 and name in ours else (None,))
    ]  # fmt: skip
    forms: tuple[Form, ...] = ("eager", "compiled") if form == "both" else (form,)
    rows: list[dict[str, object]] = []
    for size in sizes:
        for batch in batch_sizes:
            torch.compiler.reset()  # else the second shape would be compiled for all shapes
            images = torch.randn(batch, 3, *size, device=device, dtype=torch.float32 if train else floating)
            images = images.to(memory_format=memory_format)
            rows += measure(networks, forms, images, repeats, train=train, features=features, dtype=floating)
    state = "" if train or not ours else ", ours fused" if fused else ", ours not fused"
    what = f"{'Training step' if train else 'Inference'}, {'features' if features else 'classification'}"
    if rows:
        report(f"{what}, {dtype}, {layout}{state}", rows, csv)


if __name__ == "__main__":
    from jsonargparse import auto_cli  # here, so that others need not have it

    auto_cli(main, as_positional=False)
