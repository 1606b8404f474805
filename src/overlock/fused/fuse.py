"""``fuse``: a copy of a network in the form for inference. Start here to read how a fused network comes about.

1. ``fuse`` copies the network and walks it by the table of forms.py: what can be folded is, and on CPU stages, blocks
   and layers take the forms of blocks.py and layers.py, which hold all their parameters as one (flat_parameters.py). On
   CUDA some take those of cuda_layers.py, and the rest below does not apply.
2. A call of such a form runs one operation of stage_operators.py, or the folded module itself where the kernels cannot
   run (conditions.py).
3. The operation has stage_builders.py make a stage of the parameters, and the stage a plan of kernel calls for each
   size of image: stage_plans.py, and layer_plans.py below it.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from overlock.fused.conditions import why_not_bf16
from overlock.fused.flat_parameters import Packed
from overlock.fused.forms import FOLDED, ON_CPU, ON_CUDA, Table
from overlock.fused.structure import Reason
from overlock.kernels.numba.contmix import numba_installed
from overlock.ops.dispatch import triton_installed

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

CALLERS = ("overlock", "timm", "torch", "torchvision", "transformers")
"""Packages whose modules use convolutions by calling them. Those of others may read their weights instead."""


def fuse(model: Module, *, kernels: bool = True, precision: str | None = None) -> Module:
    """An inference copy of a model, or of any part of one, with fewer and cheaper layers and the same outputs.

    Dilated RepConvs are merged; batch norms, residual depthwise convolutions, layer scales and the response norms'
    biases are folded into convolutions. Then, where parameters are float32 on CPU and numba is installed, stages,
    blocks and layers take the form that is fastest there; on CUDA with Triton, blocks and layers of another such form,
    and weights are channels last. Works in any dtype and on any device; ``model`` stays as it is. Fuse on the device of
    use: the copy runs elsewhere too, slower.

    What is not as its class builds it keeps its own form: swapped activations and norms, wrapped, subclassed or
    parametrised layers, modules with hooks, parameters that several modules share, several dtypes in one block. The
    logger ``overlock.fused.fuse`` tells at level DEBUG what was left, and why. The wrappers of ``torch.compile`` are
    taken off: compile the fused copy.

    Args:
        kernels: take the layers of the CPU or the GPU. False leaves plain PyTorch ones, which TorchScript and fx trace
            too, and which export for any size of the image.
        precision: "bf16" rounds to bfloat16 what matrix products on CPU take, tokens and weights, and sums them in
            float32; all else stays in float32, as the parameters do. It needs AVX-512 BF16. None takes products in the
            parameters' own type.

    Returns:
        The copy, its parameters frozen. It is in evaluation mode and stays so, whatever ``train`` is called with.
        Parameters that are loaded or changed in place take effect at the next call; but a change through ``.data``
        cannot be seen once a call has been made, so change the parameter itself under ``torch.no_grad()``.

    Raises:
        TypeError: for what ``torch.jit`` and ``torch.export`` make.
        ValueError: where products cannot run in the precision, with the reason.
    """
    _check_precision(precision, kernels)
    with torch.inference_mode(mode=False), torch.no_grad():  # parameters made in inference mode do not tell of changes
        copied = _without_compilation(_copy_of(model)).eval().requires_grad_(False)
        shared = _shared_tensors(copied)
        copied = _Walk(FOLDED, shared).of(copied)
        tables = [table for table, runs in ((ON_CPU, numba_installed()), (ON_CUDA, triton_installed())) if runs]
        for table in tables if kernels else ():
            walk = _Walk(table, shared)
            copied = walk.of(copied)
            if walk.has_changed:
                copied = copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision is not None:
        _set_bf16(copied)
    copied.train = _StayInEvaluation(copied)  # type: ignore[method-assign,assignment]
    return copied  # type: ignore[return-value]


def _check_precision(precision: str | None, kernels: bool) -> None:
    if precision is None:
        return
    if precision != "bf16":
        raise ValueError(f"precision must be 'bf16' or None, got {precision!r}")
    reason = why_not_bf16() if kernels else "it is for the kernels of the CPU, and kernels=False leaves them out"
    if reason is not None:
        raise ValueError(f"precision 'bf16' cannot run: {reason}; leave it out for products in float32")


def _set_bf16(fused: nn.Module) -> None:
    stages = [module for module in fused.modules() if isinstance(module, Packed)]
    if not stages:
        raise ValueError(
            "precision 'bf16' is for networks with parameters in float32 on CPU, and this has no stages of that kind;"
            " elsewhere convert the model itself: model.bfloat16()"
        )
    for stage in stages:
        stage.in_bf16 = True


def _copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps results of its own, which PyTorch does not copy while they have a graph.

    Raises:
        TypeError: for what ``torch.jit`` and ``torch.export`` make.
    """
    is_exported = isinstance(model, torch.fx.GraphModule) and "eval" in vars(model)
    if is_exported or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fuse takes a model as it was built, got {type(model).__name__}; fuse it first, then export it"
        )
    held = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in held if not x.is_leaf})


