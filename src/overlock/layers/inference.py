"""The layers of the fused network on CPU: the same arithmetic in fewer passes, over channels_last maps.

All take and give images (B, C, H, W).
"""

from __future__ import annotations

from timm.layers import Sigmoid, SqueezeExcite
from torch import Tensor, nn

from overlock.ops import inference as ops
from overlock.ops.cpu import prepare


def cpu_form(module: nn.Module) -> nn.Module:
    """The layer below that does a module's work, or the module itself where there is none."""
    if isinstance(module, SqueezeExcite):
        return ChannelAttention(module) if _is_ours(module) else module
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or module.dilation != (1, 1):
        return module  # a subclass may do something else to its input or its weight
    size, stride = module.kernel_size[0], module.stride[0]
    square = module.kernel_size == (size, size) and module.stride == (stride, stride) and size % 2 == 1
    if not square or module.padding != (size // 2, size // 2):
        return module
    if module.groups == 1:
        return Pointwise(module) if size == stride == 1 else Conv(module)
    one_by_one = module.groups == module.in_channels == module.out_channels
    return Depthwise(module) if one_by_one and stride == 1 else module


def _is_ours(module: SqueezeExcite) -> bool:
    """Whether a squeeze-excite has GELU, sigmoid and biases and nothing else."""
    exact = isinstance(module.act, nn.GELU) and module.act.approximate == "none"
    plain = isinstance(module.bn, nn.Identity) and not module.add_maxpool and module.fc1.bias is not None
    return exact and plain and isinstance(module.gate, (nn.Sigmoid, Sigmoid))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


class Pointwise(nn.Module):
    """1x1 convolution as a matrix product, weight (Cout, Cin)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = _frozen(conv.weight.flatten(1))
        self.bias = None if conv.bias is None else _frozen(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.to_images(ops.linear(x.permute(0, 2, 3, 1), self.weight, self.bias))


class Depthwise(nn.Module):
    """Depthwise convolution, weight (K, K, C), and GELU after it where ``gelu`` is set."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = _frozen(conv.weight[:, 0].permute(1, 2, 0))
        self.bias = _frozen(conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias)
        self.gelu = False

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise(x, self.weight, self.bias, self.gelu)


class Conv(nn.Module):
    """Convolution of all channels, and GELU after it where ``gelu`` is set."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight = _frozen(conv.weight)
        self.bias = None if conv.bias is None else _frozen(conv.bias)
        self.stride = conv.stride[0]
        self.gelu = False

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv(x, self.weight, self.bias, self.stride, self.gelu)


class FusedContMix(nn.Module):
    """ContMix with all kernel sizes in one operation; the affinities' scale is the query's.

    Args:
        weight, bias: from affinities to the taps of all sizes, (N, S^2) and (N).
        rpbs: relative position bias of each size.
        scale: of the affinities.
        region_grid: S.
    """

    def __init__(
        self, query: Pointwise, key: Pointwise, value: nn.Module, out: nn.Module,
        *, weight: Tensor, bias: Tensor, rpbs: list[Tensor], scale: float, region_grid: int,
    ):  # fmt: skip
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        for parameter in query.parameters():
            parameter.data.mul_(scale)
        sizes = [(rpb.shape[1] + 1) // 2 for rpb in rpbs]
        taps = [k * k for k in sizes]
        kinds = zip(weight.split(taps), bias.split(taps), rpbs, sizes, strict=True)
        prepared = [prepare(w, b, rpb, rpb.shape[0], k, k) for w, b, rpb, k in kinds]
        self.weights, self.biases, self.rpbs = (nn.ParameterList(map(_frozen, x)) for x in zip(*prepared, strict=True))
        self.region_grid = region_grid

    def forward(self, x: Tensor, query: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        query, context = x if query is None else query, x if context is None else context
        mixed = ops.context_mix(
            self.query(query), context, self.value(x), self.key.weight, self.key.bias, list(self.weights),
            list(self.biases), list(self.rpbs), self.region_grid,
        )  # fmt: skip
        return self.out(mixed)


class ChannelAttention(nn.Module):
    """Squeeze-excite of x (+ other), times SiLU(gate): what stands around it in GDSA, in the same two passes."""

    def __init__(self, module: SqueezeExcite):
        super().__init__()
        self.reduce, self.expand = Pointwise(module.fc1), Pointwise(module.fc2)

    def forward(self, x: Tensor, other: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        reduce, expand = self.reduce, self.expand
        return ops.squeeze_excite(x, other, gate, reduce.weight, reduce.bias, expand.weight, expand.bias)


class ResponseNorm(nn.Module):
    """Global response norm."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = _frozen(weight), _frozen(bias), eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.response_norm(x, self.weight, self.bias, self.eps)


class FusedConvFFN(nn.Module):
    """A folded ConvFFN in one operation."""

    def __init__(self, expand: Pointwise, local: Depthwise, norm: ResponseNorm, project: Pointwise):
        super().__init__()
        self.expand, self.local, self.norm, self.project = expand, local, norm, project

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv_ffn(
            x, self.expand.weight, self.expand.bias, self.local.weight, self.local.bias, self.norm.weight,
            self.project.weight, self.project.bias, self.norm.eps,
        )  # fmt: skip


class FusedAggregator(nn.Module):
    """GDSA's dynamic and static convolution, channel attention and gate."""

    def __init__(
        self, mixer: nn.Module, large_kernel: nn.Module, se: ChannelAttention, gate: nn.Module, proj: nn.Module
    ):
        super().__init__()
        self.mixer, self.large_kernel, self.se, self.gate, self.proj = mixer, large_kernel, se, gate, proj

    def forward(self, features: Tensor, query: Tensor, context: Tensor) -> Tensor:
        mixed = self.mixer(features, query, context)
        return self.proj(self.se(mixed, self.large_kernel(features), self.gate(features)))


def join_gelu(layers: nn.Sequential) -> None:
    """Let each convolution do the GELU after it."""
    for i in range(len(layers) - 1):
        if isinstance(layers[i], (Conv, Depthwise)) and isinstance(layers[i + 1], nn.GELU):
            layers[i].gelu, layers[i + 1] = True, nn.Identity()  # type: ignore[assignment]
