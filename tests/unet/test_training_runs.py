"""A training run that is stopped, saved and resumed is the one that was not stopped."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from unet import UNet
from unet.checkpoint import (
    CheckpointError,
    load_training,
    load_weights,
    save_training,
    save_weights,
)

from .conftest import same

if TYPE_CHECKING:
    from collections.abc import Callable


def run(model: nn.Module, parts: tuple[Any, Any, Any], steps: int) -> None:
    optimizer, scheduler, scaler = parts
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.rand(2, 3, 16, 16)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()


def parts_for(model: nn.Module) -> tuple[Any, Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), torch.amp.GradScaler("cpu", init_scale=8.0)


@pytest.mark.parametrize("wrapper", [lambda model: model, DataParallel])
def test_a_resumed_run_equals_one_that_did_not_stop_to_the_bit(
    alive: Callable[..., UNet], tmp_path: Path, wrapper: Callable[[nn.Module], nn.Module]
) -> None:
    path = tmp_path / "run.pt"
    model = wrapper(alive(depth=2)).train()
    parts = parts_for(model)
    run(model, parts, 3)
    named = dict(zip(("optimizer", "scheduler", "scaler"), parts, strict=True))
    arguments = argparse.Namespace(lr=0.01, out=Path("runs"), sizes=(1, 2), amp=False, nested={"a": {1, 2}})
    save_training(model, path, epoch=3, arguments=arguments, **named)
    run(model, parts, 3)

    resumed = UNet(3, 2, width=4, depth=2)
    fresh = parts_for(resumed)
    named = dict(zip(("optimizer", "scheduler", "scaler"), fresh, strict=True))
    training = load_training(resumed, path, restore_random_state=True, **named)
    assert (training.epoch, training.report.loaded) == (3, 66)
    assert training.arguments == {"lr": 0.01, "out": "runs", "sizes": (1, 2), "amp": False, "nested": {"a": {1, 2}}}
    run(resumed, fresh, 3)
    assert same(resumed, model)
    assert fresh[1].get_last_lr() == parts[1].get_last_lr() == [0.00125]
    assert fresh[2].get_scale() == parts[2].get_scale()
    assert load_weights(UNet(3, 2, width=4, depth=2), path).loaded == 66


def test_the_random_state_is_left_alone_unless_asked_for(alive: Callable[..., UNet], tmp_path: Path) -> None:
    model, path = alive(depth=1), tmp_path / "run.pt"
    saved = torch.get_rng_state()
    save_training(model, path, epoch=1)
    torch.rand(1)
    before = torch.get_rng_state()
    assert load_training(model, path).arguments == {}
    assert torch.equal(torch.get_rng_state(), before)
    load_training(model, path, restore_random_state=True)
    assert torch.equal(torch.get_rng_state(), saved)


def test_what_could_not_be_read_back_is_refused_when_saved_by_name(alive: Callable[..., UNet], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    class Odd(float):
        pass

    for arguments, said in (
        ({"a": {"b": [1, Odd(2)]}}, r"arguments.a.b\[1\] is a .*Odd: expected tensors and plain data"),
        ({"f": run}, "arguments.f is a builtins.function"),
    ):
        with pytest.raises(TypeError, match=said):
            save_training(alive(depth=1), path, epoch=1, arguments=arguments)
    model = alive(depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=Odd(0.1))
    with pytest.raises(TypeError, match=r"optimizer.param_groups\[0\].lr is a .*Odd"):
        save_training(model, path, epoch=1, optimizer=optimizer)
    with pytest.raises(TypeError, match=r"mask_values is a builtins.object"):
        save_weights(alive(depth=1), path, mask_values=object())
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_fit_is_refused_and_the_model_untouched(alive: Callable[..., UNet], tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model = alive(depth=1)
    save_training(model, path, epoch=1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    target = UNet(3, 2, width=4, depth=1)
    before = copy.deepcopy(target)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"has no state for the scheduler; it has model, optimizer, epoch"):
        load_training(target, path, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1))
    short = torch.optim.SGD(list(target.parameters())[:3], lr=0.1)
    with pytest.raises(CheckpointError, match=r"state of the optimizer does not fit: .*parameter group"):
        load_training(target, path, optimizer=short)
    with pytest.raises(CheckpointError, match=r"does not fit this UNet"):
        load_training(UNet(3, 3, width=4, depth=1), path)
    save_weights(model, path)
    with pytest.raises(CheckpointError, match=r"is no training checkpoint; for weights alone use load_weights"):
        load_training(target, path)
    # As tutorials write them.
    torch.save({"epoch": 3, "model_state_dict": model.state_dict(), "loss": 0.5}, path)
    with pytest.raises(CheckpointError, match=r"run\.pt: was not written by save_training; for weights alone use load"):
        load_training(target, path, restore_random_state=True)
    assert load_weights(copy.deepcopy(target), path).loaded > 0
    assert same(target, before)
