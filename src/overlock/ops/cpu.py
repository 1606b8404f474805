"""ContMix's dynamic convolution fused for inference on CPU: logits, softmax and weighted sum of a tile in the cache.

Compiled by numba at the first call and kept in its cache, so no compiler and no binary bound to a version of PyTorch is
needed. Float32. The letters of reference.py, and T the tokens of a tile (consecutive in the flattened map).

What bounds it, for one group of 16 channels, K = 13, S = 7: a token takes 2 * 49 * 169 = 16.6 kFLOP of logits and
2 * 169 * 16 = 5.4 kFLOP of weighted sum, against 64 bytes in and 64 out: arithmetic. Loops are therefore written so
that LLVM keeps a vector register full for each multiply-add: tokens (logits, softmax) or channels (sum) innermost, and
a few terms spelled out for each pass over them, so that partial sums are loaded and stored once for several terms.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor


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
    """See :func:`overlock.ops.reference.contmix`; (B, G, C, H, W) in the layout of ``value``, if that has flat rows."""
    from overlock.ops.cpu_kernels import BLOCK, TOKENS, mix  # noqa: PLC0415

    batch, groups, channels, height, width = value.shape
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    if rpb is None:
        rpb = torch.zeros(groups, 2 * kernel_height - 1, 2 * kernel_width - 1)
    blocks = -(-channels // BLOCK)
    packed = torch.empty(batch, groups, blocks, height * width, BLOCK)
    for block, part in enumerate(value.flatten(3).transpose(2, 3).split(BLOCK, dim=3)):
        packed[:, :, block, :, : part.shape[3]] = part
        packed[:, :, block, :, part.shape[3] :] = 0
    out = torch.empty_like(value)
    if out.stride(3) != width * out.stride(4):  # rows and columns swapped in memory: no flat view to write through
        out = torch.empty(value.shape)
    arrays = [query.flatten(3), packed.flatten(3), key.transpose(2, 3).contiguous()]
    arrays += [x.contiguous() for x in (weight, bias, rpb.flatten(1))] + [out.flatten(3)]
    arguments = [x.detach().numpy() for x in arrays] + [height, width, kernel_height, kernel_width]
    _run(mix, arguments, batch * groups * -(-height * width // TOKENS))
    return out


def _run(kernel: Callable[..., None], arguments: list, jobs: int) -> None:
    """Share jobs evenly among as many threads as PyTorch uses; the kernel releases the interpreter's lock.

    Plain threads that sleep between calls: a second OpenMP pool beside PyTorch's would spin for the same cores.
    """
    threads = min(torch.get_num_threads(), jobs)
    cuts = [jobs * i // threads for i in range(threads + 1)]
    others = [_pool(os.getpid()).submit(kernel, *arguments, a, b) for a, b in pairwise(cuts[1:])]
    kernel(*arguments, cuts[0], cuts[1])
    for other in others:
        other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix=f"overlock-{process}")
