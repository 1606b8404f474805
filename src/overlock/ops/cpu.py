"""ContMix's dynamic convolution fused for inference on CPU: logits, softmax and weighted sum of a tile in the cache.

Compiled by numba at the first call and kept in its cache, so no compiler and no binary bound to a version of PyTorch is
needed. Float32. The letters of reference.py, and T the tokens of a tile (consecutive in the flattened map).

What bounds it, for one group of 16 channels, K = 13, S = 7: a token takes 2 * 49 * 169 = 16.6 kFLOP of logits and
2 * 169 * 16 = 5.4 kFLOP of weighted sum, against 64 bytes in and 64 out: arithmetic. Loops are therefore written so that
LLVM keeps one vector register full for each multiply-add: tokens (logits, softmax) or channels (sum) innermost, and a few
terms spelled out for each pass over them, so that partial sums are loaded and stored once for several terms.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable

import torch
from torch import Tensor

# numba's fallback threading layer must not be entered by two Python threads at once; a call uses all cores anyway.
_lock = threading.Lock()


def why_not(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None, *_: int
) -> str | None:
    """The reason why a call cannot run here, or None."""
    tensors = [x for x in (query, key, value, weight, bias, rpb) if x is not None]
    if value.device.type != "cpu":
        return f"it runs on CPU, not on {value.device.type}"
    if any(x.dtype != torch.float32 for x in tensors):
        return "it computes in float32 only"
    if not _numba_installed():
        return "numba is not installed; pip install numba"
    return None


@functools.lru_cache(maxsize=1)
def _numba_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None, rpb: Tensor | None,
    kernel_height: int, kernel_width: int,
) -> Tensor:  # fmt: skip
    """See :func:`overlock.ops.reference.contmix`. Any strides in; returns (B, G, C, H, W) in the layout of ``value``."""
    groups, _, height, width = value.shape[1:]
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    if rpb is None:
        rpb = torch.zeros(groups, 2 * kernel_height - 1, 2 * kernel_width - 1)
    out = torch.empty_like(value)
    maps = [x.detach().flatten(3).numpy() for x in (query, value)]  # B, G, D or C, H W
    tables = [x.detach().contiguous().numpy() for x in (key.transpose(2, 3), weight, bias, rpb.flatten(1))]
    mix = _kernel()
    with _lock:
        _limit_threads()
        mix(*maps, *tables, out.flatten(3).numpy(), height, width, kernel_height, kernel_width)
    return out


def _limit_threads() -> None:
    import numba  # noqa: PLC0415

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@functools.cache
def _kernel() -> Callable[..., None]:
    """The compiled kernel: some seconds the first time on a machine, from numba's cache afterwards."""
    from overlock.ops.cpu_kernels import mix  # noqa: PLC0415

    return mix
