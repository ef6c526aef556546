"""The loss of a fused model over many steps: no farther from eager's with its seed than eager's is with other seeds."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

import kernels
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = 10  # of a curve: steps scatter, their means are compared


def stray(one: Sequence[float], eager: Sequence[Sequence[float]]) -> float:
    """How far a curve is from eager's first, in units of the greatest distance between two of eager's.

    Over the whole curve, not block by block: late in training seeds come so near to each other that rounding alone
    would stray as far in one block of many.
    """
    apart, spread = _apart(one, eager[0]), max(itertools.starmap(_apart, itertools.combinations(eager, 2)))
    if apart == 0:
        return 0.0
    return apart / spread if math.isfinite(apart) and spread > 0 else math.inf


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return math.dist(_blocks(one), _blocks(other))


def _blocks(curve: Sequence[float]) -> list[float]:
    size = len(curve) // BLOCKS
    return [sum(curve[first : first + size]) / size for first in range(0, size * BLOCKS, size)]


def curve(model: nn.Module, *, steps: int, side: int, batch: int, device: torch.device) -> list[float]:
    """The losses of steps on crops of a photograph, the same for every model: where is it brighter than on average?"""
    import skimage

    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float().to(device) / 255
    around = F.avg_pool2d(image.mean(1, keepdim=True), 17, stride=1, padding=8)
    mask = (around > around.median()).long()[:, 0]
    corners = torch.randint(512 - side, (steps, batch, 2), generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses: list[Tensor] = []
    for places in corners:
        crops = [(slice(row, row + side), slice(column, column + side)) for row, column in places]
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(torch.cat([image[(..., *crop)] for crop in crops]))
        loss = F.cross_entropy(logits.float(), torch.cat([mask[(..., *crop)] for crop in crops]))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def seeded(seed: int, *, bilinear: bool, width: int, depth: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    model = UNet(3, 2, bilinear, width=width, depth=depth).to(device)
    return model.to(memory_format=torch.channels_last)


# Never run by those who wrote it: they had no GPU. What it computes with is tried on small models below.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bilinear", [False, True])
def test_two_hundred_steps_at_full_width_stray_no_farther_than_seeds_do(*, bilinear: bool) -> None:
    device = torch.device("cuda")
    models = [seeded(seed, bilinear=bilinear, width=64, depth=4, device=device) for seed in range(4)]
    fused = kernels.fuse(copy.deepcopy(models[0]), training=True)
    assert kernels.fusion_report(fused).chains_left == 0
    sizes = {"steps": 200, "side": 256, "batch": 4}
    eager = [curve(model, **sizes, device=device) for model in models]
    mine = curve(fused, **sizes, device=device)
    assert stray(mine, eager) <= 1, (mine, eager)
    assert _blocks(mine)[-1] < _blocks(mine)[0], mine


@pytest.mark.slow
def test_curves_of_small_models_stray_as_they_should() -> None:
    cpu = torch.device("cpu")
    sizes = {"steps": 60, "side": 16, "batch": 4}
    models = [seeded(seed, bilinear=False, width=4, depth=1, device=cpu) for seed in range(3)]
    again = copy.deepcopy(models[0])
    eager = [curve(model, **sizes, device=cpu) for model in models]
    assert all(_blocks(losses)[-1] < _blocks(losses)[0] for losses in eager)
    assert curve(again, **sizes, device=cpu) == eager[0], "the same crops for every model"
    assert stray(eager[0], eager) == 0
    assert all(0 < stray(losses, eager) <= 1 for losses in eager[1:])
    assert stray([eager[0][0]] * sizes["steps"], eager) > 1, "a loss that stays where it began"


def test_a_curve_strays_in_units_of_the_others_spread() -> None:
    falling = [1 / (1 + step / 20) for step in range(200)]
    eager = [falling, [loss * 1.1 for loss in falling], [loss * 0.9 for loss in falling]]
    for factor, expected in ((1.0, 0), (1.1, 0.5), (0.8, 1.0), (1.3, 1.5)):
        assert stray([loss * factor for loss in falling], eager) == pytest.approx(expected)
    # Wrong in its last block alone, or not a number once.
    assert stray([*falling[:180], *itertools.repeat(1.0, 20)], eager) > 1
    assert stray([*falling[:5], math.nan, *falling[6:]], eager) == math.inf
    assert stray(falling, [falling, falling]) == 0
    assert stray(eager[1], [falling, falling]) == math.inf
