"""How often the gate errs, shown with drawn numbers: whole gates through `Proceedings`, which is what CI runs.

A trial is normal noise around the true change, as processes draw their speeds. `--benchmark-compare-fail=median:5%` is
tried beside it, by pytest-benchmark's own function, on the first trial of each row: it sees one run of each version.
"""

import math
import random
from collections.abc import Callable, Mapping

import msgspec

from bench.gate.decision import Rule, Trial
from bench.gate.proceedings import Proceedings

NOISES = (0.003, 0.01, 0.02, 0.06)
ROWS = 40
# Rows of base against itself, and what a trial costs (seen on two shared cores); the gate's default budget.
SELF_ROWS = 2
TRIAL_S = 3.0
BUDGET_S = 600.0
# And ten times as much, which lets every row have all its looks: the hardest case for false alarms.
BUDGETS_S = (BUDGET_S, 10 * BUDGET_S)
EFFECT = 0.05


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of whole gates.

    Args:
        gates: how many were drawn, once without and once with a slow-down.
        rows: cases of a gate.
        noise: standard deviation of a trial's log ratio.
        effect: the slow-down of one case, as a share.
        budget_s: the gate's.
        false_alarms: gates of identical code with a SLOWER.
        self_fired: of the same gates, those whose A/A rows fired: they neither pass nor fail.
        found: gates in which the slowed case is SLOWER.
        conclusive: rows of identical code that got SAME.
        seconds: a gate of identical code takes, on average.
        naive_false_alarms: gates of identical code that `median:5%` fails.
        naive_found: gates in which it fails the slowed case.
    """

    gates: int
    rows: int
    noise: float
    effect: float
    budget_s: float
    false_alarms: float
    self_fired: float
    found: float
    conclusive: float
    seconds: float
    naive_false_alarms: float
    naive_found: float


def simulate(noise: float, *, gates: int = 1000, effect: float = EFFECT, budget_s: float = BUDGET_S) -> Rates:
    """Draw gates of identical code, and as many with one slowed case; the noise's value is the seed."""
    draw = random.Random(f"{noise} {gates} {effect} {budget_s}")  # noqa: S311 (no secret)
    naive = naive_check()
    rows = [str(number) for number in range(ROWS)]
    alarms = fired = found = same = naive_alarms = naive_found = 0
    seconds = 0.0
    for _ in range(gates):
        course, took_s = _gate(rows, noise, {}, budget_s, draw)
        words = [course.word(row) for row in rows]
        alarms += "SLOWER" in words
        fired += any(course.word(row) in {"SLOWER", "FASTER"} for row in course.first.keys() - rows)
        same += words.count("SAME")
        seconds += took_s
        naive_alarms += any(naive(1.0, math.exp(course.first[row][0].time)) for row in rows)
        course, _ = _gate(rows, noise, {rows[0]: math.log1p(effect)}, budget_s, draw)
        found += course.word(rows[0]) == "SLOWER"
        naive_found += naive(1.0, math.exp(course.first[rows[0]][0].time))
    return Rates(
        gates=gates,
        rows=ROWS,
        noise=noise,
        effect=effect,
        budget_s=budget_s,
        false_alarms=alarms / gates,
        self_fired=fired / gates,
        found=found / gates,
        conclusive=same / gates / ROWS,
        seconds=seconds / gates,
        naive_false_alarms=naive_alarms / gates,
        naive_found=naive_found / gates,
    )


def _gate(
    rows: list[str], noise: float, effects: Mapping[str, float], budget_s: float, draw: random.Random
) -> tuple[Proceedings, float]:
    course = Proceedings([*rows, *(f"A/A {number}" for number in range(SELF_ROWS))], Rule(), budget_s, draw)
    clock = 0.0
    while (row := course.ask(clock)) is not None:
        clock += TRIAL_S
        course.tell(row, Trial(time=draw.gauss(effects.get(row, 0.0), noise)), TRIAL_S)
    return course, clock


def naive_check() -> Callable[[float, float], bool]:
    """pytest-benchmark's own `median:5%`: (median of base, median of head) → whether it fails."""
    from pytest_benchmark.utils import parse_compare_fail

    check = parse_compare_fail("median:5%")
    return lambda base, head: bool(check.fails({"median": head}, {"median": base}))
