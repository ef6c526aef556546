"""What torch.compile made of the network, counted: no clock in it, and the same on every machine."""

from typing import ClassVar

from bench.engine.metric import Found, Metric
from bench.implementations import IMPLEMENTATIONS
from bench.results import Settings
from bench.subject import Subject


class Compiled(Metric):
    """Graphs and graph breaks of the first call; of implementations that compile."""

    order = 5
    columns: ClassVar = {
        "graphs": "graphs that torch.compile made of the network (implementations that compile)",
        "graph_breaks": "times that torch.compile had to leave a graph (implementations that compile)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Read the counters."""
        if not IMPLEMENTATIONS[subject.case.implementation].compiles:
            return Found()
        return Found(graphs=graphs(), graph_breaks=graph_breaks())


def graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters  # no public name

    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> int:
    """How often torch.compile has left a graph in this process."""
    from torch._dynamo.utils import counters  # no public name

    return sum(counters["graph_break"].values())
