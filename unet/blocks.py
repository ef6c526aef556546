"""The four blocks of the U-Net: DoubleConv, Down, Up, OutConv.

Shapes are NCHW. Names of submodules, and so the keys of a checkpoint, are the field's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.fx.wrap
def pad_to(x: Tensor, like: Tensor) -> Tensor:
    """Pad `x` with zeros, on the right and at the bottom, to the height and width of `like`.

    Args:
        x: (N, C, h, w).
        like: (N, D, H, W) with H ≥ h and W ≥ w; in the U-Net each is 0 or 1 larger, since pooling drops an odd row.

    Returns:
        (N, C, H, W), or `x` itself where nothing is missing.
    """
    down = like.shape[-2] - x.shape[-2]
    right = like.shape[-1] - x.shape[-1]
    # A padding by nothing is a copy in eager mode. A compiler removes it by itself, and must not branch on a size:
    # that would fix the parity of a dynamic height or width.
    if not torch.compiler.is_compiling() and down == 0 and right == 0:
        return x
    return nn.functional.pad(x, [0, right, 0, down])


class DoubleConv(nn.Module):
    """relu(bn(conv(relu(bn(conv(x)))))): twice a 3×3 convolution without bias, BatchNorm and a ReLU in place.

    Shapes: (N, in_channels, H, W) → (N, out_channels, H, W).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        mid_channels: channels between the two convolutions; `out_channels` where not given.
    """

    def __init__(self, in_channels: int, out_channels: int, mid_channels: int | None = None) -> None:
        super().__init__()
        mid_channels = out_channels if mid_channels is None else mid_channels
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, out_channels, H, W)."""
        out: Tensor = self.double_conv(x)
        return out


class Down(nn.Module):
    """double_conv(max_pool2(x)): half the resolution, an odd last row or column dropped.

    Shapes: (N, in_channels, H, W) → (N, out_channels, ⌊H/2⌋, ⌊W/2⌋).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, out_channels, ⌊H/2⌋, ⌊W/2⌋)."""
        out: Tensor = self.maxpool_conv(x)
        return out


class Up(nn.Module):
    """double_conv([skip, up(x)]): twice the resolution, the skip concatenated (first), not added.

    Shapes: x (N, C, h, w) and skip (N, in_channels / 2, H, W), where H is 2h or 2h + 1 and W likewise,
    → (N, out_channels, H, W). C is `in_channels` with transposed upsampling, which halves the channels itself,
    and `in_channels / 2` with bilinear upsampling, which keeps them.

    Args:
        in_channels: channels after the concatenation; even.
        out_channels: channels of the output.
        bilinear: upsample by interpolation (`align_corners=True`), not by a transposed 2×2 convolution of stride 2.
    """

    def __init__(self, in_channels: int, out_channels: int, bilinear: bool = False) -> None:  # noqa: FBT001, FBT002 - the field's signature
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(in_channels, out_channels, in_channels // 2)
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
            self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample x (N, C, h, w) beside skip (N, in_channels / 2, H, W) → (N, out_channels, H, W)."""
        out: Tensor = self.conv(torch.cat([skip, pad_to(self.up(x), skip)], 1))
        return out


class OutConv(nn.Module):
    """Wx + b at every pixel: the 1×1 convolution that makes logits of features.

    Shapes: (N, in_channels, H, W) → (N, out_channels, H, W).

    Args:
        in_channels: channels of the features.
        out_channels: classes.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, out_channels, H, W)."""
        out: Tensor = self.conv(x)
        return out
