"""Saving and loading: weights, whole models, training runs; from one device or many, to one or many.

A file holds the network itself, whatever wraps the model that is saved: the prefixes of DataParallel,
DistributedDataParallel and torch.compile are taken off on both ways, so that any file fits any wrapping. Files are
read as tensors and plain data unless the caller trusts them, and checked before the model is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from unet.blocks import DoubleConv, Down, OutConv, Up
from unet.containers import InModuleDict, InModuleList, InSequential, Skip
from unet.deduce import Architecture, architecture, deduce
from unet.files import CheckpointError, plain, read, write
from unet.loading import LoadReport, Prepared, prepare, refuse_not_finite, report
from unet.model import UNet
from unet.state import state_of, unwrap
from unet.training import Training, load_training, save_training
from unet.variants import FeatureUNet, PlaneUNet, SupervisedUNet, VectorUNet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = [
    "NETWORK_CLASSES",
    "Architecture",
    "CheckpointError",
    "LoadReport",
    "Training",
    "architecture",
    "construct",
    "deduce",
    "load_model",
    "load_training",
    "load_weights",
    "save_model",
    "save_training",
    "save_weights",
]

# All that a whole model of this package is made of: `load_model(path, allow=NETWORK_CLASSES)`.
NETWORK_CLASSES: tuple[type, ...] = (
    *(UNet, DoubleConv, Down, Up, OutConv, VectorUNet, PlaneUNet, SupervisedUNet, FeatureUNet),
    *(InSequential, InModuleList, InModuleDict, Skip, nn.Sequential, nn.ModuleList, nn.ModuleDict, DataParallel),
    *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.ConvTranspose2d, nn.Upsample, nn.Linear),
)


def save_weights(model: nn.Module, path: str | Path, **extras: Any) -> None:  # noqa: ANN401 - any plain data
    """Write the state_dict of the network inside `model`, with its metadata and without prefixes, atomically.

    Args:
        model: the network, wrapped or not. In a distributed run, let one rank save.
        path: the file.
        **extras: plain data to stand beside the tensors, such as `mask_values=[0, 255]`.

    Raises:
        TypeError: an extra that is not plain data, or a `model.state_dict` that is no method any more.
        OSError: the file can't be written.
    """
    state = state_of(model)
    for name, value in extras.items():
        state[name] = plain(value, name)
    write(state, path)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    map_location: str | torch.device = "cpu",
    partial: bool = False,
    fast: bool = False,
    trusted: bool = False,
) -> LoadReport:
    """Load a file of weights into the network inside `model`, or raise and leave it as it was.

    Args:
        model: the network, wrapped or not, on any device; with `fast` usually built under `torch.device("meta")`.
        path: a file of `save_weights` or `save_training`, or of anyone's torch.save of a state_dict, with any
            prefixes; biases of the older network are folded away.
        map_location: where the file's tensors are read to; with `fast` where they stay.
        partial: load what fits, by name and shape, and report the rest.
        fast: map the file into memory and make its tensors the model's own, without a copy, with the file's dtype and
            memory format. Parameters are new objects then: make the optimizer afterwards.
        trusted: unpickle the file whatever it holds, which may run code; then the file may hold a whole model.

    Raises:
        CheckpointError: the file is missing, broken, hostile, of another network, or has a NaN or infinity.
        TypeError: `model.state_dict` is no method any more.
        ValueError: `fast` with DistributedDataParallel, which holds on to the parameters that it has wrapped.
    """
    if fast and isinstance(model, DistributedDataParallel):
        raise ValueError("fast=True replaces parameters that DistributedDataParallel holds: load first, then wrap")
    content = read(path, map_location=map_location, mmap=fast, trusted=trusted)
    ready = prepare(model, content, path, partial=partial, fast=fast)
    unwrap(model).load_state_dict(ready.state, strict=False, assign=fast)
    return report(model, ready)


def construct(
    factory: Callable[[], nn.Module],
    path: str | Path,
    *,
    map_location: str | torch.device = "cpu",
    fast: bool = True,
) -> tuple[nn.Module, LoadReport]:
    """A cold start: build a network and load its weights; with `fast`, without drawing or copying any.

    Args:
        factory: makes the network.
        path: as for `load_weights`.
        map_location: the device that the network comes to.
        fast: build on the meta device and take the file's tensors; otherwise build, copy, and move.

    Returns:
        The network on `map_location`, as `factory` left its train/eval flag, and the report.

    Raises:
        CheckpointError: as for `load_weights`.
    """
    if fast:
        with torch.device("meta"):
            model = factory()
        return model, load_weights(model, path, map_location=map_location, fast=True)
    model = factory().to(map_location)
    return model, load_weights(model, path)


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write the network inside `model` whole, code by reference, atomically. Prefer `save_weights`.

    Raises:
        TypeError: `model.state_dict` is no method any more.
        OSError: the file can't be written.
    """
    state_of(model)
    write(unwrap(model), path)


def load_model(
    path: str | Path,
    *,
    trusted: bool = False,
    allow: Sequence[type] = (),
    map_location: str | torch.device = "cpu",
) -> tuple[nn.Module, LoadReport]:
    """The network of a file with a whole model, unwrapped.

    Args:
        path: a file of `save_model`, or of anyone's torch.save of a model, DataParallel included.
        trusted: unpickle whatever the file holds, which may run code. Only for files of your own.
        allow: instead of trust, the classes that the model may be made of; `NETWORK_CLASSES` for this package's.
        map_location: the device that the network comes to.

    Raises:
        CheckpointError: the file is missing, broken or hostile, holds a class neither trusted nor allowed, holds no
            model, or weights with a NaN or infinity.
    """
    content = read(path, map_location=map_location, trusted=trusted, allow=allow)
    if not isinstance(content, nn.Module):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a whole model; use load_weights")
    model = unwrap(content)
    state = state_of(model)
    refuse_not_finite(state, path)
    return model, report(model, Prepared(state=state))
