"""Files that others wrote: older ones of ours, with biases, with more than tensors in them."""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from unet import UNet
from unet.checkpoint import (
    CheckpointError,
    load_weights,
    save_model,
    save_training,
    save_weights,
)

from .conftest import same

if TYPE_CHECKING:
    from collections.abc import Callable


X = torch.linspace(-1, 1, 3 * 32 * 40).view(1, 3, 32, 40)


@pytest.mark.parametrize("bilinear", [False, True])
def test_an_older_checkpoint_with_biases_is_migrated_exactly(
    alive: Callable[..., UNet], tmp_path: Path, *, bilinear: bool
) -> None:
    path = tmp_path / "file.pt"
    old = alive(bilinear=bilinear)
    for block in [m for m in old.modules() if isinstance(m, nn.Sequential) and len(m) == 6]:
        for conv in (block[0], block[3]):
            conv.bias = nn.Parameter(torch.randn(conv.out_channels) / 4)
    torch.save(DataParallel(old).state_dict(), path)
    assert len(old.state_dict()) == (128 if bilinear else 136)
    model = UNet(3, 2, bilinear, 4)
    report = load_weights(model, path)
    assert len(report.migrated) == 18
    assert "folded: inc.double_conv.0.bias, inc.double_conv.3.bias" in str(report)
    expected = old.inc.double_conv[1].running_mean - old.inc.double_conv[0].bias
    assert torch.equal(model.inc.double_conv[1].running_mean, expected.detach())
    torch.testing.assert_close(model.eval().double()(X.double()), old.double()(X.double()), rtol=1e-5, atol=1e-6)
    # In training a bias cancels.
    x = torch.cat([X, X.flip(3)]).double()
    torch.testing.assert_close(model.train()(x), old.train()(x), rtol=1e-5, atol=1e-6)


def test_a_bias_that_the_network_has_itself_is_not_folded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_weights(model, tmp_path / "file.pt")
    report = load_weights(copy.deepcopy(model), tmp_path / "file.pt")
    assert (report.migrated, report.loaded) == ((), 7)


def test_a_bias_with_nothing_to_fold_into_is_unexpected(alive: Callable[..., UNet], tmp_path: Path) -> None:
    state = OrderedDict(alive().state_dict())
    state["inc.double_conv.3.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"1 unexpected .inc.double_conv.3.bias"):
        load_weights(alive(), tmp_path / "file.pt")


@pytest.mark.parametrize("place", ["model", "state_dict", "model_state_dict", None])
def test_mask_values_and_arguments_beside_the_tensors_are_tolerated_and_returned(
    alive: Callable[..., UNet], tmp_path: Path, place: str | None
) -> None:
    model, path = alive(), tmp_path / "file.pt"
    state = model.state_dict()
    state["mask_values"] = [0, 255]
    torch.save(state if place is None else {place: state, "args": argparse.Namespace(lr=0.1)}, path)
    target = UNet(3, 2, width=4)
    assert load_weights(target, path).extras == {"mask_values": [0, 255]}
    assert same(target, model)
    save_weights(model, path, mask_values=[0, 1], note=Path("a/b"), args=argparse.Namespace(lr=1))
    assert load_weights(target, path).extras == {"mask_values": [0, 1], "note": "a/b", "args": {"lr": 1}}


def test_the_bound_method_is_recognised(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(), tmp_path / "file.pt"
    torch.save(model.state_dict, path)
    with pytest.raises(CheckpointError, match=r"method `model.state_dict`, saved without calling it"):
        load_weights(model, path)
    with pytest.raises(
        CheckpointError, match=r"holds a method; expected a state_dict; it was saved without calling it"
    ):
        load_weights(model, path, trusted=True)


def test_an_assignment_to_state_dict_is_recognised(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(), tmp_path / "file.pt"
    save_weights(model, path)
    model.state_dict = torch.load(path)
    for act in (
        lambda: save_weights(model, path),
        lambda: save_model(model, path),
        lambda: load_weights(model, path),
        lambda: save_training(model, path, epoch=1),
    ):
        with pytest.raises(TypeError, match=r"model.state_dict was assigned to, which loads nothing"):
            act()
