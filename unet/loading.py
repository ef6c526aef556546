"""Between a file and a model: what of the file fits, checked before the model is touched, and how the model is then."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unet.files import CheckpointError
from unet.state import canonical, compare, find_tensors, migrate_biases, not_finite, state_of, strip_prefixes, unwrap

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tensors under the names of the model, ready for its `load_state_dict`, and what `LoadReport` says of the rest."""

    state: OrderedDict[str, Tensor]
    skipped: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    migrated: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was loaded, and the state of the model afterwards that its speed and its numbers depend on.

    `load_state_dict` copies into the tensors of the model, which keep their dtype and memory format; with `fast` the
    model takes the file's. Neither sets the train/eval flag.

    Args:
        loaded: tensors loaded.
        mode: "train", "eval", or "mixed" where the layers differ.
        dtypes: of the floating-point tensors, by name.
        memory_format: "contiguous" (NCHW), "channels_last" (NHWC) or "mixed", of the convolutions' weights.
        devices: where the tensors are, by name.
        skipped: with `partial`, tensors of the file that were not loaded: name → why.
        missing: with `partial`, tensors of the model that the file had nothing for.
        migrated: biases of an older network that were folded into the BatchNorm after them.
        extras: what stood beside the tensors, such as `mask_values`.
    """

    loaded: int
    mode: str
    dtypes: tuple[str, ...]
    memory_format: str
    devices: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    migrated: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The report in a line."""
        parts = [f"{self.loaded} tensors", self.mode, *self.dtypes, self.memory_format, *self.devices]
        said = {"skipped": self.skipped.values(), "missing": self.missing, "folded": self.migrated}
        return "; ".join([", ".join(parts), *(f"{word}: {', '.join(names)}" for word, names in said.items() if names)])


def prepare(model: nn.Module, content: object, path: str | Path, *, partial: bool, fast: bool) -> Prepared:
    """The tensors in `content` for the network inside `model`, which is not touched.

    Args:
        model: the network, wrapped or not.
        content: what the file held.
        path: for the messages.
        partial: take what fits by name and shape.
        fast: whether the model will take the tensors themselves, as a model without tensors of its own must.

    Raises:
        CheckpointError: no tensors, tensors of another network, or a NaN or infinity.
        TypeError: `model.state_dict` is no method any more.
    """
    # Some parts of the model may be compiled by themselves, and have a prefix inside their names.
    own = {canonical(name): (name, tensor) for name, tensor in state_of(model, canonical_names=False).items()}
    ours = {name: tensor for name, (_, tensor) in own.items()}
    try:
        found, extras = find_tensors(content)
        state = strip_prefixes(found, ours)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    migrated = migrate_biases(state, ours)
    fit = compare(state, ours)
    if not partial and (fit.missing or fit.unexpected or fit.mismatched):
        hint = "; partial=True loads what fits" if len(fit.missing) < len(ours) else ""
        raise CheckpointError(f"{path}: does not fit this {type(unwrap(model)).__name__}: {fit}{hint}")
    kept = OrderedDict((name, tensor) for name, tensor in state.items() if name in ours and name not in fit.mismatched)
    if not kept:
        raise CheckpointError(f"{path}: nothing in it fits this {type(unwrap(model)).__name__}: {fit}")
    if empty := [name for name, tensor in ours.items() if tensor.is_meta and not (fast and name in kept)]:
        raise CheckpointError(
            f"{path}: the model has no memory for {', '.join(empty[:3])}: it was built on the meta device; load a "
            f"complete file with fast=True, or build it on a device"
        )
    refuse_not_finite(kept, path)
    ready = OrderedDict((own[name][0], tensor) for name, tensor in kept.items())
    if (metadata := getattr(state, "_metadata", None)) is not None:
        ready._metadata = metadata  # type: ignore[attr-defined] # noqa: SLF001 - torch's own place for it
    unexpected = {name: f"{name} is not in the model" for name in fit.unexpected}
    absent = tuple(name for name in ours if name not in kept)
    return Prepared(
        state=ready, skipped={**fit.mismatched, **unexpected}, missing=absent, migrated=migrated, extras=extras
    )


def refuse_not_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a CheckpointError that names the tensors with a NaN or an infinity, if there are any."""
    if bad := not_finite(state):
        raise CheckpointError(f"{path}: has a NaN or an infinity in {', '.join(bad[:4])}, {len(bad)} tensors in all")


def report(model: nn.Module, ready: Prepared) -> LoadReport:
    """The report on `model` after `ready` was loaded."""
    network = unwrap(model)
    flags = {layer.training for layer in network.modules()}
    tensors = list(network.state_dict().values())
    return LoadReport(
        loaded=len(ready.state),
        mode="mixed" if len(flags) > 1 else "train" if flags.pop() else "eval",
        dtypes=tuple(sorted({str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()})),
        memory_format=memory_format(network),
        devices=tuple(sorted({str(tensor.device) for tensor in tensors})),
        skipped=ready.skipped,
        missing=ready.missing,
        migrated=ready.migrated,
        extras=ready.extras,
    )


def memory_format(model: nn.Module) -> str:
    """How convolutions' weights are stored: "contiguous" (NCHW), "channels_last" (NHWC) or "mixed".

    A weight with one input channel or of 1×1 pixels is stored alike either way, and says nothing.
    """
    formats = set()
    for weight in model.parameters():
        nchw = weight.is_contiguous()
        nhwc = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)  # noqa: PLR2004 - N, C, H, W
        if weight.ndim == 4 and not (nchw and nhwc):  # noqa: PLR2004 - N, C, H, W
            formats.add("channels_last" if nhwc else "contiguous" if nchw else "mixed")
    return formats.pop() if len(formats) == 1 else "mixed" if formats else "contiguous"
