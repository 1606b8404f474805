"""The network once more, written slowly from the paper's equations and the released weights' names.

Nothing here comes from the package under test, and no layer of PyTorch is used where its formula can be written out:
convolutions are sums over taps, pooling and resizing sums over positions. Everything is differentiable and runs in the
dtype it is given, float64 in the tests. A network is a state dict with the authors' names; sizes are read from it.

Letters: B batch, G groups, D query and key channels of a group, C value channels of a group, K kernel size, S grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]

STEM_STRIDES = (2, 1, 2, 1)
BRANCHES = {
    5: [(3, 1), (3, 2)],
    7: [(5, 1), (3, 1), (3, 2), (3, 3)],
    9: [(5, 1), (7, 1), (5, 2), (3, 3), (3, 4)],
    11: [(5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)],
    13: [(5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)],
    15: [(5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)],
    17: [(5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)],
    19: [(5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)],
}


# ContMix's dynamic convolution


def window_start(position: int, size: int, kernel_size: int) -> int:
    """First row or column of the window: centred, shifted to lie inside, 0 where the map is shorter than the kernel."""
    return max(0, min(position - kernel_size // 2, size - kernel_size))


def contmix(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, bias: Tensor | None, rpb: Tensor | None,
    kernel_size: int,
) -> Tensor:  # fmt: skip
    """Section 3.2 by token and tap: (B, G, D, H, W), (B, G, D, S^2) and (B, G, C, H, W) to (B, G, C, H, W)."""
    height, width = value.shape[-2:]
    rows = []
    for i in range(height):
        row = []
        for j in range(width):
            affinity = (query[:, :, :, i, j, None] * key).sum(dim=2)  # B, G, S^2
            logits, taps = [], []
            for a in range(kernel_size):
                for b in range(kernel_size):
                    y = window_start(i, height, kernel_size) + a
                    x = window_start(j, width, kernel_size) + b
                    if y >= height or x >= width:
                        continue
                    logit = affinity @ weight[a * kernel_size + b]
                    if bias is not None:
                        logit = logit + bias[a * kernel_size + b]
                    if rpb is not None:
                        logit = logit + rpb[:, y - i + kernel_size - 1, x - j + kernel_size - 1]
                    logits.append(logit)
                    taps.append(value[:, :, :, y, x])
            powers = torch.stack(logits, dim=-1)
            powers = (powers - powers.amax(dim=-1, keepdim=True)).exp()
            kernel = powers / powers.sum(dim=-1, keepdim=True)  # B, G, N
            row.append((torch.stack(taps, dim=-1) * kernel[:, :, None]).sum(dim=-1))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


# Layers


def pad(x: Tensor, margin: int) -> Tensor:
    """Zeros around a map."""
    b, c, h, w = x.shape
    out = x.new_zeros(b, c, h + 2 * margin, w + 2 * margin)
    out[:, :, margin : margin + h, margin : margin + w] = x
    return out


def depthwise(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    """Depthwise convolution of the same size, a shifted map for each tap; weight (C, 1, k, k)."""
    k = weight.shape[-1]
    margin = dilation * (k - 1) // 2
    padded = pad(x, margin)
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    for a in range(k):
        for b in range(k):
            top, left = a * dilation, b * dilation
            out = out + padded[:, :, top : top + height, left : left + width] * weight[:, 0, a, b].view(1, -1, 1, 1)
    return out


def conv3x3(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Dense 3x3 convolution, padding 1."""
    height, width = ((size + 2 - 3) // stride + 1 for size in x.shape[-2:])
    padded = pad(x, 1)
    out = 0
    for a in range(3):
        for b in range(3):
            shifted = padded[
                :, :, a : a + stride * (height - 1) + 1 : stride, b : b + stride * (width - 1) + 1 : stride
            ]
            out = out + torch.einsum("oc,bchw->bohw", weight[:, :, a, b], shifted)
    return out


def pointwise(p: State, name: str, x: Tensor) -> Tensor:
    """1x1 convolution, with a bias where the state has one."""
    weight = p[f"{name}.weight"]
    out = torch.einsum("oc,bchw->bohw", weight.reshape(weight.shape[0], weight.shape[1]), x)
    bias = p.get(f"{name}.bias")
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def batch_norm(p: State, name: str, x: Tensor) -> Tensor:
    """Batch norm in evaluation, eps 1e-5."""
    scale = p[f"{name}.weight"] / (p[f"{name}.running_var"] + 1e-5).sqrt()
    shift = p[f"{name}.bias"] - p[f"{name}.running_mean"] * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def layer_norm(p: State, name: str, x: Tensor) -> Tensor:
    """Norm over the channels of each position, eps 1e-6."""
    mean = x.sum(dim=1, keepdim=True) / x.shape[1]
    variance = ((x - mean) ** 2).sum(dim=1, keepdim=True) / x.shape[1]
    return (x - mean) / (variance + 1e-6).sqrt() * p[f"{name}.weight"].view(1, -1, 1, 1) + p[f"{name}.bias"].view(
        1, -1, 1, 1
    )


def response_norm(p: State, name: str, x: Tensor) -> Tensor:
    """GRN: (gamma * |x_c| / (mean over channels + 1e-6) + 1) * x + beta."""
    norm = (x**2).sum(dim=(2, 3), keepdim=True).sqrt()
    relative = norm / (norm.mean(dim=1, keepdim=True) + 1e-6)
    return (p[f"{name}.gamma"] * relative + 1) * x + p[f"{name}.beta"]


def affine_scale(p: State, name: str, x: Tensor) -> Tensor:
    """LayerScale with bias; stored as a depthwise 1x1 convolution."""
    return p[f"{name}.weight"].view(1, -1, 1, 1) * x + p[f"{name}.bias"].view(1, -1, 1, 1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def global_average(x: Tensor) -> Tensor:
    return x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])


