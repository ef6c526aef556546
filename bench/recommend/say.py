"""The decision in words, for a terminal or a pipe."""

from collections import Counter
from collections.abc import Iterator

from rich.console import Console

from bench.recommend.answer import Answer
from bench.recommend.decide import Decision, Standing
from bench.recommend.evidence import CHOICES, Interval, Question, latency_figure
from bench.recommend.limits import OPTION, UNITS, Limits
from bench.report.table import DASH, in_words, three_digits
from bench.report.terminal import print_table, print_text

NOT_MEASURED = "not measured, so it might win (nothing here is extrapolated):"
SHOWN = 8
"""So many cases that were not measured are named; the rest are counted."""


def say(answer: Answer, on: Console) -> None:
    """Print the answer to one question."""
    decision, limits = answer.decision, answer.limits

    def line(text: str, style: str = "") -> None:
        print_text(on, text, style)

    for conditions in answer.conditions:
        line(conditions, "dim")
    line(" · ".join(_asked(answer.question)), "bold")
    line("wanted: " + "; ".join(_wanted(limits)))
    line("")
    for text in _nothing(decision) if decision.winner is None else _winner(decision.winner, decision, limits):
        line(text)
    if len(decision.front) > 1:
        line("")
        line("on the Pareto front (nothing measured is at least as good in every respect):")
        rows = [_cells(one) for one in decision.front]
        headings = ("case", f"p{limits.percentile} ms", "img/s", "peak MiB", "same class", "J/img", "start s")
        kept = [i for i in range(len(headings)) if any(row[i] != DASH for row in rows)]
        print_table(on, [headings[i] for i in kept], [[row[i] for i in kept] for row in rows], labels=1)
    for heading, texts in (("lost:", list(_lost(decision))), (NOT_MEASURED, list(_left(answer)))):
        for text in ["", heading, *(f"  {text}" for text in texts)] if texts else ():
            line(text)
    line("")


def _left(answer: Answer) -> Iterator[str]:
    left = answer.not_measured
    # The likest to the winner of each implementation; the rest are counted.
    nearest = {id_.split("-")[1]: id_ for id_ in reversed(left)}
    shown = [id_ for id_ in left if id_ in nearest.values()][:SHOWN]
    yield from shown
    if len(left) > len(shown):
        yield f"… and {len(left) - len(shown)} more"
    for reason in dict.fromkeys(answer.absent.values()):
        yield f"{', '.join(name for name, why in answer.absent.items() if why == reason)}: {reason}"
    if left:
        weights = f" --weights FILE, {answer.question.weights[:12]}" if answer.question.weights else ""
        yield f"to know: python -m pytest bench --case {left[0]}{weights}; or this command with --measure, for all"


def _asked(question: Question) -> Iterator[str]:
    yield question.machine
    yield from in_words(question.asked, CHOICES)
    yield f"weights {question.weights[:12]}" if question.weights else "weights fitted by the suite"


def _wanted(limits: Limits) -> Iterator[str]:
    best = {
        "throughput": "most images a second",
        "latency": f"shortest step ({latency_figure(limits.percentile).removesuffix('_ms')})",
        "memory": "least memory",
        "energy": "least energy an image",
    }
    yield best[limits.objective]
    for quantity, limit in limits.given().items():
        at = f" at p{limits.percentile}" if quantity == "latency" else ""
        yield f"{OPTION[quantity]} {limit:g}{at}"


def _winner(winner: Standing, decision: Decision, limits: Limits) -> Iterator[str]:
    yield f"recommended: {winner.id}"
    yield f"  {_figures(winner, limits)}"
    if decision.ties:
        yield f"  not to be told apart from it in {limits.objective} (intervals overlap): choose by what else matters"
        for tie in decision.ties:
            yield f"    {tie.id}: {_figures(tie, limits)}"
    else:
        yield f"  sure: its interval of {limits.objective} overlaps no other's that keeps the limits"
    for caveat in winner.caveats:
        yield f"  but: {caveat}"
    if winner.shares:
        ceilings = {"mfu": "arithmetic", "bandwidth_share": "bandwidth"}
        near = " and ".join(f"{share:.0%} of the {ceilings[name]}" for name, share in winner.shares.items())
        yield f"  roofline: {near} that this machine reached in the same run (--ceilings)"
    even = decision.break_even
    if even is not None:
        yield (
            f"  pays off after {even.images:,} images against {even.against}: starting takes "
            f"{three_digits(even.winner_start_ms / 1000)} s, there {three_digits(even.other_start_ms / 1000)} s"
        )


def _figures(one: Standing, limits: Limits) -> str:
    shown = [name for name in UNITS if name in one.figures]
    return " · ".join(_estimate(one.figures[name], name, limits.percentile) for name in shown)


def _estimate(interval: Interval, quantity: str, percentile: int) -> str:
    unit = next(words for name, words in UNITS.items() if name == quantity)
    unit += f" (p{percentile})" if quantity == "latency" else ""
    if quantity == "agreement":
        return f"same class {interval.value:.4f}"
    value = three_digits(interval.value)
    ends = f" ({three_digits(interval.low)} … {three_digits(interval.high)})" if interval.low < interval.high else ""
    return f"{value} {unit}{ends}"


def _cells(one: Standing) -> tuple[str, ...]:
    values = {name: three_digits(interval.value) for name, interval in one.figures.items()}
    if "agreement" in one.figures:
        values["agreement"] = f"{one.figures['agreement'].value:.4f}"
    start = three_digits(one.start_ms / 1000 if one.start_ms is not None else None)
    return (
        one.id,
        *(values.get(name, DASH) for name in ("latency", "throughput", "memory", "agreement", "energy")),
        start,
    )


def _nothing(decision: Decision) -> Iterator[str]:
    yield "recommended: nothing. No measured case keeps every limit"
    for one in decision.relax:
        yield f"  relax {one.option} from {one.given:g} to {one.to:g}, and {one.id} fits"
    if not decision.relax and not decision.together:
        yield "  no single limit is to blame: see below what each case lacks"
    if decision.together:
        yield "  no single limit is enough; the nearest is " + decision.together[0].id + ", with all of"
        for one in decision.together:
            yield f"    {one.option} {one.given:g} → {one.to:g}"


def _lost(decision: Decision) -> Iterator[str]:
    """A line a case; cases that failed alike share one."""
    alike = Counter((loser.id.split("-")[1], loser.reason) for loser in decision.losers if loser.why == "failed")
    for loser in decision.losers:
        if loser.why != "failed":
            winner = decision.winner is not None and loser.by == decision.winner.id
            yield f"{loser.id}: {loser.reason.replace(loser.by, 'the winner') if winner else loser.reason}"
    for (implementation, reason), count in alike.items():
        yield f"{implementation}: {reason}" + (f" ({count} cases)" if count > 1 else "")
