"""What images of another size cost when they first come."""

import time
from typing import ClassVar

from bench.engine.compiled import graphs
from bench.engine.metric import Found, Metric
from bench.implementations import IMPLEMENTATIONS
from bench.results import Settings
from bench.subject import Subject
from bench.support import smallest_side


class SecondSize(Metric):
    """The first step with images one column narrower, 640×959 after 640×960: an odd side, and a shape not seen before.

    Asked for by `--cold-start`, and last of all: what a compiler makes of two sizes may serve the first one worse.
    """

    order = 95
    columns: ClassVar = {
        "second_size_ms": "the first step with images one column narrower, ms (`--cold-start`)",
        "recompiles": "graphs that torch.compile made for that step (`--cold-start`, implementations that compile)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:
        """Take one step with narrower images."""
        case, implementation = subject.case, IMPLEMENTATIONS[subject.case.implementation]
        too_small = case.breadth <= smallest_side(case)
        if not settings.cold_start or implementation.one_size or case.task == "layer" or too_small:
            return Found()
        before = graphs() if implementation.compiles else 0
        narrow = subject.narrower()
        start = time.perf_counter()
        narrow.step()
        narrow.synchronize()
        found = Found(second_size_ms=(time.perf_counter() - start) * 1000)
        if implementation.compiles:
            found["recompiles"] = graphs() - before
        return found