def squeeze_excite(p: State, name: str, x: Tensor) -> Tensor:
    """Channel attention."""
    weights = pointwise(p, f"{name}.proj.3", gelu(pointwise(p, f"{name}.proj.1", global_average(x))))
    return x * sigmoid(weights)


def local_conv(p: State, name: str, x: Tensor) -> Tensor:
    """x + depthwise 3x3 convolution of x."""
    return x + depthwise(x, p[f"{name}.weight"]) + p[f"{name}.bias"].view(1, -1, 1, 1)


def embedding(p: State, conv: str, norm: str, x: Tensor, stride: int = 2) -> Tensor:
    """3x3 convolution and batch norm."""
    return batch_norm(p, norm, conv3x3(x, p[f"{conv}.weight"], stride))


def dilated_repconv(p: State, name: str, x: Tensor) -> Tensor:
    """Sum of the large kernel and its dilated branches, each normed; or the one merged convolution."""
    large = p[f"{name}.lk_origin.weight"]
    out = depthwise(x, large)
    if f"{name}.lk_origin.bias" in p:
        return out + p[f"{name}.lk_origin.bias"].view(1, -1, 1, 1)
    out = batch_norm(p, f"{name}.origin_bn", out)
    for k, r in branches(large.shape[-1]):
        branch = depthwise(x, p[f"{name}.dil_conv_k{k}_{r}.weight"], dilation=r)
        out = out + batch_norm(p, f"{name}.dil_bn_k{k}_{r}", branch)
    return out


def branches(kernel_size: int) -> list[tuple[int, int]]:
    """Sizes and dilations beside a large kernel; the widest list serves still larger ones."""
    return BRANCHES[min(kernel_size, 19)] if kernel_size > 3 else []


