"""A metric is one class in one file of this folder; defining it is enough to have it measured and explained."""

import abc
import importlib
import pkgutil
from collections.abc import Mapping
from typing import ClassVar

import bench.engine
from bench.readings import Block, Stage
from bench.results import Settings, Value
from bench.subject import Subject


class Metric(abc.ABC):
    """One quantity, measured in a pass of its own so that none disturbs another.

    Attributes:
        order: passes run in this order; speed comes first, on a process that has done nothing but warm up.
        columns: what the metric finds: figure → meaning, with unit.
    """

    order: ClassVar[int]
    columns: ClassVar[Mapping[str, str]]

    @abc.abstractmethod
    def measure(self, subject: Subject, settings: Settings) -> "Found":
        """Measure; figures that do not apply to the case are left out."""


class Found(dict[str, Value]):
    """Figures of a metric.

    Attributes:
        samples_ms: every step's duration, of the one metric that times steps.
        own_samples_ms: of several ranks, those of this one alone.
        blocks: how those were grouped, of the same metric.
        stages: the network's blocks, of the one metric that times them.
        fault: why the case must not be ranked, if it must not.
    """

    samples_ms: tuple[float, ...] = ()
    own_samples_ms: tuple[float, ...] = ()
    blocks: tuple[Block, ...] = ()
    stages: tuple[Stage, ...] = ()
    fault: str = ""


def metrics() -> list[Metric]:
    """One of each metric of this folder, in order."""
    for module in pkgutil.iter_modules(bench.engine.__path__):
        if module.name != "__main__":
            importlib.import_module(f"bench.engine.{module.name}")
    return sorted((metric() for metric in Metric.__subclasses__()), key=lambda metric: metric.order)
