"""How long a process waits for its weights: the part of a cold start that the way of loading decides."""

import tempfile
import time
from pathlib import Path
from typing import ClassVar

from bench.engine.metric import Found, Metric
from bench.results import Settings
from bench.subject import Subject, plain_network
from unet.checkpoint import construct, save_weights


class Loading(Metric):
    """Building the network and reading its weights from a file that the system has in memory, plainly and fast.

    Of eager inference alone: the network and the file are the same for every implementation.
    """

    order = 50
    columns: ClassVar = {
        "weights_load_ms": "drawing the network, reading its weights and copying them into it, ms (eager, infer)",
        "weights_load_fast_ms": "the same on the meta device, the file's mapped tensors becoming the network's, ms",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Save once, then load both ways on the case's device."""
        case = subject.case
        if case.task != "infer" or case.implementation != "eager" or case.modification != "none":
            return Found()

        def load(path: Path, *, fast: bool) -> float:
            start = time.perf_counter()
            construct(lambda: plain_network(case, subject.weights), path, map_location=subject.device, fast=fast)
            subject.synchronize()
            return (time.perf_counter() - start) * 1000

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pt"
            save_weights(subject.eager(), path)
            return Found(weights_load_ms=load(path, fast=False), weights_load_fast_ms=load(path, fast=True))
