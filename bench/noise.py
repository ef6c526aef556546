"""How large a difference must be here to be one: A/A, one tiny case in process after process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from bench.case import Case
from bench.doctor import Finding
from bench.results import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.results import Record

SECONDS = 60.0
FEWEST = 3
CASE = Case(width=8, depth=2, size="64x64", threads=1)
SETTINGS = Settings(measure_s=1.0, warmup_s=0.3, warmup_extra_s=1.0)


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """What A/A showed: one tiny case, measured again and again.

    Args:
        processes: how often.
        between: standard deviation of the medians of processes, as a share of their mean.
        within: median half-width of the 95 % interval inside one process, as a share of its median.
        disturbed: share of the processes that others disturbed.
        smallest: the smallest difference of two means of five processes each that 95 of 100 such pairs would not reach
            by chance: t · between · √(2/5), at 8 degrees of freedom.
    """

    processes: int
    between: float
    within: float
    disturbed: float
    smallest: float


def noise(measure: Callable[[], Record], now: Callable[[], float]) -> Noise | None:
    """Measure the same for about a minute; None where it did not run.

    Args:
        measure: measures once, in a process of its own.
        now: seconds, from any start.
    """
    start = now()
    records: list[Record] = []
    while len(records) < FEWEST or now() - start < SECONDS:
        records.append(measure())
        if records[-1].status != "ok":
            return None
    return scatter(records)


def scatter(records: Sequence[Record]) -> Noise:
    """The noise that records of one case show."""
    import numpy as np
    from scipy.stats import t

    medians = np.array([record.figures["p50_ms"] for record in records], dtype=float)
    between = float(medians.std(ddof=1) / medians.mean())
    known = [record.figures for record in records if "p50_high_ms" in record.figures]
    ends = np.array([[one[f"p50_{end}ms"] for end in ("low_", "high_", "")] for one in known], dtype=float)
    return Noise(
        processes=len(records),
        between=between,
        within=float(np.median((ends[:, 1] - ends[:, 0]) / 2 / ends[:, 2])) if known else float("nan"),
        disturbed=sum(bool(record.figures.get("disturbed")) for record in records) / len(records),
        smallest=float(t.ppf(0.975, 8)) * between * (2 / 5) ** 0.5,
    )


def about(found: Noise | None) -> Finding:
    """The noise in words."""
    if found is None:
        return Finding(
            level="bad",
            what="a tiny case does not run here",
            advice=f"see why: python -m pytest bench --case {CASE.id}",
        )
    what = (
        f"{found.processes} processes of one case: medians scatter by {found.between:.1%} between processes, the "
        f"interval inside one says ±{found.within:.1%}; five against five show differences from {found.smallest:.1%}"
    )
    if found.disturbed:
        return Finding(
            level="bad",
            what=f"{what}; others disturbed {found.disturbed:.0%} of them",
            advice="measure on an idle machine, or believe only larger differences than that",
        )
    return Finding(level="good", what=what)
