"""How much of the network the fused kernels run."""

from typing import Any, ClassVar

import kernels
from bench.engine.metric import Found, Metric
from bench.implementations import Recorded
from bench.results import Settings
from bench.subject import Subject


class Fusion(Metric):
    """Chains of convolution, BatchNorm and ReLU, of an implementation made by `kernels.fuse`; no figures for others."""

    order = 40
    columns: ClassVar = {
        "chains_fused": "convolution-BatchNorm-ReLU chains that run as one kernel each",
        "chains_left": "such chains that run as they were",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Read the fusion report."""
        fused: Any = subject.call.network if isinstance(subject.call, Recorded) else subject.call
        fused = getattr(fused, "module", fused)  # of DistributedDataParallel
        try:
            report = kernels.fusion_report(fused)
        except TypeError:  # nothing that `fuse` made
            return Found()
        return Found(chains_fused=report.chains_fused, chains_left=report.chains_left)
