"""Energy of a step by the GPU's own counter, in a pass of its own."""

import time
from typing import ClassVar

from bench.engine.metric import Found, Metric
from bench.nvml import watch
from bench.results import Settings
from bench.subject import Subject

# The counter moves about every 100 ms: over 5 s that is 2 %.
LEAST_S = 5.0
# Looked at the clock this often: the queue of the device stays full in between.
BURST_S = 0.25


class Energy(Metric):
    """NVML's total energy over at least 5 s of steps; of this process's GPU, and the images that it worked on.

    Absent on a CPU, on a part of a GPU (MIG), and where the board has no counter.
    """

    order = 60
    columns: ClassVar = {
        "energy_j_per_image": "energy of the GPU an image, J, idle power included",
        "power_w": "mean power of the GPU meanwhile, W",
        "energy_s": "seconds over which the counter was read",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:
        """Read the counter, take steps for `energy_s` seconds, wait for the last, read it again."""
        if subject.device.type != "cuda" or subject.case.task == "layer":
            return Found()
        counter = watch(subject.device)
        known = counter.energy_j() is not None
        if not subject.group.agree(known):
            return Found()
        subject.synchronize()
        burst = _steps_in(subject, BURST_S)
        before, start, steps, last = counter.energy_j(), time.perf_counter(), 0, False
        while not last:
            for _ in range(burst):
                subject.step()
            subject.synchronize()
            steps += burst
            last = subject.group.agree(time.perf_counter() - start >= max(LEAST_S, settings.energy_s))
        after, seconds = counter.energy_j(), time.perf_counter() - start
        if before is None or after is None:
            return Found()
        used, images = after - before, steps * len(subject.masks) * subject.case.accumulation
        return Found(energy_j_per_image=used / images, power_w=used / seconds, energy_s=seconds)


def _steps_in(subject: Subject, seconds: float) -> int:
    """About how many steps fill so many seconds; the same on every rank."""
    start = time.perf_counter()
    subject.step()
    subject.synchronize()
    taken = max(subject.group.slowest([time.perf_counter() - start]))
    return max(1, min(int(seconds / max(taken, 1e-6)), 10_000))
