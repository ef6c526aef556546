"""Windows of 2×2 pixels: what the passes over a raw convolution have in common on the device.

A program holds WINDOWS windows of OUT_BLOCK channels, one pixel of each window after the other: a max-pool then needs
no other thread's values, and the channels of a pixel lie side by side in channels_last memory. Windows at an odd edge
are cut.

What goes together is handed on together: `block` is a program's own (`block_of`), `table` that of its channels
(`table_of`), `pixel` one of each window (`places`), `sizes` are (windows of all images, H, W, C).
"""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: ANN001, ANN201 - its arguments have no Python types
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# ruff: noqa: D417 - what all of them take is explained above
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from kernels.around import rounded


@triton.jit
def block_of(sizes, WINDOWS: tl.constexpr, OUT_BLOCK: tl.constexpr):
    """A program's windows and channels: (image, row and column of the first pixel, whether it exists; channel, same).

    Windows are numbered row by row, images after each other.
    """
    windows, height, width, channels = sizes
    window = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    channel = tl.program_id(1) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    wide = (width + 1) // 2
    per_image = (height + 1) // 2 * wide
    n = window // per_image
    h = window % per_image // wide * 2
    w = window % wide * 2
    return n.to(tl.int64), h, w, window < windows, channel, channel < channels


@triton.jit
def table_of(table_ptr, block, channels):
    """Of each channel of the block μ, 1 / σ, γ / σ, β.

    Args:
        table_ptr: (4, C) fp32: μ, 1 / σ, γ, β.
    """
    _, _, _, _, channel, present = block
    mean = tl.load(table_ptr + channel, mask=present, other=0.0)
    inverse = tl.load(table_ptr + channels + channel, mask=present, other=0.0)
    gamma = tl.load(table_ptr + 2 * channels + channel, mask=present, other=0.0)
    beta = tl.load(table_ptr + 3 * channels + channel, mask=present, other=0.0)
    return mean, inverse, gamma * inverse, beta


@triton.jit
def places(block, sizes, K: tl.constexpr):
    """Where pixel K of each window is: (image, row, column, whether it exists), the first three in 64 bits."""
    n, h, w, real, _, _ = block
    _, height, width, _ = sizes
    h += K // 2
    w += K % 2
    return n, h.to(tl.int64), w.to(tl.int64), real & (h < height) & (w < width)


@triton.jit
def normalized(z_ptr, pixel, block, table, sizes, RELU: tl.constexpr, UPCAST: tl.constexpr):
    """ẑ = (z - μ) / σ and y = (z - μ) · γ / σ + β, rounded to z's dtype and back, at a pixel of each window; fp32.

    Args:
        z_ptr: (N, H, W, C) contiguous.
        RELU: negative results become zero; NaN stays NaN, as in torch.relu.
        UPCAST: round by hand, for the interpreter's bf16.

    Returns:
        (where they are in z, whether they are there, ẑ, y).
    """
    n, h, w, there = pixel
    _, _, _, _, channel, present = block
    mean, inverse, scale, shift = table
    _, height, width, channels = sizes
    place = ((n * height + h) * width + w)[:, None] * channels + channel[None, :]
    mask = there[:, None] & present[None, :]
    apart = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    y = apart * scale[None, :] + shift[None, :]
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return place, mask, apart * inverse[None, :], rounded(y, z_ptr.dtype.element_ty, UPCAST).to(tl.float32)


@triton.jit
def largest_of(
    pooled_ptr, z_ptr, block, table, sizes,
    WINDOWS: tl.constexpr, OUT_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The maximum of y in each window; minus infinity where a max-pool does not follow (`pooled_ptr` is None).

    What is missing at an odd edge counts as minus infinity. The rest as `normalized` takes it.
    """
    largest = tl.full((WINDOWS, OUT_BLOCK), float("-inf"), tl.float32)
    if pooled_ptr is not None:
        for k in tl.static_range(4):
            _, mask, _, y = normalized(z_ptr, places(block, sizes, k), block, table, sizes, RELU, UPCAST)
            largest = tl.maximum(largest, tl.where(mask, y, float("-inf")))
    return largest


@triton.jit
def gradient_at(
    dy_ptr, pooled_ptr, z_ptr, block, table, sizes, dy_strides, pooled_strides, largest, taken,
    K: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of (z - μ) · γ / σ + β at pixel K of each window: of y, and of the maximum where it is the first one.

    Args:
        dy_ptr: (N, C, H, W) with strides.
        pooled_ptr: (N, C, H // 2, W // 2) with strides, or None.
        z_ptr: (N, H, W, C) contiguous.
        dy_strides: of n, c, h, w.
        pooled_strides: the same.
        largest: the maximum of each window.
        taken: whether a pixel before this one was its window's maximum.
        RELU: a gradient passes where the feature is not zero or less.
        UPCAST: round by hand, for the interpreter's bf16.

    Returns:
        (where the pixels are in z, whether they are there, ẑ, the gradient in fp32, `taken` with these pixels).
    """
    pixel = places(block, sizes, K)
    place, mask, centred, y = normalized(z_ptr, pixel, block, table, sizes, RELU, UPCAST)
    n, h, w, _ = pixel
    _, _, _, _, channel, _ = block
    _, height, width, _ = sizes
    dy_n, dy_c, dy_h, dy_w = dy_strides
    across = (channel.to(tl.int64) * dy_c)[None, :]
    gradient = tl.load(dy_ptr + (n * dy_n + h * dy_h + w * dy_w)[:, None] + across, mask=mask, other=0.0).to(tl.float32)
    if pooled_ptr is not None:
        pooled_n, pooled_c, pooled_h, pooled_w = pooled_strides
        first = (y == largest) & (taken == 0)
        taken = tl.where(first, 1, taken)
        whole = ((h // 2 < height // 2) & (w // 2 < width // 2))[:, None]
        across = (channel.to(tl.int64) * pooled_c)[None, :]
        window = (n * pooled_n + h // 2 * pooled_h + w // 2 * pooled_w)[:, None] + across
        gradient += tl.load(pooled_ptr + window, mask=mask & first & whole, other=0.0).to(tl.float32)
    if RELU:  # of a NaN the gradient passes, as in torch.relu
        gradient = tl.where(y <= 0.0, 0.0, gradient)
    return place, mask, centred, gradient, taken
