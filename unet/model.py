"""The U-Net: an encoder that halves the resolution, a decoder that doubles it, skips that concatenate.

Ronneberger, Fischer, Brox: U-Net: Convolutional Networks for Biomedical Image Segmentation (2015), in the form of
today's field: padded convolutions, BatchNorm, an output as large as the input.
"""

from __future__ import annotations

import contextlib
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

from unet.blocks import DoubleConv, Down, OutConv, Up


@torch.fx.wrap
def check_image(x: Tensor, weight: Tensor, depth: int, *, training: bool = False) -> Tensor:
    """Return `x` unchanged if a U-Net can take it, and say what is expected if not.

    One function, and known to torch.fx as a leaf: a test of the rank inside `forward` could not be traced.

    Args:
        x: what came; expected is (N, C, H, W) with H and W at least 2^depth, in the dtype of `weight`.
        weight: (K, C, 3, 3), the first convolution's, which says the channels and the dtype expected.
        depth: how often the network halves the resolution.
        training: whether BatchNorm is about to use the statistics of this batch.

    Raises:
        TypeError: the dtype is not the weights' (under autocast: not a float that autocast converts).
        ValueError: the rank, the channels or the size cannot be, or a training batch has one value per channel.
    """
    channels, smallest = weight.shape[1], 2**depth
    expected = f"expected (N, {channels}, H, W) with H and W at least {smallest}"
    if x.ndim != 4:  # noqa: PLR2004 - N, C, H, W
        hint = "; add the batch dimension: image[None]" if x.ndim == 3 else ""  # noqa: PLR2004 - C, H, W
        raise ValueError(f"the input has {x.ndim} dimensions, {tuple(x.shape)}: {expected}{hint}")
    batch, came, height, width = x.shape
    if came != channels:
        raise ValueError(f"the input has {came} channels, {tuple(x.shape)}: {expected}")
    if x.dtype != weight.dtype:
        autocast = torch.is_autocast_enabled(x.device.type)
        if not (autocast and x.is_floating_point() and x.dtype != torch.float64):
            raise TypeError(
                f"the input is {x.dtype}: expected {weight.dtype}, the weights' dtype; "
                f"convert it with image.to({weight.dtype}), and scale whole numbers, usually to 0…1"
            )
    if height < smallest or width < smallest:
        raise ValueError(f"the input is {height}×{width} pixels: {expected}, since it is halved {depth} times")
    if training and batch * (height // smallest) * (width // smallest) == 1:
        raise ValueError(
            f"training at batch 1 with {height}×{width} pixels leaves one value per channel at the bottleneck, and "
            f"BatchNorm has no variance of one value: expected a batch of 2 or more, or an image with a side of at "
            f"least {2 * smallest}; for inference call model.eval()"
        )
    return x


class _StatisticsKept:
    """Let BatchNorm compute what it computed, and save what it saved, without updating its running statistics.

    A context that can be entered again: the backward pass of a retained graph recomputes each time.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [m for m in module.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]

    def __enter__(self) -> None:
        self.before = [(layer.momentum, layer.num_batches_tracked) for layer in self.layers]
        for layer in self.layers:
            layer.momentum, layer.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for layer, (momentum, count) in zip(self.layers, self.before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count


def _is_traced(x: object) -> bool:
    """Whether torch.fx is tracing: a trace would freeze a flag, and can't hold a closure."""
    return isinstance(x, Proxy)


class UNet(nn.Module):
    """The U-Net, logits out: (N, n_channels, H, W) → (N, n_classes, H, W).

    H and W are at least 2^depth, of any parity. Width 64 and depth 4 have the field's keys, shapes and parameters:
    31,037,698 with transposed upsampling and 17,263,042 with bilinear, for 3 channels and 2 classes.

    Args:
        n_channels: channels of the image.
        n_classes: classes, that is channels of the logits.
        bilinear: upsample by interpolation instead of by transposed convolutions.
        width: channels of the first level; each level down has twice as many, but the lowest with bilinear.
        depth: how often the resolution is halved; at least 1.
        checkpoint_blocks: activation checkpointing: keep the inputs of each block for the backward pass and compute
            the rest again there. Same outputs, gradients and running statistics, less memory, about a third more
            time. It can be set on a model that exists, and a torch.fx trace leaves it out.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        n_channels: int,
        n_classes: int,
        bilinear: bool = False,  # noqa: FBT001, FBT002 - the field's signature
        width: int = 64,
        depth: int = 4,
        *,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"n_channels": n_channels, "n_classes": n_classes, "width": width, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}: expected 1 or more")
        self.n_channels, self.n_classes, self.bilinear = n_channels, n_classes, bilinear
        self.width, self.depth, self.checkpoint_blocks = width, depth, checkpoint_blocks
        factor = 2 if bilinear else 1

        self.inc = DoubleConv(n_channels, width)
        for i in range(1, depth + 1):
            out = width * 2**i // (factor if i == depth else 1)
            self.add_module(f"down{i}", Down(width * 2 ** (i - 1), out))
        for i in range(1, depth + 1):
            level = width * 2 ** (depth - i)
            self.add_module(f"up{i}", Up(2 * level, level // (1 if i == depth else factor), bilinear))
        self.outc = OutConv(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, n_channels, H, W) → logits (N, n_classes, H, W)."""
        logits: Tensor = self.outc(self.decode(self.encode(x)))
        return logits

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of each level, finest first: (N, width · 2^i, ⌊H/2^i⌋, ⌊W/2^i⌋) for i = 0 … depth.

        The last is the bottleneck's and has width · 2^(depth−1) channels with bilinear upsampling.

        Raises:
            TypeError, ValueError: as `check_image` says.
        """
        first = cast("nn.Conv2d", self.inc.double_conv[0])
        # A traced network leaves training at a 1×1 bottleneck to BatchNorm's own words.
        x = check_image(x, first.weight, self.depth, training=self.training and not _is_traced(x))
        features = [self.run(self.inc, x)]
        for i in range(1, self.depth + 1):
            features.append(self.run(self.get_submodule(f"down{i}"), features[-1]))
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        """What the head sees, (N, width, H, W), of what `encode` returned, which is left as it is."""
        *skips, x = features
        # Without gradients, each skip is freed once it is used, provided that the caller lets go of the list.
        del features
        for i in range(1, self.depth + 1):
            x = self.run(self.get_submodule(f"up{i}"), x, skips.pop())
        return x

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """block(*inputs), with its activations kept or computed again in the backward pass."""
        if not self.checkpoint_blocks or not torch.is_grad_enabled() or _is_traced(inputs[0]):
            return cast("Tensor", block(*inputs))
        if torch.compiler.is_compiling():
            # The compiler recomputes inside its graph, where each buffer is updated once, and takes no context.
            return cast("Tensor", checkpoint(block, *inputs, use_reentrant=False))
        contexts = contextlib.nullcontext(), _StatisticsKept(block)
        return cast("Tensor", checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: contexts))
