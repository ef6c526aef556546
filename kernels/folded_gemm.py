"""The two Triton loops of a 3×3 convolution into which the transposed convolution before its second source is folded.

A program computes ROWS×COLUMNS pixels two apart in rows and columns: they see `low` through the same 2×2 taps. Their
own taps in x are 3×3, each a picture two apart as well. Operands are read as in `kernels.implicit_gemm`: by
`descriptors`, for which a picture is one of pairs of rows and of pairs of columns side by side, or by `pointers`.
"""
# ruff: noqa: N803, N806 - constants of a Triton kernel are capitals
# ruff: noqa: ANN001, ANN201, ANN202 - its arguments have no Python types
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# ruff: noqa: D417 - sizes, strides and tiles are as in kernels.implicit_gemm
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from kernels.around import rounded
from kernels.implicit_gemm import gathered

_SIZES = ["height", "width", "low_height", "low_width", "top", "left"]


@triton.jit
def _tile(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where this program's pixels are: rows 2 · (i + …) + p, columns 2 · (j + …) + q of image n: (n, p, q, i, j).

    The four parities of a place come one after another: they read the same pixels.
    """
    parity = tl.program_id(0) % 4
    tile = tl.program_id(0) // 4
    across = tl.cdiv((width + 1) // 2, COLUMNS)
    per_image = tl.cdiv((height + 1) // 2, ROWS) * across
    i = tile % per_image // across * ROWS
    j = tile % per_image % across * COLUMNS
    return tile // per_image, parity // 2, parity % 2, i, j


@triton.jit
def _below(first, parity, start):
    """Of pixels 2 · `first` + `parity`, whose map begins at `start`: the pixel of `low` under the first tap, and a.

    a is the parity in the map itself: for 0 the two taps see a pixel and the one before it, for 1 the one behind it.
    """
    a = (parity + start) % 2
    return first + (parity - start - a) // 2 - 1 + a, a


@triton.jit
def _finished(
    total, PIXELS_AXIS: tl.constexpr, i, j, p, q, low_height, low_width, top, left, channel, present, out_channels,
    scale_ptr, shift_ptr, border_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Bias, BatchNorm and ReLU of a tile of sums.

    The shift has in it what the transposed convolution's bias gives through all nine taps; at the map's edges some of
    them see zeros instead, and their shares are taken out again.

    Args:
        total: a tile of sums, pixels along PIXELS_AXIS.
        i: first row of the tile, as `_tile` gives it.
        j: first column.
        border_ptr: (9, O) fp32, each tap's share, or None where there is no such bias.
    """
    if border_ptr is not None:
        upper = 2 * i + p - top
        leftmost = 2 * j + q - left
        outer = (upper < 1) | (leftmost < 1)
        outer |= (upper + 2 * ROWS > 2 * low_height) | (leftmost + 2 * COLUMNS > 2 * low_width)
        if outer:
            pixel = tl.arange(0, ROWS * COLUMNS)
            row = upper + 2 * (pixel // COLUMNS)
            column = leftmost + 2 * (pixel % COLUMNS)
            for tap in tl.range(9, num_stages=1):
                # As unsigned numbers, -1 is past the last row too.
                there = ((row + tap // 3 - 1).to(tl.uint32) < (2 * low_height).to(tl.uint32)) & (
                    (column + tap % 3 - 1).to(tl.uint32) < (2 * low_width).to(tl.uint32)
                )
                share = tl.load(border_ptr + tap * out_channels + channel, mask=present, other=0.0)
                if PIXELS_AXIS == 0:
                    total -= tl.where(there[:, None], 0.0, share[None, :])
                else:
                    total -= tl.where(there[None, :], 0.0, share[:, None])
    scale = tl.load(scale_ptr + channel, mask=present, other=0.0)
    shift = tl.load(shift_ptr + channel, mask=present, other=0.0)
    total *= scale[None, :] if PIXELS_AXIS == 0 else scale[:, None]
    total += shift[None, :] if PIXELS_AXIS == 0 else shift[:, None]
    if RELU:  # NaN stays NaN, as in torch.relu
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return total


@triton.jit(do_not_specialize=_SIZES)
def descriptors(
    x_boxes, low_boxes, weight_boxes, folded_boxes, scale_ptr, shift_ptr, border_ptr, y_boxes,
    height, width, out_channels, low_height, low_width, top, left,
    FIRST: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: OUT_BLOCK channels of ROWS×COLUMNS pixels two apart; H and W are even, and blocks divide channels.

    Args:
        x_boxes: (N, H / 2, 2, W / 2, 2 · FIRST), which is (N, H, W, FIRST), in boxes [1, ROWS, 1, COLUMNS, IN_BLOCK].
        low_boxes: (N, low_height, low_width, LOW) in boxes [1, ROWS, COLUMNS, IN_BLOCK].
        weight_boxes: (9, O, FIRST) in boxes [1, OUT_BLOCK, IN_BLOCK].
        folded_boxes: (16, O, LOW), which is (2, 2, 2, 2, O, LOW): parities, then taps; in boxes like the weight's.
        scale_ptr: (O,) fp32.
        shift_ptr: (O,) fp32.
        border_ptr: (9, O) fp32, or None.
        y_boxes: (N, H / 2, 2, W / 2, 2 · O) in boxes [1, ROWS, 1, COLUMNS, OUT_BLOCK].
        low_height: rows of `low`.
        low_width: columns of `low`.
        top: row of x at which the upsampled map begins.
        left: column of x at which it begins.
    """
    n, p, q, i, j = _tile(height, width, ROWS, COLUMNS)
    first = tl.program_id(1) * OUT_BLOCK
    BLOCKS: tl.constexpr = (FIRST + IN_BLOCK - 1) // IN_BLOCK
    total = tl.zeros((OUT_BLOCK, ROWS * COLUMNS), tl.float32)
    for step in tl.range(9 * BLOCKS):
        tap = step // BLOCKS
        c = step % BLOCKS * IN_BLOCK
        r = p + tap // 3 + 1  # two more than the row's distance from 2 · i: no negative number is divided
        s = q + tap % 3 + 1
        box = x_boxes.load([n, i + r // 2 - 1, r % 2, j + s // 2 - 1, s % 2 * FIRST + c])
        pixels = box.reshape(ROWS * COLUMNS, IN_BLOCK)
        weight = weight_boxes.load([tap, first, c]).reshape(OUT_BLOCK, IN_BLOCK)
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, pixels.T, total)
    row, a = _below(i, p, top)
    column, b = _below(j, q, left)
    taps = (2 * a + b) * 4
    MORE: tl.constexpr = (LOW + IN_BLOCK - 1) // IN_BLOCK
    for step in tl.range(4 * MORE):
        tap = step // MORE
        c = step % MORE * IN_BLOCK
        pixels = low_boxes.load([n, row + tap // 2, column + tap % 2, c]).reshape(ROWS * COLUMNS, IN_BLOCK)
        weight = folded_boxes.load([taps + tap, first, c]).reshape(OUT_BLOCK, IN_BLOCK)
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, pixels.T, total)
    channel = first + tl.arange(0, OUT_BLOCK)
    total = _finished(
        total, 1, i, j, p, q, low_height, low_width, top, left, channel, channel < out_channels, out_channels,
        scale_ptr, shift_ptr, border_ptr, ROWS, COLUMNS, RELU,
    )  # fmt: skip
    total = rounded(total, y_boxes.dtype, UPCAST)
    y_boxes.store([n, i, p, j, q * out_channels + first], total.T.reshape(1, ROWS, 1, COLUMNS, OUT_BLOCK))


@triton.jit(do_not_specialize=_SIZES)
def pointers(
    x_ptr, low_ptr, weight_ptr, folded_ptr, scale_ptr, shift_ptr, border_ptr, y_ptr,
    height, width, out_channels, low_height, low_width, top, left,
    stride_n, stride_c, stride_h, stride_w, low_n, low_c, low_h, low_w,
    FIRST: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, MULTIPLY: tl.constexpr,
):  # fmt: skip
    """The same through masked pointers, of any size and channels.

    Args:
        x_ptr: (N, H, W, FIRST) with the four strides given, in elements.
        low_ptr: (N, low_height, low_width, LOW) with strides of its own.
        weight_ptr: (9, O, FIRST) contiguous.
        folded_ptr: (2, 2, 2, 2, O, LOW) contiguous: parities, then taps.
        scale_ptr: (O,) fp32.
        shift_ptr: (O,) fp32.
        border_ptr: (9, O) fp32, or None.
        y_ptr: (N, H, W, O) contiguous.
        WIDE: offsets within one image pass 2^31 elements.
        MULTIPLY: tl.dot's input_precision.
    """
    n, p, q, i, j = _tile(height, width, ROWS, COLUMNS)
    n = n.to(tl.int64)
    pixel = tl.arange(0, ROWS * COLUMNS)
    h = 2 * (i + pixel // COLUMNS) + p
    w = 2 * (j + pixel % COLUMNS) + q
    channel = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    present = channel < out_channels
    far_h = h.to(tl.int64) if WIDE else h
    far_w = w.to(tl.int64) if WIDE else w
    x_tile = x_ptr + n * stride_n + ((far_h - 1) * stride_h + (far_w - 1) * stride_w)[:, None]
    total = tl.zeros((ROWS * COLUMNS, OUT_BLOCK), tl.float32)
    total = gathered(
        total, x_tile, weight_ptr + (channel * FIRST)[None, :], h, w, height, width,
        stride_c, stride_h, stride_w, out_channels * FIRST, present, FIRST, 3, IN_BLOCK, UPCAST, WIDE, MULTIPLY,
    )  # fmt: skip
    row, a = _below(i, p, top)
    column, b = _below(j, q, left)
    row += pixel // COLUMNS
    column += pixel % COLUMNS
    far_row = row.to(tl.int64) if WIDE else row
    far_column = column.to(tl.int64) if WIDE else column
    low_tile = low_ptr + n * low_n + (far_row * low_h + far_column * low_w)[:, None]
    per_tap = out_channels * LOW
    folded_tile = folded_ptr + ((2 * a + b) * 4 * per_tap + channel * LOW)[None, :]
    total = gathered(
        total, low_tile, folded_tile, row + 1, column + 1, low_height, low_width,
        low_c, low_h, low_w, per_tap, present, LOW, 2, IN_BLOCK, UPCAST, WIDE, MULTIPLY,
    )  # fmt: skip
    total = _finished(
        total, 0, i, j, p, q, low_height, low_width, top, left, channel, present, out_channels,
        scale_ptr, shift_ptr, border_ptr, ROWS, COLUMNS, RELU,
    )  # fmt: skip
    y_tile = y_ptr + n * height * width * out_channels + ((far_h * width + far_w) * out_channels)[:, None]
    mask = ((h < height) & (w < width))[:, None] & present[None, :]
    tl.store(y_tile + channel[None, :], rounded(total, y_ptr.dtype.element_ty, UPCAST), mask=mask)
