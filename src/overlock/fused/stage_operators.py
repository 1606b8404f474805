"""Whole blocks of the fused network as one operation each, on CPU in float32 without gradients.

An operation takes the parameters of a folded block as one tensor, and prepares them once for its kernels
(stage_plans.py). To ``torch.compile`` and ``torch.export`` it is one node; it has no gradient, and says so where one is
asked for. Images are (B, C, H, W) in channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakIdKeyDictionary

from overlock.fused.packing import shape_of, unpack
from overlock.kernels.numba.contmix import numba_installed, to_images, to_tokens
from overlock.ops.dispatch import AUTO, asked_for, exports_to_onnx
from overlock.ops.gradients import register_no_gradients

CHUNK = 8 << 20  # bytes of workspace for some of a batch's images at a time: a cache's share
PLANS = 64  # sizes of images that a block keeps its calls for


Layer = Any  # a module with a weight and a bias, or the two; where it has none, or is absent, they are None


class Parameters(NamedTuple):
    """Of a layer."""

    weight: Any
    bias: Any


class BasicLayers(NamedTuple):
    """Those of a folded basic block, in the order of the operation's arguments."""

    local: Layer
    norm: Layer
    large: Layer
    reduce: Layer
    excite: Layer
    expand: Layer
    hidden: Layer
    response: Layer
    project: Layer
    residual: Layer


class MixerLayers(NamedTuple):
    """Those of a folded mixer block, which may lack the context's update, the fusion and the value."""

    alpha: Layer
    beta: Layer
    local1: Layer
    norm1: Layer
    fusion: Layer
    fusion_project: Layer
    fusion_norm: Layer
    query: Layer
    key: Layer
    value: Layer
    kernels: Layer
    out: Layer
    large: Layer
    reduce: Layer
    excite: Layer
    gate: Layer
    project: Layer
    residual1: Layer
    local2: Layer
    norm2: Layer
    expand: Layer
    hidden: Layer
    response: Layer
    ffn_project: Layer
    residual2: Layer
    rpbs: Layer  # those of the small and the large kernel, as a pair


def parameters_of(layers: Iterable[Layer]) -> list[Tensor | None]:
    """Weight and bias of each layer."""
    return [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]


def _layers(tensors: list[Tensor | None]) -> Iterator[Parameters]:
    return map(Parameters, tensors[::2], tensors[1::2])


class _Prepared:
    """A stage of stage_plans.py made of parameters, and its plans for the sizes of images that came."""

    def __init__(self, block: Any, key: tuple[int, int], held: Tensor):
        self.block, self.key, self.held = block, key, held
        self._plans: dict[Any, Any] = {}

    def plan(self, *size: Any) -> Any:
        """As the threads are now."""
        known = self._plans.get((size, torch.get_num_threads()))
        if known is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            known = self._plans[size, torch.get_num_threads()] = self.block.plan(*size)
        return known


_prepared: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _prepare_once(packed: Tensor, make: Callable[[], Any]) -> _Prepared:
    """The block made of packed parameters, kept as long as these live and do not change.

    Parameters that ``Module.to`` gives other memory have the version that they had; the old memory is held, lest the
    new should come to lie at its address.
    """
    key = packed.data_ptr(), 0 if packed.is_inference() else packed._version
    known = _prepared.get(packed)
    if known is None or known.key != key:
        known = _prepared[packed] = _Prepared(make(), key, packed.detach())
    return known


def _as_tokens(x: Tensor) -> tuple[Tensor, int]:
    """Images whose tokens lie one stride apart, each token's channels side by side; and the stride."""
    batch, channels, height, width = x.shape
    stride = x.stride(3)
    even = x.stride(1) == 1 and x.stride(2) == width * stride and (batch == 1 or x.stride(0) == height * x.stride(2))
    if even and stride >= channels:
        return x, stride
    return to_images(to_tokens(x)), channels


