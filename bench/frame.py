"""How an image that is no multiple of 2^depth, or is too large, goes through a network: whole, padded, or by tiles.

`whole` is the network's own way and exact by definition: what pooling drops of an odd row or column is padded after
upsampling. `padded` mirrors the image at its right and bottom up to a multiple of 2^depth and cuts the logits, as
engines of fixed sizes want it: near those edges that is another function. `tiled` goes tile by tile (`unet.tiling`),
exact with transposed upsampling and nearly so with bilinear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unet.tiling import predict

if TYPE_CHECKING:
    from collections.abc import Callable

CORE, HALO, BLEND = 20, 6, 2
"""Of a tile, in units of 2^depth: at depth 4 a tile of 512 pixels, 96 of them halo on each side."""


def through(call: Callable[..., Any], frame: str, depth: int, *inputs: Tensor) -> Any:  # noqa: ANN401 (whatever it gives)
    """What `call` gives for whole images, handed to it as `frame` says.

    Args:
        call: (N, C, H, W) to logits (N, classes, H, W); for `whole` anything.
        frame: whole, padded or tiled.
        depth: how often the network halves the resolution.
        *inputs: images; for `whole` all that `call` takes.
    """
    if frame == "padded":
        return _padded(call, inputs[0], 2**depth)
    if frame == "tiled":
        return _tiled(call, inputs[0], depth)
    return call(*inputs)


def _padded(call: Callable[..., Any], image: Tensor, step: int) -> Tensor:
    height, width = image.shape[2:]
    down, right = -height % step, -width % step
    if down or right:
        layout = torch.contiguous_format if image.is_contiguous() else torch.channels_last
        image = nn.functional.pad(image, [0, right, 0, down], mode="reflect").contiguous(memory_format=layout)
    logits: Tensor = call(image)
    return logits[:, :, :height, :width]


def _tiled(call: Callable[..., Any], image: Tensor, depth: int) -> Tensor:
    step = 2**depth
    tile, halo, blend = ((part * step) for part in (CORE + 2 * HALO, HALO, BLEND))
    return predict(_Network(call, image.device).eval(), image, tile=tile, halo=halo, blend=blend, depth=depth)


class _Network(nn.Module):
    """A callable in a module's clothes: tiling asks a network for its device and mode."""

    def __init__(self, call: Callable[..., Any], device: torch.device) -> None:
        super().__init__()
        self.call = call
        self.where = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, image: Tensor) -> Any:  # noqa: ANN401 (whatever the network gives)
        return self.call(image)
