"""What the tests of the network share: a network that is alive, and a reference that knows the keys alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from unet import UNet
from unet.state import unwrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

SMALL = 4


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks, wrapped or not, have the same tensors under the same names, to the bit."""
    a, b = (unwrap(m).state_dict() for m in (a, b))
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def enliven(model: nn.Module) -> nn.Module:
    """Give each BatchNorm statistics, scales and shifts of its own, so that no two layers could be swapped unseen."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.1, 0.4)
                layer.weight.uniform_(0.7, 1.3)
                layer.bias.normal_(0.1, 0.2)
    return model


@pytest.fixture
def alive() -> Callable[..., UNet]:
    """A small U-Net with random statistics, in eval mode, fp32: alive(n_channels=3, n_classes=2, …)."""

    def make(n_channels: int = 3, n_classes: int = 2, *, bilinear: bool = False, depth: int = 4, width: int = SMALL):  # noqa: ANN202
        return enliven(UNet(n_channels, n_classes, bilinear, width, depth)).eval()

    return make


def functional_unet(state: Mapping[str, Tensor], x: Tensor, *, bilinear: bool, training: bool, depth: int = 4) -> dict:
    """The U-Net from key names alone, in fp64; the outputs of every block, by its name."""
    state = {key: value.double() if value.is_floating_point() else value for key, value in state.items()}
    x = x.double()

    def layer(x: Tensor, prefix: str, conv: int) -> Tensor:
        y = F.conv2d(x, state[f"{prefix}.double_conv.{conv}.weight"], padding=1)
        norm = f"{prefix}.double_conv.{conv + 1}"
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        if training:
            mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        y = (y - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return (y * state[f"{norm}.weight"].view(shape) + state[f"{norm}.bias"].view(shape)).clamp(min=0)

    def double(x: Tensor, prefix: str) -> Tensor:
        return layer(layer(x, prefix, 0), prefix, 3)

    seen = {"inc": double(x, "inc")}
    skips, x = [], seen["inc"]
    for i in range(1, depth + 1):
        skips.append(x)
        x = double(F.max_pool2d(x, 2), f"down{i}.maxpool_conv.1")
        seen[f"down{i}"] = x
    for i in range(1, depth + 1):
        skip = skips.pop()
        if bilinear:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        else:
            x = F.conv_transpose2d(x, state[f"up{i}.up.weight"], state[f"up{i}.up.bias"], stride=2)
        whole = skip.new_zeros(*x.shape[:2], *skip.shape[2:])
        whole[..., : x.shape[2], : x.shape[3]] = x
        x = double(torch.cat([skip, whole], 1), f"up{i}.conv")
        seen[f"up{i}"] = x
    seen["logits"] = F.conv2d(x, state["outc.conv.weight"], state["outc.conv.bias"])
    return seen


@pytest.fixture
def reference() -> Callable[..., dict]:
    return functional_unet
