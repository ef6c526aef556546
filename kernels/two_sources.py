"""The second source of a convolution: where it lies beside the first, and the same joined in plain PyTorch.

A decoder concatenates a skip (N, C, H, W) with a map from the level below, interpolated to twice its size or not, and
zero padded to H×W where an odd size was halved on the way. The kernel reads both where they are.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor

# How a map that is smaller than the skip lies in it: it may not be smaller, it begins at the first pixel, or what is
# missing is split, the smaller half before it.
Placement = Literal["exact", "end", "centre"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


def padding(missing: int, placement: str) -> tuple[int, int]:
    """Zeros before and behind, along one axis; negative ones crop."""
    before = missing // 2 if placement == "centre" else 0
    return before, missing - before


def missing(x: torch.Size, second: torch.Size, *, upsample: bool) -> tuple[int, int]:
    """Rows and columns that a second source of this shape, interpolated if `upsample`, has less than the first."""
    times = 2 if upsample else 1
    return x[2] - times * second[2], x[3] - times * second[3]


def check(x: Tensor, second: Tensor, placement: str, *, upsample: bool) -> None:
    """Refuse what can't be joined.

    Raises:
        RuntimeError: rank, batch, dtype, device or size do not belong together.
    """
    torch._check(placement in PLACEMENTS, lambda: f"placement is one of {PLACEMENTS}; given {placement!r}")  # noqa: SLF001
    torch._check(  # noqa: SLF001
        second.dim() == 4 and second.shape[0] == x.shape[0] and second.shape[2] > 0 and second.shape[3] > 0,  # noqa: PLR2004
        lambda: f"the second source is (N, C, h, w) with N of the first, {tuple(x.shape)}; given {tuple(second.shape)}",
    )
    torch._check(  # noqa: SLF001
        second.dtype == x.dtype and second.device == x.device,
        lambda: (
            f"both sources have one dtype and device; given {x.dtype} on {x.device}, {second.dtype} on {second.device}"
        ),
    )
    if placement == "exact":
        rows, columns = missing(x.shape, second.shape, upsample=upsample)
        torch._check(  # noqa: SLF001
            rows == 0 and columns == 0,
            lambda: (
                f"without padding both sources have one size; given {tuple(x.shape[2:])} and {tuple(second.shape[2:])}"
                f"{', interpolated to twice that' if upsample else ''}"
            ),
        )


def joined(x: Tensor, second: Tensor | None, placement: str, *, upsample: bool) -> Tensor:
    """[x, pad(up(second))] along the channels, in plain PyTorch: (N, C + D, H, W)."""
    return x if second is None else torch.cat([x, placed(x.shape, second, placement, upsample=upsample)], 1)


def placed(x: torch.Size, second: Tensor, placement: str, *, upsample: bool) -> Tensor:
    """pad(up(second)) beside a first source of shape `x`, in plain PyTorch: (N, D, H, W)."""
    rows, columns = missing(x, second.shape, upsample=upsample)
    if upsample:
        second = F.interpolate(second, scale_factor=2, mode="bilinear", align_corners=True)
    return F.pad(second, [*padding(columns, placement), *padding(rows, placement)])


def split_gradient(
    gradient: Tensor, x: torch.Size, second: torch.Size | None, placement: str, *, upsample: bool
) -> tuple[Tensor, Tensor | None]:
    """Turn the gradient of `joined` into those of sources of these shapes."""
    if second is None:
        return gradient, None
    rows, columns = missing(x, second, upsample=upsample)
    ends = (*padding(columns, placement), *padding(rows, placement))
    below = F.pad(gradient[:, x[1] :], [-end for end in ends])
    if upsample:
        # Not aten's own backward, which takes no symbolic sizes (torch 2.13) and has no fixed order of its sums.
        vertical, horizontal = (_doubling(size, below.device) for size in second[2:])
        below = (vertical.T @ below.float() @ horizontal).to(gradient.dtype)
    return gradient[:, : x[1]], below


def _doubling(size: int, device: torch.device) -> Tensor:
    """Linear interpolation of `size` values to twice as many, corners aligned, as a matrix (2 · size, size) in fp32."""
    positions = torch.arange(2 * size, device=device) * ((size - 1) / (2 * size - 1))
    return (1 - (positions[:, None] - torch.arange(size, device=device)).abs()).clamp(min=0)


def laid(x: Tensor, second: Tensor, placement: str, *, upsample: bool) -> tuple[Tensor, int, int]:
    """Say where the kernel finds `second`: (what of it to read, the row and the column of x at which that begins).

    What would be cropped is a view without it; a map yet to be interpolated stays whole, and may begin before x does.
    """
    rows, columns = missing(x.shape, second.shape, upsample=upsample)
    top, left = padding(rows, placement)[0], padding(columns, placement)[0]
    if upsample:
        return second, top, left
    second = second[:, :, max(-top, 0) : x.shape[2] - top, max(-left, 0) : x.shape[3] - left]
    return second, max(top, 0), max(left, 0)
