"""The two Triton loops of the fused convolution: y = max(conv3×3(x) · scale + shift, 0), an implicit GEMM.

(O, 9·I) by (9·I, pixels), accumulated in fp32. What differs is how the operands are read:

- `descriptors`: a box of a 4-D TMA descriptor is the GEMM's tile, zeros past every edge are the padding, and the weight
  is the left operand, so that both stay in shared memory for wgmma and tcgen05. sm_90 and newer.
- `pointers`: masked loads (cp.async with zero fill) through any strides, NCHW and expanded ones included. sm_80 and
  newer.

Constants of both: IN_CHANNELS is I, a program computes ROWS×COLUMNS pixels of OUT_BLOCK channels, IN_BLOCK at a time.
UPCAST is for the interpreter, whose bf16 is wrong: operands become fp32 before they are multiplied, and results are
rounded by hand.
What stands around the convolution is an option, and costs nothing where it is off (its arguments are then None):

- SECOND: the last SECOND input channels come from a second tensor, lying in the first one's picture at (top, left),
  zeros around it; with UPSAMPLE it has half the size and is interpolated as it is read.
- POOL: the maxima of 2×2 pixels are a second output; a tile holds whole windows.
- CLASSES: the logits of a 1×1 convolution are the output instead of y; a program holds every channel.
- no scale or shift: the sums themselves; moments: number, sum and squared distances of each tile's y as it is stored.
"""
# ruff: noqa: N803, N806 - constants of a Triton kernel are capitals
# ruff: noqa: ANN001, ANN201 - its arguments have no Python types
# ruff: noqa: PLR0913, PLR0917, PLR0915, PLR0912, C901 - it takes pointers, sizes and strides one by one, and is one function
# ruff: noqa: D417 - constants and strides are explained here
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from kernels.around import interpolated, larger_of_pairs, rounded, store_logits, store_moments

_SIZES = ["height", "width", "second_height", "second_width", "top", "left"]