def _run(prepared: _Prepared, out: Tensor, inputs: list[Tensor], *rest: Any) -> Tensor:
    """Some images at a time, so that what they need beside input and output stays in the cache."""
    from overlock.fused.layer_plans import Size  # noqa: PLC0415

    batch, _, height, width = inputs[0].shape
    one = 4 * prepared.plan(Size(1, height, width), *rest).peak
    parts = -(-batch // max(1, CHUNK // max(1, one)))
    for i in range(parts):
        first, last = batch * i // parts, batch * (i + 1) // parts
        part = [x[first:last] for x in (*inputs, out)] if parts > 1 else (*inputs, out)
        prepared.plan(Size(last - first, height, width), *rest).run(*part)
    return out


def _bias(layer: Parameters) -> Tensor:
    return layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias


def _basic_stack(x: Tensor, packed: Tensor, layout: list[int], strides: list[int], eps: float) -> Tensor:
    def make() -> Any:
        from overlock.fused import stage_plans as plans  # noqa: PLC0415

        layers = list(_layers(unpack(packed, layout)))
        convolutions: Any = zip(layers, strides, strict=False)
        blocks = _parts(layers[len(strides) :], BasicLayers)
        return plans.BasicStage(
            [plans.Convolution(p.weight, _bias(p), stride) for p, stride in convolutions],
            [_basic_block(p, eps) for p in blocks],
        )

    out = _shrunk(x, packed, layout, strides)
    return _run(_prepare_once(packed, make), out, [to_images(to_tokens(x))])


def _shrunk(x: Tensor, _packed: Tensor, layout: list[int], strides: list[int], _eps: float = 0.0) -> Tensor:
    first = shape_of(layout, 0)  # (Cout, Cin, K, K) of a convolution, or (C, 1, K, K) of a block's local one
    _check_images("images", x, first[1 if strides else 0])
    channels, height, width = x.shape[1:]
    for stride in strides:
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    if strides:
        channels = shape_of(layout, 2 * len(strides) - 2)[0]
    return _images(x, channels, height, width)


def _parts(tensors: list[Any], kind: Any) -> list[Any]:
    """Layers block by block."""
    count = len(kind._fields)
    return [kind(*tensors[i : i + count]) for i in range(0, len(tensors), count)]


def _basic_block(p: BasicLayers, eps: float) -> Any:
    from overlock.fused import stage_plans as plans  # noqa: PLC0415

    return plans.BasicBlock(
        plans.LocalConvNorm(plans.Depthwise(*p.local), p.norm, eps), plans.Depthwise(*p.large),
        plans.SqueezeExcite(p.reduce, p.excite), _conv_ffn(p.expand, p.hidden, p.response, p.project, eps),
        _residual_scale(p.residual, p.norm),
    )  # fmt: skip


def _mixer_stack(
    x: Tensor, context: Tensor | None, prior: Tensor | None, packed: Tensor, layout: list[int], scale: float,
    region_grid: int, eps: float,
) -> Tensor:  # fmt: skip
    beside = 0 if context is None else context.shape[1]

    def make() -> Any:
        from overlock.fused import stage_plans as plans  # noqa: PLC0415

        blocks = _parts(list(_layers(unpack(packed, layout))), MixerLayers)
        return plans.MixerStage([_mixer_block(p, beside, scale, region_grid, eps) for p in blocks])

    out = _mixed(x, context, prior, packed, layout)
    prepared = _prepare_once(packed, make)
    given = [y for y in (x, context, prior) if y is not None]
    inputs, strides = zip(*map(_as_tokens, given), strict=True)
    return _run(prepared, out, list(inputs), strides)


def _mixed(
    x: Tensor, context: Tensor | None, prior: Tensor | None, _packed: Tensor, layout: list[int], *_: object
) -> Tensor:  # fmt: skip
    width = shape_of(layout, 2 * MixerLayers._fields.index("local1"))[0]
    if context is None:
        _check_images("images", x, width)
        return _images(x, width, *x.shape[2:])
    _check_images("features", x, width - context.shape[1])
    for name, beside in (("context", context), ("prior", prior)):
        if beside is not None:
            _check_images(name, beside, context.shape[1], x)
    return _images(x, width, *x.shape[2:])


def _check_images(name: str, x: Tensor, channels: int, like: Tensor | None = None) -> None:
    """Stop what has another shape: the kernels read memory as they are told to.

    Raises:
        ValueError: where that is not (B, channels, H, W), with B, H and W of other images.
    """
    like = x if like is None else like
    if x.dim() != 4 or x.shape[1] != channels or x.shape[0] != like.shape[0] or x.shape[2:] != like.shape[2:]:
        same = "" if like is x else f", of the batch and size of the features {tuple(like.shape)}"
        raise ValueError(f"{name} must be (B, {channels}, H, W){same}, got {tuple(x.shape)}")


def _mixer_block(p: MixerLayers, beside: int, scale: float, region_grid: int, eps: float) -> Any:
    from overlock.fused import stage_plans as plans  # noqa: PLC0415

    fusion, update, value = None, None, None
    if p.fusion.weight is not None:
        fusion = plans.ContextFusion(plans.Depthwise(*p.fusion), plans.Pointwise(*p.fusion_project), p.fusion_norm, eps)
    if p.alpha.weight is not None:
        update = plans.ContextUpdate(*(x.flatten().contiguous() for x in (p.alpha.weight, *p.beta)))
    if p.value.weight is not None:
        value = plans.Pointwise(*p.value)
    query = plans.Pointwise(p.query.weight * scale, p.query.bias * scale)
    rpbs = [rpb for rpb in p.rpbs if rpb is not None]
    mix = plans.ContMix(query, plans.Pointwise(*p.key), value, p.kernels, rpbs, region_grid)
    aggregator = plans.Aggregator(
        mix=mix, out=plans.Pointwise(*p.out), large=plans.Depthwise(*p.large),
        squeeze_excite=plans.SqueezeExcite(p.reduce, p.excite), gate=plans.Pointwise(*p.gate),
        project=plans.Pointwise(*p.project),
    )  # fmt: skip
    return plans.MixerBlock(
        local1=plans.LocalConvNorm(plans.Depthwise(*p.local1), p.norm1, eps), fusion=fusion, aggregator=aggregator,
        residual_scale1=_residual_scale(p.residual1, p.norm1),
        local2=plans.LocalConvNorm(plans.Depthwise(*p.local2), p.norm2, eps),
        ffn=_conv_ffn(p.expand, p.hidden, p.response, p.ffn_project, eps),
        residual_scale2=_residual_scale(p.residual2, p.norm2), update=update, context_channels=beside,
    )  # fmt: skip


def _conv_ffn(expand: Layer, hidden: Layer, response: Layer, project: Layer, eps: float) -> Any:
    from overlock.fused import stage_plans as plans  # noqa: PLC0415

    return plans.ConvFFN(
        plans.Pointwise(*expand), plans.Depthwise(*hidden), response.weight, eps, plans.Pointwise(*project)
    )  # fmt: skip


def _residual_scale(residual: Layer, norm: Layer) -> Tensor:
    """What a residual keeps of the identity."""
    return torch.ones_like(norm.weight) if residual.weight is None else residual.weight.flatten().contiguous()


def kernels_apply(tensors: list[Tensor]) -> bool:
    """Whether a call is one for the kernels: float32 on CPU, no gradient wanted, no other backend asked for.

    Args:
        tensors: those of the call, the input first.
    """
    with_gradients = torch.is_grad_enabled()
    for x in tensors:
        if not x.is_cpu or x.dtype != torch.float32 or (with_gradients and x.requires_grad):
            return False
    in_graph = torch.compiler.is_compiling() and not exports_to_onnx()
    return tensors[0].shape[0] > 0 and _is_wanted() and (in_graph or not is_watched())


@torch.compiler.assume_constant_result
def _is_wanted() -> bool:
    """Whether numba is there, and no other backend asked for; a graph keeps the answer of its compilation."""
    return numba_installed() and asked_for() in (AUTO, "cpu")


def is_watched() -> bool:
    """Whether each operation is to be seen: by a trace, a mode (a counter of FLOPs), a transform or forward mode.

    Or by hooks for all modules, as profilers have them.
    """
    return (
        torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        or _has_any_global_hook()
    )  # fmt: skip


def _define(
    name: str, arguments: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register an operation for graphs; outside of them its function is called at once, which saves a detour."""
    torch.library.define(f"overlock::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"overlock::{name}", "cpu", run)
    torch.library.register_fake(f"overlock::{name}", fake)
    register_no_gradients(name)
    operator = getattr(torch.ops.overlock, name).default

    def call(*inputs: Any) -> Tensor:
        return operator(*inputs) if torch.compiler.is_compiling() else run(*inputs)

    return call


def _images(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], height, width, channels).permute(0, 3, 1, 2)


basic_stack = _define(
    "basic_stack", "Tensor x, Tensor packed, int[] layout, int[] strides, float eps", _basic_stack, _shrunk
)
mixer_stack = _define(
    "mixer_stack",
    "Tensor x, Tensor? context, Tensor? prior, Tensor packed, int[] layout, float scale, int region_grid, float eps",
    _mixer_stack,
    _mixed,
)
