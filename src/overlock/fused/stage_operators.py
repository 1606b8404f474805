"""Whole blocks of the fused network as one operation each, on CPU without gradients, of maps in float32.

An operation takes the parameters of a folded block as one tensor, and prepares them once for its kernels
(stage_plans.py). To ``torch.compile`` and ``torch.export`` it is one node; it has no gradient, and says so where one is
asked for. Images are (B, C, H, W) in channels_last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from overlock.fused.packing import shape_of
from overlock.fused.parameters import MixerParameters
from overlock.kernels.numba.contmix import to_images, to_tokens
from overlock.ops.gradients import register_no_gradients

if TYPE_CHECKING:
    from overlock.fused.layer_plans import Size
    from overlock.kernels.numba.plan import Plan

CHUNK = 8 << 20  # bytes of workspace for some of a batch's images at a time: a cache's share
PLANS = 64  # sizes of images that a block keeps its calls for

Planner: TypeAlias = "Callable[[Size, tuple[int, ...]], Plan]"
"""The plan of a stage for a size of images, whose tokens lie some strides apart."""


class _Prepared:
    """A stage made of parameters, and its plans for the sizes of images that came.

    Args:
        planner: of the stage.
        key: tells these parameters from others.
        held: their memory.
    """

    def __init__(self, planner: Planner, key: tuple[int, ...], held: Tensor):
        self.planner, self.key, self.held = planner, key, held
        self._plans: dict[tuple[Size, tuple[int, ...], int], Plan] = {}

    def plan(self, size: Size, strides: tuple[int, ...]) -> Plan:
        """As the threads are now."""
        key = size, strides, torch.get_num_threads()
        known = self._plans.get(key)
        if known is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            known = self._plans[key] = self.planner(size, strides)
        return known


_prepared: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _prepare_once(packed: Tensor, in_bf16: bool, make: Callable[[], Planner]) -> _Prepared:
    """The stage made of packed parameters, kept as long as these live and do not change.

    Parameters that ``Module.to`` gives other memory have the version that they had; the old memory is held, lest the
    new should come to lie at its address.
    """
    key = packed.data_ptr(), 0 if packed.is_inference() else packed._version, in_bf16
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


def _run(prepared: _Prepared, out: Tensor, inputs: list[Tensor], strides: tuple[int, ...] = ()) -> Tensor:
    """Some images at a time, so that what they need beside input and output stays in the cache."""
    from overlock.fused.layer_plans import Size  # noqa: PLC0415

    batch, _, height, width = inputs[0].shape
    one = 4 * prepared.plan(Size(1, height, width), strides).peak
    parts = -(-batch // max(1, CHUNK // max(1, one)))
    for i in range(parts):
        first, last = batch * i // parts, batch * (i + 1) // parts
        part = [x[first:last] for x in (*inputs, out)] if parts > 1 else (*inputs, out)
        prepared.plan(Size(last - first, height, width), strides).run(*part)
    return out


def _basic_stack(
    x: Tensor, packed: Tensor, layout: list[int], strides: list[int], eps: float, in_bf16: bool = False
) -> Tensor:
    def make() -> Planner:
        from overlock.fused.stage_builders import basic_stage  # noqa: PLC0415

        stage = basic_stage(packed, layout, strides, eps, _product_type(in_bf16))
        return lambda size, _: stage.plan(size)

    out = _shrunk(x, packed, layout, strides)
    return _run(_prepare_once(packed, in_bf16, make), out, [to_images(to_tokens(x))])


def _product_type(in_bf16: bool) -> torch.dtype:
    return torch.bfloat16 if in_bf16 else torch.float32


def _shrunk(x: Tensor, _packed: Tensor, layout: list[int], strides: list[int], *_: object) -> Tensor:
    first = shape_of(layout, 0)  # (Cout, Cin, K, K) of a convolution, or (C, 1, K, K) of a block's local one
    _check_images("images", x, first[1 if strides else 0])
    channels, height, width = x.shape[1:]
    for stride in strides:
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    if strides:
        channels = shape_of(layout, 2 * len(strides) - 2)[0]
    return _images(x, channels, height, width)


def _mixer_stack(  # noqa: PLR0913, PLR0917 - those of the operation
    x: Tensor, context: Tensor | None, prior: Tensor | None, packed: Tensor, layout: list[int], scale: float,
    region_grid: int, eps: float, in_bf16: bool = False,
) -> Tensor:  # fmt: skip
    def make() -> Planner:
        from overlock.fused.stage_builders import mixer_stage  # noqa: PLC0415

        beside = 0 if context is None else context.shape[1]
        stage = mixer_stage(
            packed, layout, context_channels=beside, scale=scale, region_grid=region_grid, eps=eps,
            dtype=_product_type(in_bf16),
        )  # fmt: skip
        return stage.plan

    out = _mixed(x, context, prior, packed, layout)
    prepared = _prepare_once(packed, in_bf16, make)
    given = [y for y in (x, context, prior) if y is not None]
    inputs, strides = zip(*map(_as_tokens, given), strict=True)
    return _run(prepared, out, list(inputs), strides)


def _mixed(
    x: Tensor, context: Tensor | None, prior: Tensor | None, _packed: Tensor, layout: list[int], *_: object
) -> Tensor:  # fmt: skip
    width = shape_of(layout, 2 * MixerParameters._fields.index("local1"))[0]
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


def _define(
    name: str, arguments: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Register an operation for graphs; outside of them its function is called at once, which saves a detour."""
    torch.library.define(f"overlock::{name}", f"({arguments}) -> Tensor")
    torch.library.impl(f"overlock::{name}", "cpu", run)
    torch.library.register_fake(f"overlock::{name}", fake)
    register_no_gradients(name)
    operator = getattr(torch.ops.overlock, name).default

    def call(*inputs: object) -> Tensor:
        return operator(*inputs) if torch.compiler.is_compiling() else run(*inputs)

    return call


def _images(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape[0], height, width, channels).permute(0, 3, 1, 2)


basic_stack = _define(
    "basic_stack",
    "Tensor x, Tensor packed, int[] layout, int[] strides, float eps, bool in_bf16=False",
    _basic_stack,
    _shrunk,
)
mixer_stack = _define(
    "mixer_stack",
    "Tensor x, Tensor? context, Tensor? prior, Tensor packed, int[] layout, float scale, int region_grid, float eps, "
    "bool in_bf16=False",
    _mixer_stack,
    _mixed,
)