@triton.jit(do_not_specialize=_SIZES)
def descriptors(
    x_boxes, second, weight_boxes, scale_ptr, shift_ptr, y_boxes, pooled_boxes, head_weight_ptr, head_bias_ptr,
    logits_ptr, moments_ptr, height, width, out_channels, second_height, second_width, top, left, scale_h, scale_w,
    second_n, second_c, second_h, second_w, logits_n, logits_c, logits_h, logits_w,
    IN_CHANNELS: tl.constexpr, SECOND: tl.constexpr, UPSAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr, POOL: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS×COLUMNS pixels of OUT_BLOCK channels, all through descriptors.

    Args:
        x_boxes: (N, H, W, I - SECOND) in boxes [1, ROWS, COLUMNS, IN_BLOCK].
        second: (N, second_height, second_width, SECOND) in boxes like x's; with UPSAMPLE a pointer with strides.
        weight_boxes: (9, O, I) in boxes [1, OUT_BLOCK, IN_BLOCK].
        scale_ptr: (O,) fp32, or None.
        shift_ptr: (O,) fp32, or None.
        y_boxes: (N, H, W, O) in boxes [1, ROWS, COLUMNS, OUT_BLOCK].
        pooled_boxes: (N, H // 2, W // 2, O) in boxes [1, ROWS / 2, COLUMNS / 2, OUT_BLOCK].
        head_weight_ptr: (CLASSES, O) fp32.
        head_bias_ptr: (CLASSES,) fp32.
        logits_ptr: (N, CLASSES, H, W) with strides.
        moments_ptr: (tiles, 3, O) fp32, or None.
        height: H.
        width: W.
        out_channels: O.
        second_height: rows of the second tensor.
        second_width: columns of the second tensor.
        top: row of the first tensor at which the second begins.
        left: column of the first tensor at which the second begins.
        scale_h: as `interpolated` takes it.
        scale_w: the same.
    """
    tile = tl.program_id(0)
    first = tl.program_id(1) * OUT_BLOCK
    across = tl.cdiv(width, COLUMNS)
    per_image = tl.cdiv(height, ROWS) * across
    n = tile // per_image
    h = tile % per_image // across * ROWS
    w = tile % per_image % across * COLUMNS
    FIRST: tl.constexpr = IN_CHANNELS - SECOND
    BLOCKS: tl.constexpr = (FIRST + IN_BLOCK - 1) // IN_BLOCK
    total = tl.zeros((OUT_BLOCK, ROWS * COLUMNS), tl.float32)
    # One flat loop over taps and channels: a nested one drains the pipeline of loads at every tap.
    for step in tl.range(9 * BLOCKS):
        tap = step // BLOCKS
        c = step % BLOCKS * IN_BLOCK
        pixels = x_boxes.load([n, h + tap // 3 - 1, w + tap % 3 - 1, c]).reshape(ROWS * COLUMNS, IN_BLOCK)
        # The tap is a dimension of its own, so channels past the last one are zeros and not the next tap's. It is the
        # first one: a dimension of size 1 in the middle sends the operand through registers.
        weight = weight_boxes.load([tap, first, c]).reshape(OUT_BLOCK, IN_BLOCK)
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, pixels.T, total)
    pixel = tl.arange(0, ROWS * COLUMNS)
    if SECOND > 0:
        # A loop of its own: to choose between two descriptors in each step would end the overlap of load and product.
        MORE: tl.constexpr = (SECOND + IN_BLOCK - 1) // IN_BLOCK
        if UPSAMPLE:
            # Taps inside: they share neighbours, which then come from L1. Not pipelined: each stage would hold four of
            # them, and the sums leave no room for that.
            for step in tl.range(9 * MORE, num_stages=1):
                tap = step % 9
                c = step // 9 * IN_BLOCK
                row = h + pixel // COLUMNS + tap // 3 - 1
                column = w + pixel % COLUMNS + tap % 3 - 1
                inside = (row.to(tl.uint32) < height.to(tl.uint32)) & (column.to(tl.uint32) < width.to(tl.uint32))
                row -= top
                column -= left
                inside &= (row.to(tl.uint32) < 2 * second_height.to(tl.uint32)) & (
                    column.to(tl.uint32) < 2 * second_width.to(tl.uint32)
                )
                mixed = interpolated(
                    second + n.to(tl.int64) * second_n, row, column, inside, c + tl.arange(0, IN_BLOCK),
                    second_height, second_width, scale_h, scale_w, second_c, second_h, second_w,
                    SECOND, SECOND % IN_BLOCK == 0,
                )  # fmt: skip
                pixels = rounded(mixed, second.dtype.element_ty, UPCAST)
                weight = weight_boxes.load([tap, first, FIRST + c]).reshape(OUT_BLOCK, IN_BLOCK)
                if UPCAST:
                    pixels = pixels.to(tl.float32)
                    weight = weight.to(tl.float32)
                total = tl.dot(weight, pixels.T, total)
        else:
            for step in tl.range(9 * MORE):
                tap = step // MORE
                c = step % MORE * IN_BLOCK
                box = second.load([n, h + tap // 3 - 1 - top, w + tap % 3 - 1 - left, c])
                pixels = box.reshape(ROWS * COLUMNS, IN_BLOCK)
                weight = weight_boxes.load([tap, first, FIRST + c]).reshape(OUT_BLOCK, IN_BLOCK)
                if UPCAST:
                    pixels = pixels.to(tl.float32)
                    weight = weight.to(tl.float32)
                total = tl.dot(weight, pixels.T, total)
    channel = first + tl.arange(0, OUT_BLOCK)
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + channel, mask=channel < out_channels, other=0.0)[:, None]
    if shift_ptr is not None:
        total += tl.load(shift_ptr + channel, mask=channel < out_channels, other=0.0)[:, None]
    if RELU:  # NaN stays NaN, as in torch.relu
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if CLASSES > 0:
        store_logits(
            total, 1, channel, channel < out_channels, head_weight_ptr, head_bias_ptr, logits_ptr,
            n.to(tl.int64) * logits_n, h + pixel // COLUMNS, w + pixel % COLUMNS, height, width,
            logits_c, logits_h, logits_w, out_channels, CLASSES, UPCAST,
        )  # fmt: skip
    else:
        tile_of_y = rounded(total, y_boxes.dtype, UPCAST)
        y_boxes.store([n, h, w, first], tile_of_y.T.reshape(1, ROWS, COLUMNS, OUT_BLOCK))
        if moments_ptr is not None:
            inside = (h + pixel // COLUMNS < height) & (w + pixel % COLUMNS < width)
            count = (tl.minimum(height - h, ROWS) * tl.minimum(width - w, COLUMNS)).to(tl.float32)
            store_moments(
                tile_of_y.to(tl.float32), 1, inside, count, channel, channel < out_channels, moments_ptr, tile,
                out_channels,
            )  # fmt: skip
    if POOL:
        windows = total.reshape(OUT_BLOCK, ROWS // 2, 2, COLUMNS // 2, 2)
        largest = larger_of_pairs(larger_of_pairs(windows).permute(0, 1, 3, 2))
        largest = rounded(largest.reshape(OUT_BLOCK, ROWS * COLUMNS // 4), pooled_boxes.dtype, UPCAST)
        pooled_boxes.store([n, h // 2, w // 2, first], largest.T.reshape(1, ROWS // 2, COLUMNS // 2, OUT_BLOCK))


@triton.jit
def gathered(
    total, x_tile, weight_tile, h, w, height, width, stride_c, stride_h, stride_w, per_tap, present,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, IN_BLOCK: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    MULTIPLY: tl.constexpr,
):  # fmt: skip
    """Add the SIDE×SIDE taps of CHANNELS channels of one source to `total` (pixels, OUT_BLOCK).

    Args:
        total: the sums so far.
        x_tile: addresses of each pixel's upper left tap, (pixels, 1).
        weight_tile: addresses of this source's first weight of each output channel, (1, OUT_BLOCK).
        h: rows, in this source, of the pixels' second taps: below and right of the upper left ones.
        w: columns.
        height: of this source.
        width: of this source.
        per_tap: weights between one tap and the next.
        present: whether an output channel exists.
    """
    c = tl.arange(0, IN_BLOCK)
    DEPTH: tl.constexpr = SIDE * SIDE * CHANNELS
    if CHANNELS % IN_BLOCK == 0:
        BLOCKS: tl.constexpr = CHANNELS // IN_BLOCK
        x_tile += (c.to(tl.int64) * stride_c if WIDE else c * stride_c)[None, :]
        weight_tile += c[:, None]
        for step in tl.range(SIDE * SIDE * BLOCKS):
            tap = step // BLOCKS
            block = step % BLOCKS * IN_BLOCK
            r = tap // SIDE
            s = tap % SIDE
            # As unsigned numbers, -1 is past the last row too.
            inside = ((h + r - 1).to(tl.uint32) < height.to(tl.uint32)) & (
                (w + s - 1).to(tl.uint32) < width.to(tl.uint32)
            )
            far_r = r.to(tl.int64) if WIDE else r
            far_block = block.to(tl.int64) if WIDE else block
            offset = far_r * stride_h + s * stride_w + far_block * stride_c
            pixels = tl.load(x_tile + offset, mask=inside[:, None], other=0.0)
            weight = tl.load(weight_tile + (tap * per_tap + block), mask=present[None, :], other=0.0)
            if UPCAST:
                pixels = pixels.to(tl.float32)
                weight = weight.to(tl.float32)
            total = tl.dot(pixels, weight, total, input_precision=MULTIPLY)
    else:
        # Few or odd channels: taps and channels share a block, each element of it gathered from its own place.
        for step in tl.range((DEPTH + IN_BLOCK - 1) // IN_BLOCK):
            flat = step * IN_BLOCK + c
            r = flat // CHANNELS // SIDE
            s = flat // CHANNELS % SIDE
            source = flat % CHANNELS
            rows = (h[:, None] + r[None, :] - 1).to(tl.uint32)
            columns = (w[:, None] + s[None, :] - 1).to(tl.uint32)
            inside = (rows < height.to(tl.uint32)) & (columns < width.to(tl.uint32)) & (flat < DEPTH)[None, :]
            far_r = r.to(tl.int64) if WIDE else r
            far_source = source.to(tl.int64) if WIDE else source
            offset = far_r * stride_h + s * stride_w + far_source * stride_c
            pixels = tl.load(x_tile + offset[None, :], mask=inside, other=0.0)
            place = (flat // CHANNELS * per_tap + source)[:, None]
            weight = tl.load(weight_tile + place, mask=present[None, :] & (flat < DEPTH)[:, None], other=0.0)
            if UPCAST:
                pixels = pixels.to(tl.float32)
                weight = weight.to(tl.float32)
            total = tl.dot(pixels, weight, total, input_precision=MULTIPLY)
    return total


@triton.jit(do_not_specialize=_SIZES)
def pointers(
    x_ptr, second, weight_ptr, scale_ptr, shift_ptr, y_ptr, pooled_ptr, head_weight_ptr, head_bias_ptr, logits_ptr,
    moments_ptr, height, width, out_channels, stride_n, stride_c, stride_h, stride_w,
    second_height, second_width, top, left, scale_h, scale_w, second_n, second_c, second_h, second_w,
    logits_n, logits_c, logits_h, logits_w,
    IN_CHANNELS: tl.constexpr, SECOND: tl.constexpr, UPSAMPLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr, POOL: tl.constexpr,
    CLASSES: tl.constexpr, WIDE: tl.constexpr, MULTIPLY: tl.constexpr,
):  # fmt: skip
    """One program: ROWS×COLUMNS pixels of OUT_BLOCK channels, all through masked pointers.

    Args:
        x_ptr: (N, H, W, I - SECOND) with the four strides given, in elements.
        second: (N, second_height, second_width, SECOND) with strides of its own.
        weight_ptr: (9, O, I) contiguous.
        scale_ptr: (O,) fp32, or None.
        shift_ptr: (O,) fp32, or None.
        y_ptr: (N, H, W, O) contiguous.
        pooled_ptr: (N, H // 2, W // 2, O) contiguous.
        head_weight_ptr: (CLASSES, O) fp32.
        head_bias_ptr: (CLASSES,) fp32.
        logits_ptr: (N, CLASSES, H, W) with strides.
        moments_ptr: (tiles, 3, O) fp32, or None.
        height: H.
        width: W.
        out_channels: O.
        second_height: rows of the second tensor.
        second_width: columns of the second tensor.
        top: row of the first tensor at which the second begins.
        left: column of the first tensor at which the second begins.
        scale_h: as `interpolated` takes it.
        scale_w: the same.
        WIDE: offsets within one image pass 2^31 elements.
        MULTIPLY: tl.dot's input_precision, "ieee" or "tf32"; for 16-bit operands without effect.
    """
    tile = tl.program_id(0)
    across = tl.cdiv(width, COLUMNS)
    per_image = tl.cdiv(height, ROWS) * across
    n = (tile // per_image).to(tl.int64)
    pixel = tl.arange(0, ROWS * COLUMNS)
    h = tile % per_image // across * ROWS + pixel // COLUMNS
    w = tile % per_image % across * COLUMNS + pixel % COLUMNS
    channel = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    present = channel < out_channels
    FIRST: tl.constexpr = IN_CHANNELS - SECOND
    # 64-bit offsets cost registers: within an image only where its offsets need them.
    far_h = h.to(tl.int64) if WIDE else h
    far_w = w.to(tl.int64) if WIDE else w
    x_tile = x_ptr + n * stride_n + ((far_h - 1) * stride_h + (far_w - 1) * stride_w)[:, None]
    weight_tile = weight_ptr + (channel * IN_CHANNELS)[None, :]
    per_tap = out_channels * IN_CHANNELS
    total = tl.zeros((ROWS * COLUMNS, OUT_BLOCK), tl.float32)
    total = gathered(
        total, x_tile, weight_tile, h, w, height, width, stride_c, stride_h, stride_w, per_tap, present,
        FIRST, 3, IN_BLOCK, UPCAST, WIDE, MULTIPLY,
    )  # fmt: skip
    if SECOND > 0:
        weight_tile = weight_ptr + (channel * IN_CHANNELS + FIRST)[None, :]
        second_tile = second + n * second_n
        if UPSAMPLE:
            c = tl.arange(0, IN_BLOCK)
            MORE: tl.constexpr = (SECOND + IN_BLOCK - 1) // IN_BLOCK
            for step in tl.range(9 * MORE, num_stages=1):
                tap = step % 9
                source = step // 9 * IN_BLOCK + c
                row = h + tap // 3 - 1
                column = w + tap % 3 - 1
                inside = (row.to(tl.uint32) < height.to(tl.uint32)) & (column.to(tl.uint32) < width.to(tl.uint32))
                row -= top
                column -= left
                inside &= (row.to(tl.uint32) < 2 * second_height.to(tl.uint32)) & (
                    column.to(tl.uint32) < 2 * second_width.to(tl.uint32)
                )
                mixed = interpolated(
                    second_tile, row, column, inside, source, second_height, second_width, scale_h, scale_w,
                    second_c, second_h, second_w, SECOND, SECOND % IN_BLOCK == 0,
                )  # fmt: skip
                pixels = rounded(mixed, second.dtype.element_ty, UPCAST)
                there = present[None, :] & (source < SECOND)[:, None]
                weight = tl.load(weight_tile + (tap * per_tap + source)[:, None], mask=there, other=0.0)
                if UPCAST:
                    pixels = pixels.to(tl.float32)
                    weight = weight.to(tl.float32)
                total = tl.dot(pixels, weight, total, input_precision=MULTIPLY)
        else:
            row = h - top
            column = w - left
            far_row = row.to(tl.int64) if WIDE else row
            far_column = column.to(tl.int64) if WIDE else column
            second_tile += ((far_row - 1) * second_h + (far_column - 1) * second_w)[:, None]
            total = gathered(
                total, second_tile, weight_tile, row, column, second_height, second_width,
                second_c, second_h, second_w, per_tap, present, SECOND, 3, IN_BLOCK, UPCAST, WIDE, MULTIPLY,
            )  # fmt: skip
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + channel, mask=present, other=0.0)[None, :]
    if shift_ptr is not None:
        total += tl.load(shift_ptr + channel, mask=present, other=0.0)[None, :]
    if RELU:  # NaN stays NaN, as in torch.relu
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if CLASSES > 0:
        store_logits(
            total, 0, channel, present, head_weight_ptr, head_bias_ptr, logits_ptr, n * logits_n, h, w, height, width,
            logits_c, logits_h, logits_w, out_channels, CLASSES, UPCAST,
        )  # fmt: skip
    else:
        y_tile = y_ptr + n * height * width * out_channels + ((far_h * width + far_w) * out_channels)[:, None]
        mask = ((h < height) & (w < width))[:, None] & present[None, :]
        stored = rounded(total, y_ptr.dtype.element_ty, UPCAST)
        tl.store(y_tile + channel[None, :], stored, mask=mask)
        if moments_ptr is not None:
            inside = (h < height) & (w < width)
            store_moments(
                stored.to(tl.float32), 0, inside, tl.sum(inside.to(tl.float32), 0), channel, present, moments_ptr,
                tile, out_channels,
            )  # fmt: skip
    if POOL:
        windows = total.reshape(ROWS // 2, 2, COLUMNS // 2, 2, OUT_BLOCK).permute(0, 2, 4, 1, 3)
        largest = larger_of_pairs(larger_of_pairs(windows)).reshape(ROWS * COLUMNS // 4, OUT_BLOCK)
        window = tl.arange(0, ROWS * COLUMNS // 4)
        row = tile % per_image // across * (ROWS // 2) + window // (COLUMNS // 2)
        column = tile % per_image % across * (COLUMNS // 2) + window % (COLUMNS // 2)
        far_row = row.to(tl.int64) if WIDE else row
        far_column = column.to(tl.int64) if WIDE else column
        high = height // 2
        wide = width // 2
        pooled_tile = pooled_ptr + n * high * wide * out_channels
        pooled_tile += ((far_row * wide + far_column) * out_channels)[:, None]
        mask = ((row < high) & (column < wide))[:, None] & present[None, :]
        tl.store(pooled_tile + channel[None, :], rounded(largest, pooled_ptr.dtype.element_ty, UPCAST), mask=mask)
