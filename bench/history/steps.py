"""Where a series changed its level: change points by `ruptures`, each held to a test of significance by scipy.

Not thresholds on neighbours: those fire at every outlier and miss what comes in two halves.
"""

import math
import statistics
from collections.abc import Sequence

import msgspec

from bench.history.series import Point, Series, Stretch

# Runs on each side of a step before it is one.
FEWEST = 3
MARGIN = 0.02
SIGNIFICANT = 0.01
# Of PELT: a further change point must save this many times log n squared deviations, in units of the noise.
PENALTY = 4.0
# Noise is told from differences of neighbours, of which equal values would leave none.
FINEST = 1e-3
_NORMAL = 0.6745  # median absolute deviation of a standard normal
# Figures of which less is worse; of all others with a unit more is.
LESS_IS_WORSE = frozenset({"images_per_s", "class_agreement", "dice", "chains_fused"})


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A change of level between two neighbouring runs.

    Args:
        machine: of the series.
        case: of the series.
        metric: of the series.
        before: the last run at the old level.
        after: the first run at the new one; the change came with a commit after `before.commit`, up to `after.commit`.
        change: of the median, as a share.
        p: of Welch's t test on the logarithms of both levels, times the number of places where a step could be.
        runs_after: at the new level.
        last: whether the new level is that of the newest run.
        machine_change: of what the machine did at its best, a product or a copy, where that leaves nothing of the step.
    """

    machine: str
    case: str
    metric: str
    before: Point
    after: Point
    change: float
    p: float
    runs_after: int
    last: bool
    machine_change: float | None = None

    @property
    def worse(self) -> bool:
        """Whether it is a regression: for the worse, and not the machine's own."""
        if self.machine_change is not None:
            return False
        return self.change < 0 if self.metric in LESS_IS_WORSE else self.change > 0

    @property
    def commits(self) -> str:
        """The range that git log takes: `f1957e7..7abe945`; one commit if both runs are of it."""
        first, last = self.before.commit[:7], self.after.commit[:7]
        return first if first == last else f"{first}..{last}"


def steps(one: Series) -> list[Step]:
    """The steps of a series; none is looked for across a change of conditions."""
    found = []
    for stretch in one.stretches:
        points = stretch.points
        bounds = [0, *_change_points(_values(points)), len(points)]
        # What the test does not confirm is taken back, the least certain first: the levels beside it become one.
        while doubtful := [step for step in _between(one, stretch, bounds) if not _counts(step)]:
            weakest = max(doubtful, key=lambda step: step.p)
            bounds.remove(points.index(weakest.after))
        found += _between(one, stretch, bounds)
    return found


def _counts(step: Step) -> bool:
    return step.p < SIGNIFICANT and abs(step.change) > MARGIN


def _between(one: Series, stretch: Stretch, bounds: Sequence[int]) -> list[Step]:
    """A step at each inner bound."""
    points, found = stretch.points, []
    for start, at, end in zip(bounds, bounds[1:], bounds[2:], strict=False):
        old, new = points[start:at], points[at:end]
        # The place was chosen for its contrast, among so many: Bonferroni.
        p = min(1.0, _significance(_values(old), _values(new)) * (len(points) - 2 * FEWEST + 1))
        found.append(
            Step(
                machine=one.machine,
                case=one.case,
                metric=one.metric,
                before=old[-1],
                after=new[0],
                change=_change(_values(old), _values(new)),
                p=p,
                runs_after=len(new),
                last=stretch is one.stretches[-1] and end == len(points),
                machine_change=_of_machine(one.metric, old, new),
            )
        )
    return found


def _change_points(values: Sequence[float]) -> list[int]:
    """Where new levels begin, by PELT on the logarithms in units of their noise."""
    if len(values) < 2 * FEWEST or not all(value > 0 and math.isfinite(value) for value in values):
        return []
    import numpy as np
    import ruptures

    logs = np.log(np.asarray(values))
    noise = max(float(np.median(np.abs(np.diff(logs)))) / _NORMAL / math.sqrt(2), FINEST)
    # This is PELT too, of the same cost, and a thousand times as fast as `ruptures.Pelt`, which is not in C.
    search = ruptures.KernelCPD(kernel="linear", min_size=FEWEST).fit(logs[:, None] / noise)
    return [int(at) for at in search.predict(pen=PENALTY * math.log(len(values)))[:-1]]


def _of_machine(metric: str, old: Sequence[Point], new: Sequence[Point]) -> float | None:
    """How the machine's own best changed with a step in a time or a rate, if it did and nothing else is left of it.

    Machines of one name are not of one speed: the host below may be another, or shared with others.
    """
    if not metric.endswith("_s") and not metric.endswith("_ms"):
        return None
    power = -1 if metric in LESS_IS_WORSE else 1
    for rate in ("tflop_per_s", "gb_per_s"):
        rates = [[getattr(point.ceiling, rate) for point in part if point.ceiling] for part in (old, new)]
        if [len(part) for part in rates] != [len(old), len(new)]:
            return None
        left = [
            [point.value * best**power for point, best in zip(part, mine, strict=True)]
            for part, mine in zip((old, new), rates, strict=True)
        ]
        if _moved(*rates) and not _moved(*left):
            return _change(*rates)
    return None


def _moved(old: Sequence[float], new: Sequence[float]) -> bool:
    return _significance(old, new) < SIGNIFICANT and abs(_change(old, new)) > MARGIN


def _significance(old: Sequence[float], new: Sequence[float]) -> float:
    from scipy.stats import ttest_ind

    logs = [[math.log(value) for value in part] for part in (old, new)]
    if all(max(part) == min(part) for part in logs):  # counts, which do not scatter
        return 0.0 if logs[0][0] != logs[1][0] else 1.0
    return float(ttest_ind(*logs, equal_var=False).pvalue)


def _change(old: Sequence[float], new: Sequence[float]) -> float:
    return statistics.median(new) / statistics.median(old) - 1


def _values(points: Sequence[Point]) -> list[float]:
    return [point.value for point in points]
