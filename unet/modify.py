"""Changing a U-Net that exists: another head, another input beside the image, other outputs beside the logits.

Every function here takes a model and returns a changed copy, with its weights, device, dtype and train/eval flags; the
model itself stays as it is. The copy keeps the keys of the U-Net and has a few more, so that an old checkpoint loads
into it with `unet.checkpoint.load_weights(…, partial=True)`, which names what it skipped.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from unet.blocks import OutConv
from unet.model import UNet
from unet.variants import FeatureUNet, PlaneUNet, SupervisedUNet, VectorUNet

if TYPE_CHECKING:
    from collections.abc import Iterator

# The changes by name, as a case of the harness names them. "none" is the plain network.
CHANGES = ("none", "head", "vector", "plane", "supervision", "features")

AnyUNet = TypeVar("AnyUNet", bound=UNet)


def change(model: UNet, name: str) -> UNet:
    """A copy of `model` with the change called `name`, each with one typical setting.

    "head": three classes more; "vector": 8 numbers per image; "plane": one plane; "supervision"; "features".

    Raises:
        ValueError: no such change.
    """
    match name:
        case "none":
            return copy.deepcopy(model)
        case "head":
            return replace_head(model, model.n_classes + 3)
        case "vector":
            return add_vector(model, 8)
        case "plane":
            return add_planes(model, 1)
        case "supervision":
            return add_supervision(model)
        case "features":
            return add_features(model)
        case _:
            raise ValueError(f"change is {name!r}: expected one of {', '.join(CHANGES)}")


def inputs_for(model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """All inputs of `model` beside and including `image` (N, C, H, W): `model(*inputs_for(model, image))` runs.

    A vector and planes are ones, on the image's device and in its dtype.
    """
    if isinstance(model, VectorUNet):
        return image, image.new_ones(image.shape[0], model.vector_size)
    if isinstance(model, PlaneUNet):
        return image, image.new_ones(image.shape[0], model.planes, *image.shape[2:])
    return (image,)


def replace_head(model: AnyUNet, n_classes: int) -> AnyUNet:
    """A copy of `model` with freshly drawn heads for `n_classes` classes; `copy.n_classes` follows.

    Raises:
        TypeError: `model` is not a UNet, of whatever change.
        ValueError: `n_classes` is not positive.
    """
    if not isinstance(model, UNet):
        raise TypeError(f"the model is a {type(model).__name__}: expected a UNet, changed or plain, but not wrapped")
    if n_classes < 1:
        raise ValueError(f"n_classes is {n_classes}: expected 1 or more")
    changed = copy.deepcopy(model)
    changed.n_classes = n_classes
    for head in [m for m in changed.modules() if isinstance(m, OutConv)]:
        old = head.conv
        new = nn.Conv2d(old.in_channels, n_classes, 1, device=old.weight.device, dtype=old.weight.dtype)
        head.conv = new.train(old.training)
    return changed


def add_vector(model: UNet, vector_size: int) -> VectorUNet:
    """A copy of `model` that also takes `vector_size` numbers per image, and at first gives the same whatever they are.

    Raises:
        TypeError: `model` is not a plain UNet.
        ValueError: `vector_size` is not positive.
    """
    changed = _derive(model, VectorUNet, vector_size=vector_size)
    nn.init.zeros_(changed.embed.weight)
    return changed


def add_planes(model: UNet, planes: int = 1) -> PlaneUNet:
    """A copy of `model` that also takes `planes` planes, with weights of zero: at first it gives what `model` gives.

    Raises:
        TypeError: `model` is not a plain UNet.
        ValueError: `planes` is not positive.
    """
    changed = _derive(model, PlaneUNet, planes=planes)
    first = cast("nn.Conv2d", changed.inc.double_conv[0])
    old = first.weight.detach()
    new = torch.cat([old, old.new_zeros(old.shape[0], planes, *old.shape[2:])], 1)
    if old.is_contiguous(memory_format=torch.channels_last) and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    first.in_channels += planes
    first.weight = nn.Parameter(new, requires_grad=first.weight.requires_grad)
    return changed


def add_supervision(model: UNet) -> SupervisedUNet:
    """A copy of `model` with freshly drawn heads at the coarser levels of the decoder.

    Raises:
        TypeError: `model` is not a plain UNet.
    """
    changed = _derive(model, SupervisedUNet)
    for head in changed.heads:
        cast("OutConv", head).conv.reset_parameters()
    return changed


def add_features(model: UNet) -> FeatureUNet:
    """A copy of `model` that also returns the features at the bottleneck; no new weights.

    Raises:
        TypeError: `model` is not a plain UNet.
    """
    return _derive(model, FeatureUNet)


@contextlib.contextmanager
def capture(model: nn.Module, *names: str) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the layers called `names` while `model` runs in eager mode, as each layer gave them.

    A hook that keeps the tensor itself is a trap: the ReLU after a BatchNorm works in place, and what was kept turns
    into max(0, ·). So each output is cloned at once; gradients flow through the clone.

    Args:
        model: any network.
        *names: as in `model.named_modules()`.

    Yields:
        name → output, filled by the next forward pass and overwritten by further ones.

    Raises:
        ValueError: no such layer.
    """
    layers = dict(model.named_modules())
    if unknown := [name for name in names if name not in layers]:
        raise ValueError(f"no layer is called {', '.join(unknown)}: expected names of model.named_modules()")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # noqa: ANN401 - torch's type of a hook
        def hook(_layer: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = output.clone()

        return hook

    handles = [layers[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _derive(model: UNet, kind: type[AnyUNet], **extra: Any) -> AnyUNet:  # noqa: ANN401 - the kind's own
    """A `kind` of U-Net with a copy of the layers of `model`; layers it has beyond these are allocated, not drawn."""
    if type(model) is not UNet:
        raise TypeError(f"the model is a {type(model).__name__}: expected a plain UNet, since a change is made once")
    numbers = model.n_channels, model.n_classes, model.bilinear, model.width, model.depth
    with torch.device("meta"):
        changed = kind(*numbers, checkpoint_blocks=model.checkpoint_blocks, **extra)
    changed.train(model.training)
    # Layers that are taken over keep their own flags: a frozen BatchNorm stays frozen.
    for name, layer in copy.deepcopy(model).named_children():
        changed.add_module(name, layer)
    head = model.outc.conv.weight
    for layer in changed.children():
        if any(tensor.is_meta for tensor in layer.parameters()):
            layer.to_empty(device=head.device).to(head.dtype)
    return changed
