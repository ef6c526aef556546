"""Resident memory of the process during a step, in a pass of its own: the host's side of a case."""

import contextlib
import re
from pathlib import Path
from typing import ClassVar

import psutil

from bench.engine.metric import Found, Metric
from bench.gpus import MIB
from bench.results import Settings
from bench.subject import Subject


class Resident(Metric):
    """Resident set of the process, interpreter and libraries included: at its peak during a step, and after it.

    On a CPU the peak is the case's `peak_memory_mib` and not measured twice.
    """

    order = 22
    columns: ClassVar = {
        "resident_peak_mib": "largest resident set of the process during a step, MiB (GPU; on a CPU: peak_memory_mib)",
        "resident_mib": "resident set of the process between steps, MiB",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Reset the peak, take a step, read both."""
        found = Found()
        if subject.device.type == "cuda":
            found["resident_peak_mib"] = resident_peak_mib(subject)
        found["resident_mib"] = psutil.Process().memory_info().rss / MIB
        return found


def resident_peak_mib(subject: Subject) -> float:
    """The largest resident set during a step, MiB."""
    subject.synchronize()
    # Where the kernel does not let us reset it, the peak is that of the whole process so far: never too small.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    subject.step()
    subject.synchronize()
    # Linux counts it in KiB.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(match[1]) / 1024 if match else float("nan")
