"""Windows of 2×2 pixels: what the passes over a raw convolution have in common on the device.

A program holds WINDOWS windows of OUT_BLOCK channels, one pixel of each window after the other: a max-pool then needs
no other thread's values, and the channels of a pixel lie side by side in channels_last memory. Windows at an odd edge
are cut.
"""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: ANN001, ANN201 - its arguments have no Python types
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# ruff: noqa: D417 - sizes and strides are explained where the kernels are
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from kernels.around import rounded


@triton.jit
def places(
    window, windows, height, width, K: tl.constexpr,
):  # fmt: skip
    """Where pixel K of each window is: (image, row, column, whether it exists), the first three in 64 bits.

    Args:
        window: numbers of windows, images after each other, row by row.
        windows: how many there are.
    """
    high = (height + 1) // 2
    wide = (width + 1) // 2
    n = window // (high * wide)
    h = window % (high * wide) // wide * 2 + K // 2
    w = window % wide * 2 + K % 2
    there = (window < windows) & (h < height) & (w < width)
    return n.to(tl.int64), h.to(tl.int64), w.to(tl.int64), there


@triton.jit
def normalized(
    z_ptr, n, h, w, there, channel, present, mean, inverse, scale, shift, height, width, channels,
    RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ẑ = (z - μ) / σ and y = (z - μ) · γ / σ + β, rounded to z's dtype and back, at a pixel of each window; fp32.

    Args:
        z_ptr: (N, H, W, C) contiguous.
        mean: μ of each channel of the block.
        inverse: 1 / σ.
        scale: γ / σ.
        shift: β.
        RELU: negative results become zero; NaN stays NaN, as in torch.relu.
    """
    place = ((n * height + h) * width + w)[:, None] * channels + channel[None, :]
    apart = tl.load(z_ptr + place, mask=there[:, None] & present[None, :], other=0.0).to(tl.float32) - mean[None, :]
    y = apart * scale[None, :] + shift[None, :]
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return apart * inverse[None, :], rounded(y, z_ptr.dtype.element_ty, UPCAST).to(tl.float32)


@triton.jit
def table_of(table_ptr, channel, present, channels):
    """The four rows of a table, each of a block of channels: μ, 1 / σ, γ, β."""
    mean = tl.load(table_ptr + channel, mask=present, other=0.0)
    inverse = tl.load(table_ptr + channels + channel, mask=present, other=0.0)
    gamma = tl.load(table_ptr + 2 * channels + channel, mask=present, other=0.0)
    beta = tl.load(table_ptr + 3 * channels + channel, mask=present, other=0.0)
    return mean, inverse, gamma, beta


@triton.jit
def largest_of(
    z_ptr, window, windows, channel, present, mean, inverse, scale, shift, height, width, channels,
    WINDOWS: tl.constexpr, OUT_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The maximum of y in each window; what is missing at an odd edge counts as minus infinity."""
    largest = tl.full((WINDOWS, OUT_BLOCK), float("-inf"), tl.float32)
    for k in tl.static_range(4):
        n, h, w, there = places(window, windows, height, width, k)
        _, y = normalized(
            z_ptr, n, h, w, there, channel, present, mean, inverse, scale, shift, height, width, channels, RELU, UPCAST
        )
        largest = tl.maximum(largest, tl.where(there[:, None], y, float("-inf")))
    return largest


@triton.jit
def gradient_behind(
    dy_ptr, pooled_ptr, n, h, w, there, channel, present, y, largest, taken, height, width,
    dy_n, dy_c, dy_h, dy_w, pooled_n, pooled_c, pooled_h, pooled_w,
    RELU: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Gradient of (z - μ) · γ / σ + β at a pixel of each window: of y, and of the maximum where it is the first one.

    Args:
        dy_ptr: (N, C, H, W) with strides.
        pooled_ptr: (N, C, H // 2, W // 2) with strides.
        y: the features there, rounded.
        largest: the maximum of each window.
        taken: whether a pixel before this one was its window's maximum.

    Returns:
        (the gradient in fp32, `taken` with this pixel).
    """
    mask = there[:, None] & present[None, :]
    across = (channel.to(tl.int64) * dy_c)[None, :]
    gradient = tl.load(dy_ptr + (n * dy_n + h * dy_h + w * dy_w)[:, None] + across, mask=mask, other=0.0).to(tl.float32)
    if POOL:
        first = (y == largest) & (taken == 0)
        taken = tl.where(first, 1, taken)
        whole = ((h // 2 < height // 2) & (w // 2 < width // 2))[:, None]
        across = (channel.to(tl.int64) * pooled_c)[None, :]
        place = (n * pooled_n + h // 2 * pooled_h + w // 2 * pooled_w)[:, None] + across
        gradient += tl.load(pooled_ptr + place, mask=mask & first & whole, other=0.0).to(tl.float32)
    if RELU:  # of a NaN the gradient passes, as in torch.relu
        gradient = tl.where(y <= 0.0, 0.0, gradient)
    return gradient, taken