# Resizing


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation with pixel centres at halves (align_corners false)."""
    for dim, new in zip((2, 3), size, strict=True):
        old = x.shape[dim]
        lines = []
        for i in range(new):
            position = max(0.0, (i + 0.5) * old / new - 0.5)
            low = min(int(position), old - 1)
            high = min(low + 1, old - 1)
            part = position - low
            lines.append(x.select(dim, low) * (1 - part) + x.select(dim, high) * part)
        x = torch.stack(lines, dim=dim)
    return x


def adaptive_average(x: Tensor, size: Sequence[int]) -> Tensor:
    """Means over cells that begin at floor(i * old / new) and end at ceil((i + 1) * old / new)."""
    for dim, new in zip((2, 3), size, strict=True):
        old = x.shape[dim]
        cells = [x.narrow(dim, i * old // new, -(-(i + 1) * old // new) - i * old // new) for i in range(new)]
        x = torch.stack([cell.mean(dim=dim) for cell in cells], dim=dim)
    return x


def enlarge(x: Tensor, kernel_size: int) -> Tensor:
    """Bring the shorter side up to the kernel size."""
    height, width = x.shape[-2:]
    if min(height, width) >= kernel_size:
        return x
    if height < width:
        return bilinear(x, (kernel_size, int(kernel_size / height * width)))
    return bilinear(x, (int(kernel_size / width * height), kernel_size))


def enlarged_contmix(
    query: Tensor, key: Tensor, value: Tensor, *, min_side: int, **rest: Tensor | int | None
) -> Tensor:
    """:func:`contmix` with query and value enlarged where the map is small, and the result averaged back."""
    size, parts = value.shape[-2:], value.shape[1:3]
    query, value = (enlarge(x.flatten(1, 2), min_side).unflatten(1, x.shape[1:3]) for x in (query, value))
    mixed = contmix(query, key, value, **rest)
    return adaptive_average(mixed.flatten(1, 2), size).unflatten(1, parts) if mixed.shape[-2:] != size else mixed


# Blocks


def context_mixing(
    p: State, name: str, value: Tensor, query: Tensor, context: Tensor, *, out: str = "dyconv_proj", grid: int = 7
) -> Tensor:
    """The ContMix module: queries, region centres, dynamic kernels of one or two sizes, mixing, output projection."""
    biases = [p[f"{name}{rpb}"] for rpb in ("rpb1", "rpb2") if f"{name}{rpb}" in p]
    kernel_sizes = [(rpb.shape[1] + 1) // 2 for rpb in biases]
    size, groups = value.shape[-2:], biases[0].shape[0]
    value, query, context = (enlarge(x, kernel_sizes[-1]) for x in (value, query, context))
    if f"{name}weight_value.0.weight" in p:
        value = batch_norm(p, f"{name}weight_value.1", pointwise(p, f"{name}weight_value.0", value))
    b, c, h, w = value.shape
    q = batch_norm(p, f"{name}weight_query.1", pointwise(p, f"{name}weight_query.0", query))
    k = adaptive_average(context, (grid, grid))
    k = batch_norm(p, f"{name}weight_key.2", pointwise(p, f"{name}weight_key.1", k))
    q = q.reshape(b, groups, -1, h, w) * (c // groups) ** -0.5
    k = k.reshape(b, groups, -1, grid * grid)

    weight, bias = p[f"{name}weight_proj.weight"].reshape(-1, grid * grid), p[f"{name}weight_proj.bias"]
    share = c // len(kernel_sizes)
    mixed, first = [], 0
    for i, (kernel_size, rpb) in enumerate(zip(kernel_sizes, biases, strict=True)):
        last = first + kernel_size**2
        part = value[:, i * share : (i + 1) * share].reshape(b, groups, -1, h, w)
        part = contmix(q, k, part, weight[first:last], bias=bias[first:last], rpb=rpb, kernel_size=kernel_size)
        mixed.append(part.reshape(b, share, h, w))
        first = last
    y = torch.cat(mixed, dim=1)
    if y.shape[-2:] != size:
        y = adaptive_average(y, size)
    return batch_norm(p, f"{name}{out}.1", pointwise(p, f"{name}{out}.0", y))


def aggregate(p: State, name: str, mixed: Tensor, features: Tensor) -> Tensor:
    """GDSA's tail: add the static large kernel, attend to channels, gate, project."""
    static = batch_norm(p, f"{name}lepe.1", dilated_repconv(p, f"{name}lepe.0", features))
    gate = batch_norm(p, f"{name}gate.1", pointwise(p, f"{name}gate.0", features))
    y = squeeze_excite(p, f"{name}se_layer", mixed + static) * (gate * sigmoid(gate))
    return pointwise(p, f"{name}proj.1", batch_norm(p, f"{name}proj.0", y))


def feed_forward(p: State, names: Sequence[str], x: Tensor) -> Tensor:
    """1x1 up, GELU, local convolution, GRN, 1x1 down."""
    up, local, norm, down = names
    x = local_conv(p, local, gelu(pointwise(p, up, x)))
    return pointwise(p, down, response_norm(p, norm, x))


def residual(p: State, name: str, identity: Tensor, branch: Tensor) -> Tensor:
    """The identity is scaled where the state has a scale."""
    return (affine_scale(p, name, identity) if f"{name}.weight" in p else identity) + branch


def basic_block(p: State, name: str, x: Tensor) -> Tensor:
    """A block of Base-Net and Overview-Net; ``name`` ends in a dot."""
    x = local_conv(p, f"{name}dwconv", x)
    y = layer_norm(p, f"{name}proj.0", x)
    y = batch_norm(p, f"{name}proj.2", dilated_repconv(p, f"{name}proj.1", y))
    y = squeeze_excite(p, f"{name}proj.3", y)
    y = feed_forward(p, [f"{name}proj.{i}" for i in (4, 6, 7, 8)], y)
    return residual(p, f"{name}ls", x, y)


def second_half(p: State, name: str, x: Tensor) -> Tensor:
    """Local convolution and feed-forward network of Focus-Net's blocks."""
    x = local_conv(p, f"{name}dwconv2", x)
    y = feed_forward(p, [f"{name}mlp.{i}" for i in (0, 2, 3, 4)], layer_norm(p, f"{name}norm2", x))
    return residual(p, f"{name}ls2", x, y)


