"""What a process takes of a GPU's memory by the driver's account, in a pass of its own."""

from typing import ClassVar

from bench.engine.metric import Found, Metric
from bench.nvml import watch
from bench.results import Settings
from bench.subject import Subject


class DeviceMemory(Metric):
    """By NVML: with the CUDA context and the workspaces of libraries, which the allocator does not know."""

    order = 21
    columns: ClassVar = {
        "process_memory_mib": "memory of the GPU that the process holds by NVML's account, CUDA context included, MiB; "
        "absent where the driver does not tell (a container with process ids of its own)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Take a step and ask; the allocator gives nothing back in between."""
        if subject.device.type != "cuda":
            return Found()
        subject.step()
        subject.synchronize()
        held = watch(subject.device).process_mib()
        return Found() if held is None else Found(process_memory_mib=held)
