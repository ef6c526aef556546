"""Samples in time, thinned to what a page can carry."""

import itertools
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from bench.readings import Block
from bench.results import Record

POINTS = 12_000
FEWEST, MOST = 24, 240


def points(records: int) -> int:
    """How many points a case gets, so that a page of many cases stays small."""
    return max(FEWEST, min(MOST, POINTS // max(records, 1)))


def thinned(record: Record, most: int) -> list[list[Any]]:
    """At most about `most` points `[s since the first step, median ms, lowest ms, highest ms, mark, MHz]`, in order.

    Where there is room for all of them each step is a point. `mark` names what held the device's clock down then, empty
    if nothing did; MHz is None where no clock was read.
    """
    times = record.samples_ms
    size = max(1, -(-len(times) // most))
    ends = list(itertools.accumulate(times))
    states = list(_states(record.blocks, len(times)))
    return [
        _point(ends[min(start + size, len(times)) - 1], times[start : start + size], states[start : start + size])
        for start in range(0, len(times), size)
    ]


def _states(blocks: Sequence[Block], samples: int) -> Iterator[Block]:
    """The state of the device at each sample."""
    states = itertools.chain.from_iterable(itertools.repeat(block, block.samples) for block in blocks)
    return itertools.islice(itertools.chain(states, itertools.repeat(Block(samples=0))), samples)


def _point(end_ms: float, times: Sequence[float], states: Sequence[Block]) -> list[Any]:
    held = dict.fromkeys(name for state in states for name in state.throttled)
    clocks = [state.sm_mhz for state in states if state.sm_mhz is not None]
    figures = map(_short, (end_ms / 1000, median(times), min(times), max(times)))
    return [*figures, ", ".join(held), round(median(clocks)) if clocks else None]


def _short(number: float) -> float:
    return float(f"{number:.5g}")
