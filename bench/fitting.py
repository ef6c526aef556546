"""The fit itself: a network and a picture, in a hundred steps.

It is short because of its second half. A step sees one crop, whose own mean and variance BatchNorm takes out, and
with them the colour that tells stain from tissue: a network trained so to the end has a Dice of about 0.92 in eval
mode. So half-way BatchNorm goes into eval mode, and the rest of the steps train the very function that is used
afterwards: 0.98.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.loss import segmentation_loss
from bench.picture import CHANNELS, CLASSES, source
from unet.model import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.fitted import Recipe

CROP = 64
HELD_OUT = (slice(0, 256), slice(256, 512))
"""Rows and columns of the picture that no crop touches: the quarter with the most even classes (56 % class 1)."""


def fitted(recipe: Recipe, progress: Callable[[int, int], None]) -> nn.Module:
    """Train for `steps` crops, the second half with BatchNorm in eval mode."""
    torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would reach the GPUs' too
    model = UNet(CHANNELS, CLASSES, bilinear=recipe.upsampling == "bilinear", width=recipe.width, depth=recipe.depth)
    model.train()
    rate = 1e-3
    # Fused: of so small a crop's step, PyTorch's usual loop over parameters would be a third.
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=recipe.steps)
    for step, (image, mask) in zip(range(recipe.steps), _crops(recipe), strict=False):
        if step == recipe.steps // 2:
            _freeze_statistics(model)
        optimizer.zero_grad()
        segmentation_loss(model(image), mask).backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, recipe.steps)
    return model.eval()


def _freeze_statistics(model: nn.Module) -> None:
    """Let BatchNorm use its running statistics from here on."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def _crops(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Give image (1, 3, s, s) and mask (1, s, s) of random crops outside the held-out part, without end.

    s is 64; a network deeper than 5 levels needs 128, since BatchNorm needs more than one pixel at the bottom.
    """
    image, mask = (torch.tensor(part)[None] for part in source())
    generator = torch.Generator().manual_seed(recipe.seed)
    size = max(CROP, 2 ** (recipe.depth + 1))
    rows, columns = HELD_OUT
    while True:
        tops = [torch.randint(0, side - size + 1, (), generator=generator).item() for side in mask.shape[1:]]
        top, left = (int(offset) for offset in tops)
        if top < rows.stop and rows.start < top + size and left < columns.stop and columns.start < left + size:
            continue
        window = (..., slice(top, top + size), slice(left, left + size))
        yield image[window], mask[window]


def held_out_dice(model: nn.Module) -> float:
    """Give Dice = 2 |P ∩ M| / (|P| + |M|) of class 1 on the held-out part."""
    image, mask = (torch.tensor(part)[(..., *HELD_OUT)][None] for part in source())
    with torch.inference_mode():
        predicted = model(image).argmax(1)
    return 2 * int((predicted & mask).sum()) / int(predicted.sum() + mask.sum())
