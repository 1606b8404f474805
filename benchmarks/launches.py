"""Which kernels a network would launch on a GPU, found without one.

The network runs on the meta device, which knows shapes and strides alone, and each call of our operators is noted. Each
call then runs the operators' own code for CUDA on fake tensors, and Triton, whose driver is replaced by one that names
a GPU which is not there, notes what it would compile. So tiles, dtypes and specialisations are those of a real launch:
the code that decides them decides them here too.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import overlock  # noqa: F401 - registers the models
from overlock.fused import cuda_layers
from overlock.fused import fuse as fuse_module
from overlock.fused.forms import ON_CUDA
from overlock.ops import backend, dispatch


class Image(NamedTuple):
    """Images of a network's input."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.height} x {self.width}"


class Laid(NamedTuple):
    """A tensor without its numbers. ``dtype`` None stands for the network's own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None


class Call(NamedTuple):
    """A call of one of our operators. Equal calls launch the same kernels."""

    operator: Any
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        name = str(self.operator).removeprefix("overlock.").removesuffix(".default")
        tensors = [x for x in self.arguments if isinstance(x, Laid)]
        return f"{name} {tuple(tensors[0].shape)}"


class Launch(NamedTuple):
    """What Triton is to compile (its own JSON, which ``JITFunction.preload`` takes), and where it came from."""

    specialization: str
    arch: int
    call: str
    network: str


# ---- the calls of a network -----------------------------------------------------------------------------------------


class _AsOnCuda(TorchFunctionMode):
    """Tensors say that they are on a CUDA device, which decides between an operator of ours and one of PyTorch's."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if function == torch.Tensor.is_cuda.__get__ else function(*args, **(kwargs or {}))  # type: ignore[attr-defined]


class _Calls(TorchDispatchMode):
    """Notes the calls of our operators; convolutions keep channels last, as cuDNN's do and those on meta do not."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.found: dict[Call, None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "overlock":
            self.found[Call(function, tuple(self._lay(x) for x in args))] = None
        result = function(*args, **(kwargs or {}))
        if function in {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}:
            is_last = any(_is_channels_last(x) for x in args if isinstance(x, Tensor))
            return tree_map(_channels_last, result) if is_last else result
        return result

    def _lay(self, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return tuple(self._lay(item) for item in x)
        if not isinstance(x, Tensor):
            return x
        return Laid(tuple(x.shape), x.stride(), None if x.dtype == self.dtype else x.dtype)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _channels_last(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    return torch.empty_like(x, memory_format=torch.channels_last)


def calls_of(model: str, image: Image) -> list[Call]:
    """Calls of our operators in a training step of a model of timm's registry, forward first, and of the fused copy."""
    with torch.device("meta"):
        network = timm.create_model(model).to(torch.bfloat16, memory_format=torch.channels_last)
        x = torch.empty(image.batch, 3, image.height, image.width, dtype=torch.bfloat16)
    calls = _Calls(torch.bfloat16)
    with _AsOnCuda(), calls, backend("triton"), patch.object(dispatch, "_triton_trains", lambda _: True):
        result = network(x.contiguous(memory_format=torch.channels_last))
        logits = [result] if isinstance(result, Tensor) else list(result)
        sum(x.sum() for x in logits).backward()  # type: ignore[union-attr]
    table = ON_CUDA._replace(kinds=frozenset({("meta", torch.bfloat16)}))
    with patch.object(fuse_module, "ON_CUDA", table):
        fused = fuse_module.fuse(network)
    with (
        _AsOnCuda(),
        calls,
        backend("triton"),
        torch.no_grad(),
        patch.object(cuda_layers, "triton_applies", lambda *_: True),  # it would see the mode that notes the calls
    ):
        fused(x.contiguous(memory_format=torch.channels_last))
    return list(calls.found)


# ---- their launches -------------------------------------------------------------------------------------------------


class _Nowhere:
    """Triton's driver for a GPU that is not there."""

    numbers = itertools.count(1)

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.device = next(self.numbers)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device  # of its own each time: Triton would tell nothing of a kernel that it keeps for a device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def absent_gpu(arch: int) -> Iterator[None]:
    """Inside, Triton compiles for an architecture (90 for sm_90), and PyTorch believes that there is such a GPU."""
    before = driver._active
    driver.set_active(_Nowhere(arch))  # type: ignore[arg-type]
    with (
        patch.object(torch.cuda, "device", lambda _: contextlib.nullcontext()),
        patch.object(torch.cuda, "get_device_capability", lambda _=None: divmod(arch, 10)),
    ):
        try:
            yield
        finally:
            driver._active = before


def launches_of(call: Call, dtype: torch.dtype, arch: int) -> list[str]:
    """What Triton would compile for a call, on fake tensors, in the order of the launches."""
    found: dict[str, None] = {}

    def note(**launch: Any) -> bool:
        found[launch["compile"]["specialization_data"]] = None
        return True  # that is, do not compile

    def fake(x: Any) -> Any:
        if isinstance(x, Laid):
            return torch.empty_strided(x.shape, x.stride, dtype=x.dtype or dtype, device="cuda")
        return [fake(item) for item in x] if isinstance(x, tuple) else x

    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with (
        warnings.catch_warnings(),
        absent_gpu(arch),
        FakeTensorMode(),
        torch.no_grad(),
        backend("triton"),
        patch.object(knobs.runtime, "jit_cache_hook", note),
    ):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # as aligned: 0
        call.operator.redispatch(cuda, *(fake(x) for x in call.arguments))
    return list(found)


def find_launches(models: list[str], images: list[Image], dtypes: list[torch.dtype], archs: list[int]) -> list[Launch]:
    """All different kernels of the networks, each with the first call that launches it."""
    found: dict[tuple[str, int], Launch] = {}
    for model in models:
        for image in images:
            for call in calls_of(model, image):
                for arch in archs:
                    for dtype in dtypes:
                        for specialization in launches_of(call, dtype, arch):
                            launch = Launch(specialization, arch, str(call), f"{model} {image}")
                            found.setdefault((specialization, arch), launch)
    return list(found.values())
