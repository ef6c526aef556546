"""Which U-Net a file of weights is of: channels, classes, width, depth and upsampling, from names and shapes alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from unet.files import CheckpointError, read
from unet.model import UNet
from unet.state import compare, find_tensors, migrate_biases, strip_prefixes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

FIRST, HEAD = "inc.double_conv.0.weight", "outc.conv.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The arguments of a `UNet`: `UNet(**dataclasses.asdict(found))` takes the weights."""

    n_channels: int
    n_classes: int
    bilinear: bool
    width: int
    depth: int


def deduce(state: Mapping[str, Tensor]) -> Architecture:
    """The network that has exactly these tensors.

    The first convolution is (width, n_channels, 3, 3), the head (n_classes, width, 1, 1); there are as many `down`s as
    levels, and a transposed convolution in `up1` or none. A network of these numbers is then compared tensor by tensor.

    Args:
        state: tensors by name, on any device; prefixes of wrappers may stand before the names.

    Raises:
        ValueError: no U-Net, or one with other layers; says what was found.
    """
    state = strip_prefixes(state)
    for name in (FIRST, HEAD):
        if name not in state or state[name].ndim != 4:  # noqa: PLR2004 - K, C, H, W
            few = ", ".join(list(state)[:3])
            raise ValueError(f"is no U-Net's: expected a convolution {name}, and the names begin with {few or 'none'}")
    levels = [int(place[1]) for name in state if (place := re.match(r"down(\d+)\.", name))]
    found = Architecture(
        n_channels=state[FIRST].shape[1],
        n_classes=state[HEAD].shape[0],
        bilinear="up1.up.weight" not in state,
        width=state[FIRST].shape[0],
        depth=max(levels, default=0),
    )
    try:
        with torch.device("meta"):
            expected = UNet(found.n_channels, found.n_classes, found.bilinear, found.width, found.depth).state_dict()
    except ValueError as error:
        raise ValueError(f"is no U-Net's: {error}") from error
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"is no U-Net's: no tensors are as large as those of {found}") from error
    ours = state.copy()
    migrate_biases(ours, expected)
    fit = compare(ours, expected)
    if fit.missing or fit.unexpected or fit.mismatched:
        raise ValueError(f"looks like a U-Net's ({found}), but differs from it: {fit}")
    return found


def architecture(path: str | Path) -> Architecture:
    """The network that the weights in a file are of; the file's tensors are mapped, not read.

    Args:
        path: as for `unet.checkpoint.load_weights`.

    Raises:
        CheckpointError: the file is missing, broken, hostile, or of no U-Net.
    """
    content = read(path, mmap=True)
    try:
        return deduce(find_tensors(content)[0])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
