"""The network as `torch.export` sees it, with free batch, height and width: what every artefact is made of."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from bench.precision import AUTOCAST

if TYPE_CHECKING:
    from bench.case import Case
    from bench.runtimes.artefact import Sizes

NAMES = ("batch", "height", "width")
AXES = (0, 2, 3)


class Autocast(nn.Module):
    """A network under autocast: what is exported must hold its own, since nobody calls the artefact under one."""

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device, self.dtype = network, device, dtype

    def forward(self, image: Tensor) -> Any:  # noqa: ANN401 (whatever the network gives)
        """The network's outputs."""
        with torch.autocast(self.device, dtype=self.dtype):
            return self.network(image)


def program(network: nn.Module, case: Case, sizes: Sizes, *, autocast: bool = False) -> ExportedProgram:
    """Trace a network in eval mode.

    Args:
        network: with its weights, on the case's device and in its layout.
        case: for channels_last, device and precision.
        sizes: what the artefact shall take; a size with one value is fixed.
        autocast: put the case's autocast into the program.
    """
    weight = next(network.parameters())
    ranges = dict(zip(NAMES, (sizes.batch, sizes.height, sizes.width), strict=True))
    shape = _example(sizes, weight.shape[1], case)
    layout = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    image = torch.zeros(shape, device=weight.device).to(memory_format=layout)
    free = {
        axis: Dim(name, min=low, max=high)
        for axis, (name, (low, high)) in zip(AXES, ranges.items(), strict=True)
        if low != high
    }
    dtype = AUTOCAST.get(case.precision) if autocast else None
    traced = network if dtype is None else Autocast(network, weight.device.type, dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer's own making
        return export(traced, (image,), dynamic_shapes=(free,))


def _example(sizes: Sizes, channels: int, case: Case) -> tuple[int, int, int, int]:
    """Any image that the artefact takes, small, no size of it like another: equal ones would be taken for one."""
    step = 2**case.depth
    batch = sizes.batch[0] if sizes.batch[0] == sizes.batch[1] else max(2, sizes.batch[0])
    height, width = (
        low if low == high else max(low, times * step) for (low, high), times in ((sizes.height, 4), (sizes.width, 5))
    )
    return batch, channels, height, width
