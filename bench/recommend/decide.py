"""The decision: limits and evidence → winner, Pareto front, why each other case lost. Pure, and always the same."""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from bench.recommend.evidence import Evidence, Interval, Quantity
from bench.recommend.limits import UNITS, Broken, Limits, Relaxation, borderline, breaks, change, fewest, rank, single

Why = Literal["limit", "unjudged", "dominated", "behind", "failed"]


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A case that may be deployed, with what speaks for and against it."""

    id: str
    figures: dict[str, Interval]
    start_ms: float | None
    shares: dict[str, float] = {}
    caveats: tuple[str, ...] = ()


class Loser(msgspec.Struct, frozen=True, kw_only=True):
    """A case that is not recommended.

    Args:
        id: the case.
        why: it broke a `limit`; it could not be judged by one (`unjudged`); something measured is at least as good in
            every respect and better in one (`dominated`); it is on the front, `behind` in the objective; it `failed`.
        reason: the same in words, with how much.
        by: the case that is better, if one is.
        ratios: quantity → how many times the better one's it is, where that is worse.
    """

    id: str
    why: Why
    reason: str
    by: str = ""
    ratios: dict[str, float] = {}


class BreakEven(msgspec.Struct, frozen=True, kw_only=True):
    """After how many images the winner has made up for its slower start.

    Args:
        against: the case that would run instead: the best of those that start sooner.
        images: rounded up; 0 where the winner starts no later.
        winner_start_ms: the winner's start.
        other_start_ms: the other's.
    """

    against: str
    images: int
    winner_start_ms: float
    other_start_ms: float


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one question, for exactly what was measured.

    Args:
        winner: the best of those that keep every limit; None where none does.
        ties: cases that keep the limits too and cannot be told apart from the winner in the objective.
        front: of those that keep the limits, the ones that nothing measured is at least as good as in every respect.
        losers: every other case, and why.
        relax: where no case fits: each single limit whose relaxation lets one in, the smallest change first.
        together: where no single one would do: the case that breaks the fewest limits, and all it breaks.
        break_even: where another case starts sooner.
    """

    winner: Standing | None
    ties: tuple[Standing, ...]
    front: tuple[Standing, ...]
    losers: tuple[Loser, ...]
    relax: tuple[Relaxation, ...] = ()
    together: tuple[Relaxation, ...] = ()
    break_even: BreakEven | None = None


def decide(evidence: Sequence[Evidence], limits: Limits) -> Decision:
    """Weigh the cases of one question against each other; what is equal in the objective goes by all the rest.

    Args:
        evidence: one entry a case, in any order.
        limits: what to keep to, and what to be best in.
    """
    # Best first in the objective, then in all the rest, then by id: runs measure in an order drawn at random.
    evidence = sorted(evidence, key=lambda one: (*_ranks(one, (limits.objective, *UNITS)), one.case.id))
    ran = [one for one in evidence if one.status == "ok"]
    losers = [_failed(one) for one in evidence if one.status != "ok"]
    broken = {one.case: list(breaks(one, limits)) for one in ran}
    losers += [_loser_by(broken[one.case][0], one) for one in ran if broken[one.case]]
    fit = [one for one in ran if not broken[one.case]]
    if not fit:
        relax = sorted(single(ran, limits), key=change)
        together = () if relax else tuple(fewest(ran, limits))
        return Decision(winner=None, ties=(), front=(), losers=tuple(losers), relax=tuple(relax), together=together)
    best = fit[0]
    ties = [one for one in fit if one is not best and _tied(one, best, limits.objective)]
    front = [one for one in fit if not any(_dominates(other, one) for other in fit)]
    losers += [_behind(one, fit) for one in fit if one is not best and one not in ties]
    return Decision(
        winner=_standing(best, limits),
        ties=tuple(_standing(one, limits) for one in ties),
        front=tuple(_standing(one, limits) for one in front),
        losers=tuple(losers),
        break_even=_break_even(fit),
    )


def _ranks(one: Evidence, quantities: Iterable[Quantity]) -> list[float]:
    return [rank(one, quantity) if quantity in one.estimates else float("inf") for quantity in quantities]


def _tied(one: Evidence, other: Evidence, quantity: Quantity) -> bool:
    return one.estimates[quantity].overlaps(other.estimates[quantity])


def _dominates(one: Evidence, other: Evidence) -> bool:
    """Whether `one` is at least as good in everything both were measured in, and better in something."""
    shared = [quantity for quantity in UNITS if quantity in one.estimates and quantity in other.estimates]
    ranks = [(rank(one, quantity), rank(other, quantity)) for quantity in shared]
    return all(a <= b for a, b in ranks) and any(a < b for a, b in ranks)


def _standing(one: Evidence, limits: Limits) -> Standing:
    return Standing(
        id=one.case.id,
        figures=dict(one.estimates),
        start_ms=one.start_ms,
        shares=one.shares,
        caveats=(*one.caveats, *borderline(one, limits)),
    )


def _failed(one: Evidence) -> Loser:
    return Loser(id=one.case.id, why="failed", reason=f"{one.status}: {one.reason}")


def _loser_by(broken: Broken, one: Evidence) -> Loser:
    return Loser(id=one.case.id, why="unjudged" if broken.value is None else "limit", reason=broken.reason)


def _behind(one: Evidence, fit: Sequence[Evidence]) -> Loser:
    """Why a case that keeps the limits lost: to the best of those that dominate it, if any does, else to the winner."""
    best = fit[0]
    above = [other for other in fit if _dominates(other, one)]
    by = above[0] if above else best
    ratios: dict[str, float] = {
        quantity: one.estimates[quantity].value / by.estimates[quantity].value
        for quantity in UNITS
        if quantity != "agreement" and _better(by, one, quantity) and by.estimates[quantity].value
    }
    words = ", ".join(f"{times:.2f}× the {quantity}" for quantity, times in ratios.items())
    if above:
        return Loser(
            id=one.case.id,
            why="dominated",
            reason=f"{words + ' of ' if words else 'no better in any respect than '}{by.case.id}",
            by=by.case.id,
            ratios=ratios,
        )
    better = [quantity for quantity in UNITS if _better(one, best, quantity)]
    return Loser(
        id=one.case.id,
        why="behind",
        reason=f"{words} of {best.case.id}; better in {' and '.join(better)}",
        by=best.case.id,
        ratios=ratios,
    )


def _better(one: Evidence, other: Evidence, quantity: Quantity) -> bool:
    both = quantity in one.estimates and quantity in other.estimates
    return both and rank(one, quantity) < rank(other, quantity)


def _break_even(fit: Sequence[Evidence]) -> BreakEven | None:
    """Images after which the winner's start is paid back, against the best case that starts sooner."""
    best = fit[0]
    sooner = [one for one in fit if _starts(one) < _starts(best)]
    if not sooner or best.start_ms is None:
        return None
    other = sooner[0]
    saved_ms = _image_ms(other) - _image_ms(best)
    if other.start_ms is None or saved_ms <= 0:
        return None
    return BreakEven(
        against=other.case.id,
        images=-int(-(best.start_ms - other.start_ms) // saved_ms),
        winner_start_ms=best.start_ms,
        other_start_ms=other.start_ms,
    )


def _starts(one: Evidence) -> float:
    return one.start_ms if one.start_ms is not None else float("inf")


def _image_ms(one: Evidence) -> float:
    rate = one.estimates.get("throughput")
    return 1000 / rate.value if rate is not None else float("inf")
