"""When the kernels of the fused network run: the one place that decides."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from overlock.kernels.numba.contmix import numba_installed
from overlock.ops.dispatch import AUTO, asked_for, exports_to_onnx, triton_installed

# Dictionaries that PyTorch fills in place. (Its own function for this question is not in PyTorch 2.6.)
GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks, torch_module._global_backward_hooks,
)  # fmt: skip


def kernels_apply(*tensors: Tensor | None) -> bool:
    """Whether a call is one for the kernels: float32 on CPU, no gradient wanted, no other backend asked for.

    Args:
        tensors: those of the call, the input first.
    """
    with_gradients = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (not x.is_cpu or x.dtype != torch.float32 or (with_gradients and x.requires_grad)):
            return False
    in_graph = torch.compiler.is_compiling() and not exports_to_onnx()
    return tensors[0].shape[0] > 0 and _are_wanted() and (in_graph or not is_watched())  # type: ignore[union-attr]


def why_not_bf16() -> str | None:
    """None where the CPU's products run faster in bfloat16 than in float32, or the reason why they cannot."""
    if not numba_installed():
        return "numba is not installed"
    from overlock.kernels.numba.simd import HAS_BFLOAT16  # noqa: PLC0415

    return None if HAS_BFLOAT16 else "this processor has no AVX-512 BF16 (no flag avx512_bf16 in /proc/cpuinfo)"


def triton_applies(*tensors: Tensor) -> bool:
    """Whether a call is one for the kernels on CUDA: one type of at most 32 bits, no gradient wanted, none other asked.

    Args:
        tensors: those of the call, the input first.
    """
    x, with_gradients = tensors[0], torch.is_grad_enabled()
    for other in tensors:
        if other.dtype != x.dtype or other.is_cuda != x.is_cuda or (with_gradients and other.requires_grad):
            return False
    if x.dtype not in TRITON_TYPES or x.shape[0] == 0 or exports_to_onnx():
        return False
    return _triton_is_wanted(x.is_cuda) and (torch.compiler.is_compiling() or not is_watched())


TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def _triton_is_wanted(on_cuda: bool) -> bool:
    """Whether Triton is there, and a GPU or its interpreter, and no other backend asked for."""
    runs = on_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and triton_installed() and asked_for() in (AUTO, "triton")


@torch.compiler.assume_constant_result
def _are_wanted() -> bool:
    """Whether numba is there, and no other backend asked for; a graph keeps the answer of its compilation."""
    return numba_installed() and asked_for() in (AUTO, "cpu")


def is_watched() -> bool:
    """Whether each operation is to be seen: by a trace, a mode (a counter of FLOPs), a transform or forward mode.

    Or by hooks for all modules, as profilers have them.
    """
    return (
        torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        or any(GLOBAL_HOOKS)
    )  # fmt: skip
