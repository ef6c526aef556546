"""What an engine that runs a file costs beside its speed: making the file, loading it, its size."""

from typing import ClassVar

from bench.engine.metric import Found, Metric
from bench.results import Settings
from bench.runtimes.artefact import Loaded
from bench.subject import Subject


class Artefact(Metric):
    """Of implementations that run an artefact; no figures for others."""

    order = 45
    columns: ClassVar = {
        "conversion_ms": "from the network to the artefact's files, ms: paid once, at export",
        "artefact_load_ms": "from the artefact's files to a callable, ms: paid at every start, as is the first call",
        "artefact_mib": "size of the artefact's files, MiB",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Read what building the subject took."""
        loaded = subject.call
        if not isinstance(loaded, Loaded):
            return Found()
        return Found(conversion_ms=loaded.conversion_ms, artefact_load_ms=loaded.load_ms, artefact_mib=loaded.size_mib)
