"""Figures of a step that do not depend on the machine's mood: memory, arithmetic, graphs. One version, one process.

They are counted by this program's own code whatever the version brings, so base and head are counted alike.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gate.protocol import Answer, Ask
from bench.gate.sides import Local
from bench.gate.trial import SideError
from bench.gate.versions import Version
from bench.gpus import MIB

FIGURES: Mapping[str, str] = {
    "live_mib": "most memory that the allocator held for a step at any moment beyond what it held before, MiB",
    "saved_mib": "memory of the tensors that the forward pass keeps for the backward pass, MiB (train)",
    "gflop": "10⁹ floating-point operations of a step, the compiled network's before compilation",
    "graph_breaks": "places where torch.compile gave up on a graph",
    "graphs": "graphs that torch.compile made",
    "compiled_kernels": "kernels that Inductor generated for them",
    "library_calls": "calls of ready-made kernels that Inductor put between them",
}


def probe(ask: Ask) -> Answer:
    """Count.

    Raises:
        SideError: the version's code raised.
    """
    side = Local(Version(Path(ask.roots[0]), "", ask.load), ask.case, ask.cores)
    try:
        side.build()
        # The graphs of the first call, before anything else runs.
        figures = _graphs()
        with side.version.active():
            figures |= _memory(side.subject)
            figures |= _saved(side.subject)
            figures["gflop"] = _gflop(side.subject)
            fault = _inaccurate(side)
    except Exception as error:
        raise SideError("", error) from error
    if fault:
        return Answer(status="broken", reason=f"inaccurate: {fault}", figures=figures)
    return Answer(status="ok", figures=figures)


def _graphs() -> dict[str, float]:
    if "torch._dynamo" not in sys.modules:
        return {}
    from torch._dynamo.utils import counters

    if not counters["stats"]["unique_graphs"]:
        return {}
    from torch._inductor import metrics

    return {
        "graph_breaks": float(sum(counters["graph_break"].values())),
        "graphs": float(counters["stats"]["unique_graphs"]),
        "compiled_kernels": float(metrics.generated_kernel_count),
        "library_calls": float(counters["inductor"]["extern_calls"]),
    }


def _memory(subject: Any) -> dict[str, float]:  # noqa: ANN401 (another version's Subject has no type here)
    if subject.device.type == "cuda":
        before = torch.cuda.memory_allocated(subject.device)
        torch.cuda.reset_peak_memory_stats(subject.device)
        subject.step()
        subject.synchronize()
        return {"live_mib": (torch.cuda.max_memory_allocated(subject.device) - before) / MIB}
    # PyTorch's CPU allocator tells the profiler of every block, also of those that compiled code takes.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        subject.step()
    live = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return {"live_mib": peak / MIB}


def _saved(subject: Any) -> dict[str, float]:  # noqa: ANN401
    if subject.network is None:
        return {}
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in subject.network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject.step()
    return {"saved_mib": sum(storages.values()) / MIB}


def _gflop(subject: Any) -> float:  # noqa: ANN401
    counter = FlopCounterMode(display=False)
    # A compiled graph hides its operations from the counter.
    with torch.compiler.set_stance("force_eager"), counter:
        subject.step()
    return counter.get_total_flops() / 1e9


def _inaccurate(side: Local) -> str:
    """What the version's own check of accuracy says; a fast wrong answer is broken. Versions without one have none."""
    try:
        accuracy = side.version.module("bench.engine.accuracy").Accuracy()
        settings = side.version.module("bench.results").Settings()
    except (ImportError, AttributeError):
        return ""
    return str(accuracy.measure(side.subject, settings).fault)
