"""Peak memory of a step, in a pass of its own."""

from typing import ClassVar

import torch

from bench.engine.metric import Found, Metric
from bench.engine.resident import resident_peak_mib
from bench.gpus import MIB
from bench.results import Settings
from bench.subject import Subject


class Memory(Metric):
    """The most memory of the device held at any moment of a step after warm-up."""

    order = 20
    columns: ClassVar = {
        "peak_memory_mib": "most memory held during a step, MiB: the allocator's on a GPU, resident set on a CPU",
        "peak_memory_kind": "`allocated` (CUDA allocator), or `resident` (process, interpreter and libraries included)",
        "peak_reserved_mib": "most memory the CUDA allocator held from the driver, MiB",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Reset the peak, take a step, read it."""
        if subject.device.type != "cuda":
            return Found(peak_memory_mib=resident_peak_mib(subject), peak_memory_kind="resident")
        subject.synchronize()
        torch.cuda.reset_peak_memory_stats(subject.device)
        subject.step()
        subject.synchronize()
        allocated = torch.cuda.max_memory_allocated(subject.device) / MIB
        reserved = torch.cuda.max_memory_reserved(subject.device) / MIB
        return Found(peak_memory_mib=allocated, peak_memory_kind="allocated", peak_reserved_mib=reserved)
