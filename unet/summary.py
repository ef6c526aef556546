"""The network as a table: layers, shapes, parameters, multiply-accumulates, bytes. Nothing is computed to make it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unet.state import unwrap


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer.

    Args:
        layer: its name in the model.
        kind: its class.
        output_shape: (N, C, H, W).
        parameters: trainable numbers, without the running statistics.
        macs: multiply-accumulates of the convolutions; the bias, BatchNorm, ReLU, pooling and interpolation count 0,
            as is the custom.
        activation_bytes: of the output; 0 for a layer that works in place.
    """

    layer: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    activation_bytes: int


def summarize(model: nn.Module, *inputs: Tensor) -> list[Row]:
    """A row for each layer, in the order of execution, for inputs of the shapes and dtypes given.

    It runs on the meta device, where tensors have a shape and no values: no memory, no time, and the model unchanged.
    Concatenation and padding are no layers and have no row.

    Args:
        model: the network, wrapped or not, on any device.
        *inputs: what `model` takes, on any device; `torch.empty(1, 3, 512, 512, device="meta")` will do.

    Raises:
        TypeError, ValueError: as the model, of inputs that it can't take.
    """
    network = unwrap(model)
    rows: list[Row] = []

    def hook(name: str) -> Any:  # noqa: ANN401 - torch's type of a hook
        def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows.append(
                Row(
                    layer=name,
                    kind=type(layer).__name__,
                    output_shape=tuple(output.shape),
                    parameters=sum(p.numel() for p in layer.parameters()),
                    macs=_macs(layer, args[0], output),
                    activation_bytes=0 if getattr(layer, "inplace", False) else output.numel() * output.element_size(),
                )
            )

        return add

    leaves = {name: layer for name, layer in network.named_modules() if not list(layer.children())}
    meta = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
    modes = {layer: layer.training for layer in network.modules()}
    with contextlib.ExitStack() as stack:
        for name, layer in leaves.items():
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        # A single image at the smallest size has a shape, though it can't be trained on.
        network.eval()
        try:
            with torch.no_grad():
                torch.func.functional_call(network, meta, tuple(x.to("meta") for x in inputs))
        finally:
            for layer, training in modes.items():
                layer.training = training
    return rows


def _macs(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of a convolution, either way, or a linear layer; 0 of any other.

    Each number of a convolution's output, and of a transposed convolution's input, meets one filter.
    """
    if isinstance(layer, nn.Conv2d):
        return output.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.ConvTranspose2d):
        return x.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    return 0
