"""What the Triton kernels of ContMix's dynamic convolution share, and the kernel that prepares their inputs.

Letters as in contmix.py. Maps come as (B, G, HW, C) with the channels of a token side by side, given by a pointer and
the strides of batch, group and token, counted in ``unit`` numbers: so the compiler knows how many numbers of a token
lie at an aligned address, and loads them at once. Names that end in _p are sizes padded for the kernel. Tokens beyond
the map and taps beyond the last repeat the last one, so that every address is valid; what they add is masked. Offsets
inside one image are 32-bit, those of images and groups 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(x, y, exact: tl.constexpr):
    """x @ y in float32, of operands of one dtype: float32 (``exact``) as three tf32 products, 16 bits as they are."""
    if INTERPRETED:
        assert x.shape[-1] >= 16  # what the compiler asks for
        x, y = x.to(tl.float32), y.to(tl.float32)  # the interpreter would multiply the bits of bfloat16 as integers
    return tl.dot(x, y, input_precision="tf32x3" if exact and not INTERPRETED else "ieee")


# Triton interprets instead of compiling if TRITON_INTERPRET was set before this module was imported.
INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))


@triton.jit
def halves(x):
    """A number as the sum of two bfloat16, which keep 16 bits of it and float32's range."""
    high = x.to(tl.bfloat16)
    return high, (x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product(x, y, exact: tl.constexpr):
    """x @ y to float32's accuracy (``exact``), or to 16 bits of mantissa with float32's range.

    16-bit matrix units are many times faster than float32's, but rounding a key or a logit to their 8 or 11 bits would
    show, and float16 overflows. So numbers are split in two (:func:`halves`), and low x low is dropped.
    """
    if exact:
        result = dot(x, y, exact)
    elif y.dtype == tl.bfloat16:
        result = key_product(x, y, y, True, exact)
    else:
        high, low = halves(y)
        result = key_product(x, high, low, False, exact)
    return result


@triton.jit
def key_product(x, y_high, y_low, whole: tl.constexpr, exact: tl.constexpr):
    """As :func:`product`, with y in halves already; ``whole`` where the first is all of it."""
    if exact:
        result = dot(x, y_high, exact)
    else:
        high = x.to(tl.bfloat16)
        result = dot(high, y_high, exact)
        if not whole:
            result += dot(high, y_low, exact)
        if x.dtype != tl.bfloat16:
            result += dot((x.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), y_high, exact)
    return result


@triton.jit
def load_keys(keys, half, exact: tl.constexpr):
    """Both halves of folded keys, given pointers to the first; float32 has one part alone."""
    high = tl.load(keys)
    low = high
    if not exact:
        low = tl.load(keys + half)
    return high, low


@triton.jit
def window(token, size, kernel: tl.constexpr):
    """First row (or column) of a token's window."""
    return tl.minimum(tl.maximum(token - kernel // 2, 0), size - kernel)


@triton.jit
def shift(token, size, kernel: tl.constexpr):
    """How the window of a row (or column) lies about its token: 0 to K - 1, the entry of its first tap in the rpb."""
    return window(token, size, kernel) - token + kernel - 1


@triton.jit
def load_rows(pointer, rows, stride, size: tl.constexpr, size_p: tl.constexpr):
    """(len(rows), padded) numbers of a matrix with contiguous rows of ``size``, zeros beyond."""
    column = tl.arange(0, size_p)
    return tl.load(pointer + rows[:, None] * stride + column[None, :], mask=column[None, :] < size, other=0.0)


@triton.jit
def prepare_kernel(
    key, weight, bias, rpb, keys, table, fold_programs, half, pairs,
    depth: tl.constexpr, regions: tl.constexpr, kernel_height: tl.constexpr, kernel_width: tl.constexpr,
    pitch: tl.constexpr, taps_p: tl.constexpr, block: tl.constexpr, columns: tl.constexpr,
    depth_p: tl.constexpr, regions_p: tl.constexpr, has_bias: tl.constexpr, has_rpb: tl.constexpr, exact: tl.constexpr,
):  # fmt: skip
    """Fold the keys of some batches and groups for a block of taps; the programs after these write the table's rows.

    keys (halves, BG, taps, D) are log2(e) W_d K^T; table (G, Kh, Kw, taps) is log2(e) (bias + rpb) for each shift of a
    window, minus infinity where there is no tap. Rows of taps have ``pitch`` entries, of which Kw are taps.
    """
    program = tl.program_id(0)
    if program < fold_programs:
        blocks: tl.constexpr = (taps_p + block - 1) // block
        entry = program % blocks * block + tl.arange(0, block)
        inside = (entry % pitch < kernel_width) & (entry // pitch < kernel_height)
        tap = entry // pitch * kernel_width + entry % pitch
        region = tl.arange(0, regions_p)
        rows = tl.load(
            weight + tap[:, None] * regions + region[None, :],
            mask=inside[:, None] & (region < regions)[None, :], other=0.0,
        )  # fmt: skip
        column = program // blocks * columns + tl.arange(0, columns)
        pair, channel = (column // depth_p).to(tl.int64), column % depth_p
        centres = tl.load(
            key + ((pair * depth + channel) * regions)[None, :] + region[:, None],
            mask=((channel < depth) & (pair < pairs))[None, :] & (region < regions)[:, None], other=0.0,
        )  # fmt: skip
        if exact or rows.dtype != centres.dtype:
            folded = dot(rows.to(tl.float32), centres.to(tl.float32), True) * LOG2E
        else:
            folded = dot(rows, centres, False) * LOG2E
        target = keys + (pair * taps_p * depth_p + channel)[None, :] + entry[:, None] * depth_p
        within = (entry < taps_p)[:, None] & (pair < pairs)[None, :]
        if exact:
            tl.store(target, folded, mask=within)
        else:
            high, low = halves(folded)
            tl.store(target, high, mask=within)
            tl.store(target + half, low, mask=within)
    else:
        place = program - fold_programs  # a group and the shifts of a window's rows and columns
        row_shift, column_shift = place // kernel_width % kernel_height, place % kernel_width
        group = (place // (kernel_width * kernel_height)).to(tl.int64)
        side: tl.constexpr = 2 * kernel_width - 1
        rpb += group * (2 * kernel_height - 1) * side + row_shift * side + column_shift
        for start in range(0, taps_p, block):
            entry = start + tl.arange(0, block)
            row, column = entry // pitch, entry % pitch
            inside = (column < kernel_width) & (row < kernel_height)
            logits = tl.zeros([block], tl.float32)
            if has_bias:
                logits += tl.load(bias + row * kernel_width + column, mask=inside, other=0.0).to(tl.float32)
            if has_rpb:
                logits += tl.load(rpb + row * side + column, mask=inside, other=0.0).to(tl.float32)
            logits = tl.where(inside, logits * LOG2E, float("-inf"))
            tl.store(table + place.to(tl.int64) * taps_p + entry, logits, mask=entry < taps_p)