def dynamic_block(p: State, name: str, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """A block of Focus-Net: features and running context in, both out."""
    channels = x.shape[1]
    if f"{name}x_scale.weight" in p:
        context = affine_scale(p, f"{name}x_scale", context) + affine_scale(p, f"{name}h_scale", prior)
    both = local_conv(p, f"{name}dwconv1", torch.cat([x, context], dim=1))
    normed = layer_norm(p, f"{name}norm1", both)
    fused = depthwise(normed, p[f"{name}fusion.0.weight"]) + p[f"{name}fusion.0.bias"].view(1, -1, 1, 1)
    fused = pointwise(p, f"{name}fusion.3", gelu(batch_norm(p, f"{name}fusion.1", fused)))
    fused = response_norm(p, f"{name}fusion.4", fused)
    mixed = context_mixing(p, name, fused, normed[:, :channels], normed[:, channels:])
    both = residual(p, f"{name}ls1", both, aggregate(p, name, mixed, fused))
    both = second_half(p, name, both)
    return both[:, :channels], both[:, channels:]


def contmix_block(p: State, x: Tensor) -> Tensor:
    """The stand-alone block."""
    x = local_conv(p, "dwconv1", x)
    normed = layer_norm(p, "norm1", x)
    mixed = context_mixing(p, "", normed, normed, normed, out="fusion_proj")
    x = residual(p, "ls1", x, aggregate(p, "", mixed, normed))
    return second_half(p, "", x)


# The network


def _depth(p: State, stage: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in p if name.startswith(f"{stage}."))


def _basic_blocks(p: State, stage: int, x: Tensor) -> Tensor:
    for i in range(_depth(p, f"blocks{stage}")):
        x = basic_block(p, f"blocks{stage}.{i}.", x)
    return x


def _dynamic_blocks(p: State, stage: int, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    for i in range(_depth(p, f"sub_blocks{stage}")):
        x, context = dynamic_block(p, f"sub_blocks{stage}.{i}.", x, context, prior)
    return x, context


def features(p: State, x: Tensor, stem_strides: Sequence[int] = STEM_STRIDES) -> tuple[list[Tensor], Tensor]:
    """The four features before their norms, and the overview; dense states norm the second on its way to stage 3."""
    for i, stride in enumerate(stem_strides):
        x = embedding(p, f"patch_embed1.{3 * i}", f"patch_embed1.{3 * i + 1}", x, stride)
        x = x if i == 3 else gelu(x)
    first = _basic_blocks(p, 1, x)
    second = _basic_blocks(p, 2, embedding(p, "patch_embed2.0", "patch_embed2.1", first))
    x = layer_norm(p, "extra_norm.1", second) if "extra_norm.1.weight" in p else second
    x = _basic_blocks(p, 3, embedding(p, "patch_embed3.0", "patch_embed3.1", x))
    overview = _basic_blocks(p, 4, embedding(p, "patch_embed4.0", "patch_embed4.1", x))

    prior = pointwise(p, "high_level_proj", overview)
    context = bilinear(prior, x.shape[-2:])
    x, context = _dynamic_blocks(p, 3, x, context, context)
    third = torch.cat([x, context], dim=1)
    x = embedding(p, "patch_embedx.x_proj.0", "patch_embedx.x_proj.1", x)
    context = embedding(p, "patch_embedx.h_proj.0", "patch_embedx.h_proj.1", context)
    x, context = _dynamic_blocks(p, 4, x, context, prior)
    return [first, second, third, torch.cat([x, context], dim=1)], overview


def logits(p: State, last: Tensor) -> Tensor:
    """The classifier on the last feature."""
    hidden = batch_norm(p, "head.1", pointwise(p, "head.0", last))
    return pointwise(p, "head.4", global_average(hidden * sigmoid(hidden))).flatten(1)


def aux_logits(p: State, overview: Tensor) -> Tensor:
    """The auxiliary classifier on the overview, in evaluation."""
    return pointwise(p, "aux_head.2", global_average(batch_norm(p, "aux_head.0", overview))).flatten(1)


def dense(p: State, maps: Sequence[Tensor], overview: Tensor) -> list[Tensor]:
    """The dense backbones' outputs: normed features, and the overview added to the last where the state projects it."""
    normed = [layer_norm(p, f"extra_norm.{i}", x) for i, x in enumerate(maps)]
    if "h_proj.0.weight" in p:
        added = pointwise(p, "h_proj.0", layer_norm(p, "extra_norm.4", overview))
        normed[3] = normed[3] + affine_scale(p, "h_proj.1", added)
    return normed
