"""How a bundle that PyTorch runs is loaded: as the suite loads the network, so that it runs as it was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bench.case import parse_id
from bench.implementations import IMPLEMENTATIONS
from bench.precision import autocast, dtype_of
from bench.subject import LAYOUT, prepare_process
from unet import UNet
from unet.checkpoint import load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np

    Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def load(weights: Path, case_id: str, network: Mapping[str, Any]) -> Run:
    """What gives the logits (N, classes, H, W), float32, of images (N, channels, H, W), float32.

    Threads and arithmetic of the process become those of the case.

    Args:
        weights: a checkpoint that `unet.checkpoint` wrote.
        case_id: implementation, precision, layout, device and threads.
        network: the arguments of `unet.UNet`.

    Raises:
        CheckpointError: the file is not of this network.
    """
    case = parse_id(case_id)
    prepare_process(case, torch.get_num_threads())
    device, layout, stored = (
        torch.device("cuda" if case.on_gpu else "cpu"),
        LAYOUT[case.layout],
        dtype_of(case.precision),
    )
    model = UNet(**network).eval()
    load_weights(model, weights)
    placed = model.to(device, stored, memory_format=layout)  # type: ignore[call-overload]  # the stubs lack memory_format
    call = IMPLEMENTATIONS[case.implementation].build(placed, case)

    def run(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        given = torch.from_numpy(images).to(device, stored, memory_format=layout)
        with torch.inference_mode(), autocast(device, case.precision):
            logits: np.ndarray[Any, Any] = call(given).float().cpu().numpy()
        return logits

    return run
