"""What all engines that run a file have in common: which files, how they are made and loaded, what that took."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench.gpus import MIB
from bench.implementations import implementation

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from bench.case import Case
    from bench.machine import Machine

    Call = Callable[[Tensor], Tensor]

LARGEST = 65_536
"""Pixels a side, and images a batch, that an artefact is made for at most."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What an artefact takes: from and to how many images, and pixels a side, both inclusive."""

    batch: tuple[int, int]
    height: tuple[int, int]
    width: tuple[int, int]


def any_size(case: Case) -> Sizes:
    """Every batch, and every image that still has two pixels a side at the bottom.

    One pixel there is another program: a tracer tells sizes of 1 from all others.
    """
    side = 2 * 2**case.depth, LARGEST
    return Sizes(batch=(1, LARGEST), height=side, width=side)


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """An engine that runs a file.

    Args:
        name: the value of the axis `implementation`.
        package: the distribution whose version decides how it runs.
        files: names of the files of an artefact, the first of them the one to load.
        save: writes an artefact of an eager network in eval mode into a folder.
        load: makes a callable of the artefact in a folder, with the case's threads and precision.
        serve: Python that loads the artefact beside it and defines `run(image)`, on numpy arrays, for `serve.py`.
        settings: what of a case the engine must be told when it loads, for the manifest.
        sizes: what an artefact of a case takes.
    """

    name: str
    package: str
    files: tuple[str, ...]
    save: Callable[[nn.Module, Case, Path], None]
    load: Callable[[Path, Case], Call]
    serve: str
    settings: Callable[[Case], dict[str, str | int]]
    sizes: Callable[[Case], Sizes] = any_size


RUNTIMES: dict[str, Runtime] = {}


class Loaded:
    """An artefact that was made and loaded, and what that took.

    Args:
        call: images (batch, channels, height, width) → logits.
        runtime: the engine.
        conversion_ms: from the network to the files.
        load_ms: from the files to a callable.
        size_mib: of the files.
    """

    def __init__(self, call: Call, runtime: Runtime, conversion_ms: float, load_ms: float, size_mib: float) -> None:
        self.runtime = runtime
        self.conversion_ms = conversion_ms
        self.load_ms = load_ms
        self.size_mib = size_mib
        self._call = call

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the images."""
        return self._call(images)


def register(runtime: Runtime, *needs: Callable[[Case, Machine], str | None], one_size: bool = False) -> None:
    """Make an engine an implementation: the artefact is made in a child, then loaded as a deployment would."""
    RUNTIMES[runtime.name] = runtime

    @implementation(runtime.name, *needs, _one_map, one_size=one_size)
    def build(model: nn.Module, case: Case) -> Callable[..., Any]:
        from bench.runtimes.convert import convert

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = time.perf_counter()
            convert(runtime, model, case, folder)
            conversion_ms = (time.perf_counter() - start) * 1000
            start = time.perf_counter()
            call = runtime.load(folder, case)
            load_ms = (time.perf_counter() - start) * 1000
            size_mib = sum((folder / file).stat().st_size for file in runtime.files) / MIB
        return Loaded(call, runtime, conversion_ms, load_ms, size_mib)


def _one_map(case: Case, _: Machine) -> str | None:
    if case.task != "infer":
        return "an artefact is for inference alone"
    if case.modification != "none":
        return "an artefact takes one image and gives one map of logits: no modified networks"
    if case.device_count > 1:
        return "an artefact runs in one process; serve several to use several devices"
    smallest = 2 * 2**case.depth
    if min(case.height, case.breadth) < smallest:
        return f"an artefact takes {smallest} pixels a side at least"
    return None


def installed(extra: str, *packages: str) -> Callable[[Case, Machine], str | None]:
    """A need: these distributions, which come with an extra of this project."""

    def need(_: Case, machine: Machine) -> str | None:
        lacking = [package for package in packages if package not in machine.engines]
        return f"{' and '.join(lacking)} not installed: pip install '.[{extra}]'" if lacking else None

    return need


def on_cpu_as_it_likes(*precisions: str) -> Callable[[Case, Machine], str | None]:
    """A need: a CPU, one of these precisions, and the plain layout, since the engine orders memory by itself."""

    def need(case: Case, _: Machine) -> str | None:
        if case.on_gpu:
            return "runs on the CPU here"
        if case.precision not in precisions:
            return f"computes in {' or '.join(precisions)} on a CPU"
        return "chooses its memory format itself: layout nchw" if case.layout != "nchw" else None

    return need
