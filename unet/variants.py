"""U-Nets with another input beside the image, or other outputs beside the logits.

They have the keys of `UNet` and a few more; `unet.modify` makes one of a model that exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unet.blocks import OutConv
from unet.model import UNet


class VectorUNet(UNet):
    """A U-Net told something about each image: the features at the bottleneck get W v added at every pixel.

    Adding W v is what a 1×1 convolution over [features, v as constant planes] would add. W starts at zero, and so
    with the outputs of the network without it.

    Shapes: image (N, n_channels, H, W) and vector (N, vector_size) → logits (N, n_classes, H, W).

    Args:
        *args: as for `UNet`.
        vector_size: numbers per image; 1 for a scalar.
        **kwargs: as for `UNet`.
    """

    def __init__(self, *args: Any, vector_size: int, **kwargs: Any) -> None:  # noqa: ANN401 - UNet's own
        super().__init__(*args, **kwargs)
        if vector_size < 1:
            raise ValueError(f"vector_size is {vector_size}: expected 1 or more")
        self.vector_size = vector_size
        self.embed = nn.Linear(vector_size, self.width * 2**self.depth // (2 if self.bilinear else 1), bias=False)
        nn.init.zeros_(self.embed.weight)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:  # type: ignore[override] # a second input
        """Image (N, n_channels, H, W), vector (N, vector_size) → logits (N, n_classes, H, W).

        Raises:
            TypeError, ValueError: an input that does not fit; see `check_image` and `check_vector`.
        """
        *skips, bottleneck = self.encode(image)
        vector = check_vector(vector, bottleneck, self.vector_size)
        bottleneck = bottleneck + self.embed(vector)[:, :, None, None]
        logits: Tensor = self.outc(self.decode([*skips, bottleneck]))
        return logits


class PlaneUNet(UNet):
    """A U-Net that sees further planes beside the image, say a depth map, a prompt or a coordinate.

    Shapes: image (N, n_channels, H, W) and planes (N, planes, H, W) → logits (N, n_classes, H, W). The first
    convolution has n_channels + planes input channels; `n_channels` remains the image's.

    Args:
        n_channels: channels of the image.
        *args: as for `UNet`.
        planes: channels beside the image's.
        **kwargs: as for `UNet`.
    """

    def __init__(self, n_channels: int, *args: Any, planes: int = 1, **kwargs: Any) -> None:  # noqa: ANN401 - UNet's own
        if planes < 1:
            raise ValueError(f"planes is {planes}: expected 1 or more")
        super().__init__(n_channels + planes, *args, **kwargs)
        self.n_channels, self.planes = n_channels, planes

    def forward(self, image: Tensor, planes: Tensor) -> Tensor:  # type: ignore[override] # a second input
        """Image (N, n_channels, H, W), planes (N, planes, H, W) → logits (N, n_classes, H, W).

        Raises:
            TypeError, ValueError: an input that does not fit; see `check_image` and `join_planes`.
        """
        return super().forward(join_planes(image, planes, self.planes))


class SupervisedUNet(UNet):
    """A U-Net with a head at every level of the decoder, for a loss at each (deep supervision).

    Shapes: (N, n_channels, H, W) → (logits (N, n_classes, H, W), then one (N, n_classes, ⌊H/2^i⌋, ⌊W/2^i⌋) for
    i = 1 … depth − 1, finest first).

    Args:
        *args: as for `UNet`.
        **kwargs: as for `UNet`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - UNet's own
        super().__init__(*args, **kwargs)
        factor = 2 if self.bilinear else 1
        self.heads = nn.ModuleList(OutConv(self.width * 2**i // factor, self.n_classes) for i in range(1, self.depth))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override] # further outputs
        """(N, n_channels, H, W) → logits of every level, finest first."""
        *skips, x = self.encode(x)
        outputs = []
        for i in range(1, self.depth + 1):
            x = self.run(self.get_submodule(f"up{i}"), x, skips.pop())
            outputs.append(self.outc(x) if i == self.depth else self.heads[self.depth - 1 - i](x))
        return tuple(outputs[::-1])


class FeatureUNet(UNet):
    """A U-Net that also returns the features at its bottleneck, for a classifier, an embedding or a second loss.

    The features are the block's output, after its ReLU; no later layer writes into them.

    Shapes: (N, n_channels, H, W) → (logits (N, n_classes, H, W), features (N, C, ⌊H/2^depth⌋, ⌊W/2^depth⌋)), where
    C = width · 2^depth, and half of it with bilinear upsampling.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override] # a further output
        """(N, n_channels, H, W) → (logits, features at the bottleneck)."""
        features = self.encode(x)
        return self.outc(self.decode(features)), features[-1]


@torch.fx.wrap
def check_vector(vector: Tensor, features: Tensor, size: int) -> Tensor:
    """Return `vector` unchanged if it is (N, size) in the dtype of `features` (N, …).

    Raises:
        TypeError: another dtype (outside autocast).
        ValueError: another shape.
    """
    if vector.ndim != 2 or vector.shape[0] != features.shape[0] or vector.shape[1] != size:  # noqa: PLR2004 - N, size
        raise ValueError(
            f"the vector is {tuple(vector.shape)}: expected ({features.shape[0]}, {size}), a row per image"
        )
    if vector.dtype != features.dtype and not torch.is_autocast_enabled(vector.device.type):
        raise TypeError(f"the vector is {vector.dtype}: expected {features.dtype}, the image's dtype")
    return vector


@torch.fx.wrap
def join_planes(image: Tensor, planes: Tensor, count: int) -> Tensor:
    """Concatenate image (N, C, H, W) and planes (N, count, H, W) to (N, C + count, H, W).

    Raises:
        TypeError: different dtypes, which concatenation would quietly promote.
        ValueError: planes of another shape.
    """
    fits = image.ndim == planes.ndim == 4 and planes.shape[1] == count  # noqa: PLR2004 - N, C, H, W
    if not fits or planes.shape[0] != image.shape[0] or planes.shape[2:] != image.shape[2:]:
        raise ValueError(
            f"the planes are {tuple(planes.shape)}: expected (N, {count}, H, W) beside an image (N, C, H, W) of the "
            f"same N, H and W, here {tuple(image.shape)}"
        )
    if planes.dtype != image.dtype:
        raise TypeError(f"the planes are {planes.dtype}: expected {image.dtype}, the image's dtype")
    return torch.cat([image, planes], 1)
