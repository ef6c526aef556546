"""What runs say about one case, as far as a decision may use it: estimates, intervals, and what speaks against them."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Literal

import msgspec

from bench.case import Case
from bench.derive import derived
from bench.machine import slug
from bench.report.table import one_line
from bench.results import Record, Run

Quantity = Literal["latency", "throughput", "memory", "energy", "agreement"]
HIGHER_IS_BETTER = frozenset({"throughput", "agreement"})
FIGURE: Mapping[str, str] = {
    "throughput": "images_per_s",
    "memory": "peak_memory_mib",
    "energy": "energy_j_per_image",
    "agreement": "class_agreement",
}
"""The figure of a record behind each quantity; latency's is a percentile, see `latency_figure`."""

SCATTER = 0.04
"""Another process of the same code draws another speed: on a shared machine medians of two were seen 6 % apart (one
standard deviation), 4 % each. A case that was measured in one process alone is known no better than that."""

SHARES = ("mfu", "bandwidth_share")

# What one may choose when deploying. Every other axis, a new one too, makes another network or another thing to do with
# it: a question of its own, never compared.
CHOICES = (
    *("implementation", "precision", "layout", "batch", "devices", "strategy", "scaling"),
    *("container", "activations", "threads", "frame"),
)
# Agreement is compared as it is shown: a pixel in a million decides nothing.
DIGITS = 4


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate and the ends of what it may be.

    Args:
        value: the estimate; over several processes, the median of theirs.
        low: its lower end.
        high: its upper end.
    """

    value: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two cannot be told apart."""
        return self.low <= other.high and other.low <= self.high


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be decided: cases of one question may stand in for each other, those of two are never compared.

    Args:
        machine: the slug of the machine that all was measured on.
        weights: SHA-256 of the file of weights; empty for those that the suite fits itself.
        asked: what the cases have in common; `CHOICES` are at their defaults.
    """

    machine: str
    weights: str
    asked: Case


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """All that the runs say about one case.

    Args:
        case: the case.
        records: of the newest sources it was measured with, one a process; if any is not `ok`, that one alone.
        estimates: quantity → what it is, where it was measured and means something.
        shares: `mfu` and `bandwidth_share`, where its own run has measured the ceilings they are shares of.
        caveats: what speaks against trusting it, in words.
    """

    case: Case
    records: tuple[Record, ...]
    estimates: dict[str, Interval]
    shares: dict[str, float] = {}
    caveats: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """`ok`, or what happened instead."""
        return self.records[-1].status

    @property
    def reason(self) -> str:
        """Why it is not `ok`."""
        return one_line(self.records[-1].reason)

    def figure(self, name: str) -> float | None:
        """A figure's median over the processes, or None where one has none."""
        found = [number for record in self.records if isinstance(number := record.figures.get(name), int | float)]
        return median(found) if len(found) == len(self.records) else None

    @property
    def start_ms(self) -> float | None:
        """From a process that has its libraries to its first result: what a restart costs."""
        load = self.figure("artefact_load_ms")
        parts = [load if load is not None else self.figure("load_ms"), self.figure("first_call_ms")]
        return sum(part for part in parts if part is not None) if None not in parts else None


def latency_figure(percentile: int) -> str:
    """The figure of a step's duration at a percentile."""
    return f"p{percentile}_ms"


def questions(runs: Sequence[Run]) -> dict[Question, list[tuple[Run, Record]]]:
    """The records of all runs by the question they help to answer, in the order the questions first came up."""
    found: dict[Question, list[tuple[Run, Record]]] = {}
    blank = {name: getattr(Case(), name) for name in CHOICES}
    for run in sorted(runs, key=lambda run: run.header.environment.time):
        weights = run.header.settings.weights
        for record in run.records:
            question = Question(
                machine=slug(run.header.environment.machine),
                weights=weights.sha256 if weights is not None else "",
                asked=msgspec.structs.replace(record.case, **blank),
            )
            found.setdefault(question, []).append((run, record))
    return found


def weigh(measured: Iterable[tuple[Run, Record]], percentile: int) -> list[Evidence]:
    """The evidence about each case.

    Args:
        measured: records of one question with their runs, the oldest first.
        percentile: of a step's duration, which one the decision is about.
    """
    by_case: dict[Case, list[tuple[Run, Record]]] = {}
    for run, record in measured:
        by_case.setdefault(record.case, []).append((run, record))
    return [_weigh(case, found, percentile) for case, found in by_case.items()]


