"""The rule: from trials to a verdict. Pure: simulation, tests and CI call these functions and no others.

The process is the sample, not the iteration: every process draws a speed of its own, so a trial is one number, the
median over pairs of log(head / base) in one fresh process, and the interval is Student's t over trials. On identical
code a percentile bootstrap over three to five trials is wrong in 5 to 15 % of cases, t at 99 % in 1 %.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import msgspec

Word = Literal["FASTER", "SAME", "SLOWER", "INCONCLUSIVE", "MISSING", "BROKEN"]
# A noise floor above which a run says nothing: an effect smaller than this it could not have seen.
UNFIT = 0.25
POWER = 0.8


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as evidence.

    Args:
        margin: change of time below which nobody cares, as a share.
        confidence: of each one-sided bound.
        fewest: trials of a row before anything is said about it.
        most: trials of a row in the first pass at most, however much time is left.
        exact: change of a deterministic figure that counts, as a share; 1 MiB counts too where it is less.
    """

    margin: float = 0.02
    confidence: float = 0.99
    fewest: int = 4
    most: int = 16
    exact: float = 0.005


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What one trial found out about a row.

    Args:
        time: median over pairs of log(head / base).
        cycles: the same of time · clock, on a GPU whose clock is free to move; None elsewhere.
    """

    time: float
    cycles: float | None = None


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A change and how well it is known; shares, above 0 where head is slower.

    Args:
        trials: behind it.
        change: exp(mean of the trials) - 1.
        low: lower one-sided bound.
        high: upper one-sided bound.
        scatter: standard deviation of the trials: what one process differs from the next.
        smallest: effect that as many trials of this scatter see in 80 % of runs; the margin at least.
    """

    trials: int
    change: float
    low: float
    high: float
    scatter: float
    smallest: float


def estimate(logs: Sequence[float], rule: Rule) -> Estimate:
    """Student t over per-trial medians of log ratios: mean ± t · s / √n.

    Args:
        logs: one number a trial, at least one; bounds are infinite for a single trial.
        rule: its confidence and margin.
    """
    n = len(logs)
    mean = math.fsum(logs) / n
    if n == 1:
        return Estimate(trials=1, change=math.expm1(mean), low=-1.0, high=math.inf, scatter=math.inf, smallest=math.inf)
    scatter = math.sqrt(math.fsum((log - mean) ** 2 for log in logs) / (n - 1))
    error = scatter / math.sqrt(n)
    wide = quantile(rule.confidence, n - 1) * error
    smallest = max(math.log1p(rule.margin), wide + quantile(POWER, n - 1) * error)
    return Estimate(
        trials=n,
        change=math.expm1(mean),
        low=math.expm1(mean - wide),
        high=_expm1(mean + wide),
        scatter=scatter,
        smallest=_expm1(smallest),
    )


def _expm1(log: float) -> float:
    return math.expm1(log) if log < 700 else math.inf  # noqa: PLR2004 (exp overflows past 709)


@functools.cache
def quantile(probability: float, freedom: int) -> float:
    """Of Student's t."""
    from scipy.stats import t

    return float(t.ppf(probability, freedom))


def leaning(trials: Sequence[Trial], rule: Rule) -> Word:
    """What one pass says by itself: SLOWER and FASTER are suspicions until `decide` sees them again.

    SLOWER: the lower bound is above 0 and the estimate above the margin, in time and, where they are known, in cycles.
    FASTER: the mirror image. SAME: not FASTER, and the upper bound is under the margin. Else INCONCLUSIVE.
    """
    if len(trials) < rule.fewest:
        return "INCONCLUSIVE"
    word = _leaning([trial.time for trial in trials], rule)
    cycles = [trial.cycles for trial in trials if trial.cycles is not None]
    if word in {"SLOWER", "FASTER"} and len(cycles) == len(trials) and _leaning(cycles, rule) != word:
        return "INCONCLUSIVE"  # the clock moved, not the code
    return word


def _leaning(logs: Sequence[float], rule: Rule) -> Word:
    if not all(map(math.isfinite, logs)):
        return "INCONCLUSIVE"
    found = estimate(logs, rule)
    faster = 1 / (1 + rule.margin) - 1
    if found.low > 0 and found.change > rule.margin:
        return "SLOWER"
    if found.high < 0 and found.change < faster:
        return "FASTER"
    return "SAME" if found.high < rule.margin else "INCONCLUSIVE"


def decide(first: Sequence[Trial], confirming: Sequence[Trial], rule: Rule) -> Word:
    """The verdict. What the first pass suspects must be seen again in a fresh pass, with as much evidence.

    A suspicion that the confirming pass does not share is SAME if that pass says so, else INCONCLUSIVE: never SLOWER.
    """
    suspicion = leaning(first, rule)
    if suspicion not in {"SLOWER", "FASTER"}:
        return suspicion
    again = leaning(confirming, rule)
    return again if again in {suspicion, "SAME"} else "INCONCLUSIVE"


def compare(base: float, head: float, rule: Rule, *, floor: float = 0.0) -> Word:
    """The verdict on a deterministic figure of which less is better: no statistics, the two are compared directly.

    Args:
        base: of base.
        head: of head.
        rule: its `exact`.
        floor: a change of this much counts however small a share it is (1 MiB of memory); 0 for none.
    """
    tolerated = rule.exact * base
    if floor:
        tolerated = min(tolerated, floor)
    if head > base + tolerated:
        return "SLOWER"
    return "FASTER" if head < base - tolerated else "SAME"