def _without_compilation(module: nn.Module) -> nn.Module:
    """The module with torch.compile's wrappers taken off, which would go on to call what they compiled."""
    for key, part in module.named_children():
        setattr(module, key, _without_compilation(part))
    return getattr(module, "_orig_mod", module)


class _StayInEvaluation:
    """The method ``train`` of a fused model, whose folded norms and dropped paths cannot be trained."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return type(self.module).train(self.module, False)


class _Walk:
    """Gives the modules of a network their forms.

    Args:
        table: of the forms.
        shared: as :func:`_shared_tensors` gives them.
    """

    def __init__(self, table: Table, shared: set[object]):
        self.table, self.shared, self.parts_first = table, shared, table.parts_first
        self.has_changed = False

    def of(self, module: nn.Module, name: str = "model", owner: nn.Module | None = None) -> nn.Module:
        """The form of a module; the module itself, with its parts in theirs, where it has none."""
        if self.parts_first:
            self._walk_parts(module, name)
        form = self._form_of(module, name, owner)
        if form is None:
            if not self.parts_first:
                self._walk_parts(module, name)
            return module
        self.has_changed = True
        return form.eval().requires_grad_(False)

    def _walk_parts(self, module: nn.Module, name: str) -> None:
        for key, part in module.named_children():
            form = self.of(part, f"{name}.{key}", module)
            if form is not part:
                setattr(module, key, form)

    def _form_of(self, module: nn.Module, name: str, owner: nn.Module | None) -> nn.Module | None:
        rows = [row for row in self.table.forms if row.of is type(module)]
        if not rows:
            return None
        reasons = [self._why_left(module, name, owner)]
        if reasons == [None]:
            reasons = [row.why_not(module, name) for row in rows]
            if None in reasons:
                return rows[reasons.index(None)].make(module)
        logger.debug("left as it is: %s", "; ".join(filter(None, reasons)))
        return None

    def _why_left(self, module: nn.Module, name: str, owner: nn.Module | None) -> Reason:
        """The reason that no form of a module can be taken, whichever it is."""
        tensors = _tensors_of(module)
        if any(_memory_of(x) in self.shared for x in tensors):
            return f"{name} shares parameters with another module"
        if isinstance(module, nn.Conv2d) and owner is not None and _package_of(owner) not in CALLERS:
            return f"{name} belongs to {type(owner).__name__}, which may read its weight"
        kinds = {type(x).__name__ for x in tensors if type(x) not in (Tensor, nn.Parameter)}
        if kinds:
            return f"{name} has parameters of {', '.join(sorted(kinds))}"
        found_kinds = {(x.device.type, x.dtype) for x in tensors if x.is_floating_point()}
        if len(found_kinds) > 1 or (self.table.kinds is not None and not found_kinds <= self.table.kinds):
            found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in found_kinds))
            return f"{name} has parameters of {found}"
        return None


def _tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _shared_tensors(model: nn.Module) -> set[object]:
    """The memory of the parameters and buffers that a model has in several places."""
    named: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False),
    )  # fmt: skip
    counts = Counter(_memory_of(x) for _, x in named)
    return {memory for memory, count in counts.items() if count > 1}


def _memory_of(tensor: Tensor) -> object:
    if type(tensor) not in (Tensor, nn.Parameter):  # a subclass may have no memory of its own
        return id(tensor)
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def _package_of(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]
