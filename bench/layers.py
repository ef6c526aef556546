"""One convolution-BatchNorm-ReLU of the network alone: what the task `layer` measures."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _ReachedError(Exception):
    """The features that come into the layer are known; the rest of the network need not run."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def chain(network: nn.Module, layer: str) -> nn.Sequential:
    """The three modules of `layer`, such as `down2_1`: the first convolution of `down2`, its BatchNorm and its ReLU."""
    block, _, number = layer.partition("_")
    module = network.get_submodule(block)
    (double,) = (found for name, found in module.named_modules() if name.endswith("double_conv"))
    parts = list(double.children())
    first = 3 * (int(number) - 1)
    return nn.Sequential(*parts[first : first + 3])


def features(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What comes into `layer` for `images` (N, 3, H, W) float32: real activations, not noise, on the images' device.

    The network runs image by image, so that a layer can be measured at a batch at which the network would not fit.
    """
    network.to(images.device)

    def stop(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        raise _ReachedError(inputs[0])

    def one(image: Tensor) -> Tensor:
        try:
            network(image[None])
        except _ReachedError as reached:
            return reached.features
        raise RuntimeError(f"the network never came to {layer}")

    hook = chain(network, layer)[0].register_forward_pre_hook(stop)
    # Always the same numbers to the last bit: an input is checked afterwards for having been left alone.
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        found = torch.cat([one(image) for image in images])
    hook.remove()
    return found.clone()  # a tensor of inference mode may not be written into outside it
