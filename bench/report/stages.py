"""Where the time of a forward pass goes: the network's blocks, and how near each comes to what the device can do."""

from collections.abc import Iterator

from bench.derive import ceiling_of, roofline
from bench.report.table import DASH, three_digits
from bench.results import Record, Run

HEADINGS = ("stage", "ms", "of the time", "GFLOP", "GB", "FLOP/B", "bound by", "of that ceiling")


def stage_rows(run: Run, record: Record) -> Iterator[tuple[str, ...]]:
    """A row a stage; the last two columns are dashes where the run has measured no ceilings."""
    total = sum(stage.ms for stage in record.stages)
    ceiling = ceiling_of(run, record)
    places = {place.stage.name: place for place in roofline(record.stages, ceiling)} if ceiling else {}
    for stage in record.stages:
        place = places.get(stage.name)
        yield (
            stage.name,
            three_digits(stage.ms),
            f"{stage.ms / total:.1%}",
            three_digits(stage.gflop),
            three_digits(stage.gbyte),
            three_digits(stage.gflop / stage.gbyte) if stage.gbyte else DASH,
            place.bound if place else DASH,
            f"{place.share:.0%}" if place else DASH,
        )