def _weigh(case: Case, measured: Sequence[tuple[Run, Record]], percentile: int) -> Evidence:
    # Older sources are another program. A failure counts more than successes beside it: it happens.
    newest = measured[-1][0].header.environment.source_hash
    current = [(run, record) for run, record in measured if run.header.environment.source_hash == newest]
    # A file that is named twice, or copied, is no second process.
    current = list({run.header.environment.time: (run, record) for run, record in current}.values())
    records = tuple(record for _, record in current)
    if failed := [record for record in records if record.status != "ok"]:
        return Evidence(case=case, records=(failed[-1],), estimates={})
    estimates = {
        "latency": _timed(records, latency_figure(percentile)),
        "throughput": _throughput(records),
        "memory": _plain(records, FIGURE["memory"]),
        "energy": _plain(records, FIGURE["energy"]),
        "agreement": _agreement(records),
    }
    return Evidence(
        case=case,
        records=records,
        estimates={name: interval for name, interval in estimates.items() if interval is not None},
        shares=_shares(*current[-1]),
        caveats=tuple(_caveats([run for run, _ in current], records)),
    )


def _shares(run: Run, record: Record) -> dict[str, float]:
    follows = next((found for one, found in zip(run.records, derived(run), strict=True) if one is record), {})
    return {name: follows[name] for name in SHARES if name in follows}


def _caveats(runs: Sequence[Run], records: Sequence[Record]) -> Iterable[str]:
    if any(record.figures.get("disturbed") is True for record in records):
        yield "disturbed: other processes used the cores meanwhile; measure again on an idle machine"
    if any(record.figures.get("warmup_ended") == "time" for record in records):
        yield "warm-up ended before the steps were steady"
    if any(record.figures.get("drifting") is True for record in records):
        yield "its speed was still moving: measure longer, or in the regime sustained"
    if any(record.figures.get("throttled") for record in records):
        yield "the GPU's clock was held down meanwhile"
    if any(record.figures.get("agreement_meaningful") is False for record in records):
        yield "agreement of classes says nothing about this network on this picture"
    if any(run.header.environment.dirty for run in runs):
        yield "measured with changed sources: such results do not count"
    if len(records) == 1:
        yield f"one process: another draws another speed, ±{SCATTER:.0%} allowed for"


def _timed(records: Sequence[Record], name: str) -> Interval | None:
    """A duration: the hull of all processes' own intervals; widened where there is one process alone."""
    found = [record.figures.get(name) for record in records]
    values = [value for value in found if isinstance(value, int | float)]
    if len(values) < len(records):
        return None
    lows, highs = (_ends(records, name, end, values) for end in ("low", "high"))
    alone = SCATTER if len(records) == 1 else 0.0
    middle = median(values)
    return Interval(value=middle, low=min(*lows, middle * (1 - alone)), high=max(*highs, middle * (1 + alone)))


def _ends(records: Sequence[Record], name: str, end: str, values: Sequence[float]) -> list[float]:
    wanted = name.replace("_ms", f"_{end}_ms")
    found = [record.figures.get(wanted) for record in records]
    return [own if isinstance(own, int | float) else value for own, value in zip(found, values, strict=True)] * 2


def _throughput(records: Sequence[Record]) -> Interval | None:
    """Images a second; its interval is that of the median duration, as shares of it."""
    rate, step = _plain(records, FIGURE["throughput"]), _timed(records, latency_figure(50))
    if rate is None or step is None:
        return None
    return Interval(
        value=rate.value,
        low=min(rate.low, rate.value * step.value / step.high),
        high=max(rate.high, rate.value * step.value / step.low),
    )


def _plain(records: Sequence[Record], name: str) -> Interval | None:
    values = [value for record in records if isinstance(value := record.figures.get(name), int | float)]
    if len(values) < len(records):
        return None
    return Interval(value=median(values), low=min(values), high=max(values))


def _agreement(records: Sequence[Record]) -> Interval | None:
    """Share of pixels with fp32 eager's class, rounded down; None where it would mean nothing."""
    found = _plain(records, FIGURE["agreement"])
    if found is None or not all(record.figures.get("agreement_meaningful") is True for record in records):
        return None
    scale = 10**DIGITS
    value, low, high = (int(number * scale) / scale for number in (found.value, found.low, found.high))
    return Interval(value=value, low=low, high=high)
