"""Saving and resuming a training run: the network, and what drives it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from unet.files import CheckpointError, plain, read, write
from unet.loading import LoadReport, prepare, report
from unet.state import state_of, unwrap

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


class Stateful(Protocol):
    """What can be saved beside a model: an optimizer, a scheduler, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and plain data."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:  # noqa: ANN401 - ignored
        """Take all of it back."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Where a training run stood: epochs done, the arguments it was started with, and what was loaded."""

    epoch: int
    arguments: dict[str, Any]
    report: LoadReport


def save_training(
    model: nn.Module,
    path: str | Path,
    *,
    epoch: int,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    arguments: Mapping[str, Any] | argparse.Namespace | None = None,
) -> None:
    """Write all that a training run needs to go on, with torch's CPU random state, atomically.

    Args:
        model: the network, wrapped or not.
        path: the file.
        epoch: epochs done.
        optimizer: if there is one.
        scheduler: if there is one.
        scaler: if there is one.
        arguments: of the run; a Namespace is kept as a plain dict, a Path as text.

    Raises:
        TypeError: something is not plain data and could not be read back safely; says where it stands.
        OSError: the file can't be written.
    """
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else dict(arguments or {})
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    content = {
        "model": state_of(model),
        **{name: plain(part.state_dict(), name) for name, part in parts.items() if part is not None},
        "epoch": epoch,
        "arguments": plain(arguments, "arguments"),
        "random_state": torch.get_rng_state(),
    }
    write(content, path)


def load_training(
    model: nn.Module,
    path: str | Path,
    *,
    optimizer: Stateful | None = None,
    scheduler: Stateful | None = None,
    scaler: Stateful | None = None,
    map_location: str | torch.device = "cpu",
    restore_random_state: bool = False,
) -> Training:
    """Load a file of `save_training`: the run goes on, on a CPU bit by bit, as if it had not stopped.

    Args:
        model: the network, wrapped or not.
        path: the file.
        optimizer: gets its state back, if given; likewise the next two.
        scheduler: as above.
        scaler: as above.
        map_location: where the file's tensors are read to.
        restore_random_state: also set torch's CPU random state, for the whole process.

    Raises:
        CheckpointError: as for `load_weights`; or the file lacks a state that is asked for, or has one of another
            kind. The model is loaded last, and is untouched then.
    """
    content = read(path, map_location=map_location)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    wanted = {name: part for name, part in parts.items() if part is not None}
    if not isinstance(content, Mapping) or "epoch" not in content:
        raise CheckpointError(f"{path}: is no training checkpoint; for weights alone use load_weights")
    if not {"arguments", "random_state"} <= content.keys():
        raise CheckpointError(f"{path}: was not written by save_training; for weights alone use load_weights")
    if lacking := [name for name in wanted if name not in content]:
        raise CheckpointError(f"{path}: has no state for the {', '.join(lacking)}; it has {', '.join(content)}")
    ready = prepare(model, content, path, partial=False, fast=False)
    for name, part in wanted.items():
        try:
            part.load_state_dict(content[name])
        except Exception as error:
            raise CheckpointError(f"{path}: the state of the {name} does not fit: {error}") from error
    unwrap(model).load_state_dict(ready.state)
    if restore_random_state:
        # A generator's state lives on the CPU, wherever the file's tensors were read to.
        torch.set_rng_state(content["random_state"].cpu())
    return Training(epoch=content["epoch"], arguments=dict(content["arguments"]), report=report(model, ready))
