"""`manifest.json`: all that one must know of a bundle, and what its `serve.py` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from bench.environment import Environment  # noqa: TC001 (msgspec reads the annotations)
from bench.export.serve import PREPROCESSING
from bench.results import Value  # noqa: TC001 (msgspec reads the annotations)

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "manifest.json"


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """What `predict` takes.

    Args:
        dtype: of the array.
        shape: the axes in order, each with its size from and to, both inclusive; memory is contiguous in that order.
        preprocessing: what was done to the pixels.
    """

    dtype: str = "float32"
    shape: dict[str, tuple[int, int]]
    preprocessing: str = PREPROCESSING


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found out about the case, and where."""

    run: str
    conditions: str
    figures: dict[str, Value]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that one must know of a bundle.

    Args:
        case: the configuration.
        network: the arguments of `unet.UNet`.
        weights: SHA-256 of the checkpoint's file, or of the fitted weights' file.
        weights_from: `checkpoint`, or `fitted by the suite`.
        files: SHA-256 of each file that is loaded.
        input: what it takes.
        output: what it gives.
        settings: what the engine is told when it loads.
        tolerance: relative L2 of the logits to fp32 eager's that the bundle may show, as for a case that is measured.
        rel_l2: what it showed when it was made, run by `serve.py` in a process of its own.
        measured: speed and memory, if a run has them; None otherwise.
        versions: of what made it.
        environment: machine, commit and time.
    """

    case: str
    network: dict[str, int | bool]
    weights: str
    weights_from: str
    files: dict[str, str]
    input: Input
    output: str = "logits (N, classes, H, W), float32"
    settings: dict[str, str | int]
    tolerance: float
    rel_l2: float
    measured: Measured | None
    versions: dict[str, str]
    environment: Environment

    def write(self, folder: Path) -> None:
        """Put it into a bundle's folder."""
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
