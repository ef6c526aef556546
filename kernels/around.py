"""What the loops share: rounding, the second source interpolated as it is read, maxima of 2×2 pixels, logits, moments.

Functions that Triton takes into the kernels of `kernels.implicit_gemm`.
"""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: ANN001, ANN201 - its arguments have no Python types
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# ruff: noqa: D417 - constants and strides are explained where the kernels are
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rounded(values, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """Return fp32 values in `dtype`, to nearest, ties to even.

    Args:
        values: fp32.
        BY_HAND: for the interpreter, which cuts bf16 off instead of rounding it.
    """
    if BY_HAND:
        bits = values.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = tl.where(values == values, (bits & -65536).to(tl.float32, bitcast=True), values)  # noqa: PLR0124 - NaN
    return values.to(dtype)


@triton.jit
def interpolated(
    low_ptr, rows, columns, inside, channel, height, width, scale_h, scale_w, stride_c, stride_h, stride_w,
    CHANNELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Pixels of the map of twice the size, in fp32: linear in rows and columns, corners aligned.

    As PyTorch computes it: position · scale in fp32, four neighbours, weights in fp32.

    Args:
        low_ptr: one image (h, w, CHANNELS).
        rows: of the pixels in the map of twice the size, (pixels,).
        columns: the same.
        inside: whether a pixel is in that map; elsewhere the result is zero.
        channel: which channels.
        height: h.
        width: w.
        scale_h: (h - 1) / (2h - 1).
        scale_w: (w - 1) / (2w - 1).
        WHOLE: every channel of the block exists.

    Returns:
        (pixels, channels) fp32.
    """
    y = rows.to(tl.float32) * scale_h
    x = columns.to(tl.float32) * scale_w
    upper = y.to(tl.int32)
    left = x.to(tl.int32)
    down = (y - upper.to(tl.float32))[:, None]
    right = (x - left.to(tl.float32))[:, None]
    upper_row = upper.to(tl.int64) * stride_h
    lower_row = tl.minimum(upper + 1, height - 1).to(tl.int64) * stride_h
    left_column = left.to(tl.int64) * stride_w
    right_column = tl.minimum(left + 1, width - 1).to(tl.int64) * stride_w
    across = (channel.to(tl.int64) * stride_c)[None, :]
    present = inside[:, None] if WHOLE else inside[:, None] & (channel < CHANNELS)[None, :]
    upper_left = tl.load(low_ptr + (upper_row + left_column)[:, None] + across, mask=present, other=0.0).to(tl.float32)
    upper_right = tl.load(low_ptr + (upper_row + right_column)[:, None] + across, mask=present, other=0.0)
    lower_left = tl.load(low_ptr + (lower_row + left_column)[:, None] + across, mask=present, other=0.0).to(tl.float32)
    lower_right = tl.load(low_ptr + (lower_row + right_column)[:, None] + across, mask=present, other=0.0)
    above = upper_left * (1.0 - right) + upper_right.to(tl.float32) * right
    below = lower_left * (1.0 - right) + lower_right.to(tl.float32) * right
    return above * (1.0 - down) + below * down


@triton.jit
def larger_of_pairs(values):
    """(…, 2) → (…): the larger one; NaN where one of them is, as in torch.max_pool2d."""
    one, other = tl.split(values)
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_logits(
    features, PIXELS_AXIS: tl.constexpr, channel, present, head_weight_ptr, head_bias_ptr, logits_ptr, image_offset,
    h, w, height, width, stride_c, stride_h, stride_w, out_channels, CLASSES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Write Σₒ weight[k, o] · features[o] + bias[k] at every pixel, summed in fp32, for each class k.

    Args:
        features: every channel of a tile of pixels, fp32; pixels along PIXELS_AXIS.
        channel: of the other axis.
        present: whether that channel exists.
        head_weight_ptr: (CLASSES, O) fp32.
        head_bias_ptr: (CLASSES,) fp32.
        logits_ptr: (N, CLASSES, H, W), any strides.
        image_offset: of this image, 64 bits.
        h: rows of the tile's pixels.
        w: columns.
        height: H.
        width: W.
        out_channels: O.
    """
    place = logits_ptr + image_offset + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    for k in tl.static_range(CLASSES):
        weight = tl.load(head_weight_ptr + k * out_channels + channel, mask=present, other=0.0)
        weight = weight[None, :] if PIXELS_AXIS == 0 else weight[:, None]
        logits = tl.sum(features * weight, 1 - PIXELS_AXIS) + tl.load(head_bias_ptr + k)
        logits = rounded(logits, logits_ptr.dtype.element_ty, UPCAST)
        tl.store(place, logits, mask=(h < height) & (w < width))
        place += stride_c  # of a large tensor k · stride_c does not fit 32 bits


@triton.jit
def store_moments(
    values, PIXELS_AXIS: tl.constexpr, inside, count, channel, present, moments_ptr, tile, out_channels,
):  # fmt: skip
    """Write number, sum and sum of squared distances from the mean of a tile's pixels, for each channel.

    The distances are from the tile's own mean, so that nothing cancels: sums of squares would lose every digit of a
    deviation of 1 around a mean of 1,000. Tiles are merged by Chan's formula.

    Args:
        values: of a tile, fp32; pixels along PIXELS_AXIS.
        inside: whether a pixel is in the picture.
        count: how many are, fp32.
        channel: of the other axis.
        present: whether that channel exists.
        moments_ptr: (tiles, 3, O) fp32.
        tile: which one this is.
        out_channels: O.
    """
    inside = inside[:, None] if PIXELS_AXIS == 0 else inside[None, :]
    total = tl.sum(tl.where(inside, values, 0.0), PIXELS_AXIS)
    mean = total / count
    apart = tl.where(inside, values - (mean[None, :] if PIXELS_AXIS == 0 else mean[:, None]), 0.0)
    place = moments_ptr + tile.to(tl.int64) * 3 * out_channels + channel
    tl.store(place, count, mask=present)
    tl.store(place + out_channels, total, mask=present)
    tl.store(place + 2 * out_channels, tl.sum(apart * apart, PIXELS_AXIS), mask=present)
