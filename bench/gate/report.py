"""What a gate found, and what a build does with it. Pure: rows in, verdict and exit status out."""

import statistics
from collections.abc import Iterator, Sequence
from datetime import date, datetime

import msgspec

from bench.gate.checkout import Side
from bench.gate.decision import UNFIT, Estimate, Rule, Word
from bench.gate.mutes import Mute
from bench.machine import Machine
from bench.report.table import counted

SCHEMA = 1
TIME = "time"
# Exit statuses of `python -m bench`.
FINE, REGRESSION, USAGE, BROKEN, UNDECIDED, INCOMPARABLE = 0, 1, 2, 3, 4, 5


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case and one metric.

    Args:
        name: id of the case, or kernel and target.
        metric: `time`, or the name of a deterministic figure, of which less is better too.
        word: the verdict; SLOWER and FASTER read "more" and "less" where the metric is not time.
        fails: whether the verdict would fail a build, mutes aside: SLOWER, and what head lacks or breaks.
        reason: why it is MISSING or BROKEN, or what else is to be known.
        base: of base, in the metric's unit (ms for time: median of per-trial medians).
        head: of head.
        estimate: of the change of time.
        processes: 1 where both versions were loaded into one process, 2 where each had its own; 0 for no time.
        twin: an A/A row: base against itself.
        muted: the mute that covers it, if it fails.
        repeat: the command that repeats this row.
    """

    name: str
    metric: str
    word: Word
    fails: bool = False
    reason: str = ""
    base: float | None = None
    head: float | None = None
    estimate: Estimate | None = None
    processes: int = 0
    twin: bool = False
    muted: Mute | None = None
    repeat: str = ""

    @property
    def change(self) -> float | None:
        """As a share, above 0 where head is slower or takes more; None where there is no telling."""
        if self.estimate is not None:
            return self.estimate.change
        if self.base is None or self.head is None:
            return None
        return self.head / self.base - 1 if self.base else (0.0 if not self.head else float("inf"))


class Samples(msgspec.Struct, frozen=True, kw_only=True):
    """One trial as it was measured."""

    row: str
    phase: str
    base_ms: tuple[float, ...]
    head_ms: tuple[float, ...]
    clock_mhz: tuple[tuple[float, float], ...] = ()
    wall_per_cpu: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A gate: `--json` writes it, with every sample.

    Args:
        schema: of this format.
        base: what head is compared with.
        head: what is judged.
        machine: where.
        started: when, UTC.
        seconds: that it took.
        load_average: over one minute, before and after.
        rule: what counts as evidence.
        rows: all verdicts, A/A rows included.
        notes: what else is to be known.
        mutes: all that the checkout has.
        today: the day that mutes are held against.
        strict: whether an inconclusive row keeps the gate from passing.
        samples: of every trial.
    """

    schema: int = SCHEMA
    base: Side
    head: Side
    machine: Machine
    started: datetime
    seconds: float
    load_average: tuple[float, float]
    rule: Rule
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    mutes: tuple[Mute, ...] = ()
    today: date
    strict: bool = False
    samples: tuple[Samples, ...] = ()

    @property
    def regressions(self) -> list[Row]:
        """Rows that are worse, mutes and, where A/A fired, times aside."""
        return [row for row in self._failing() if row.word == "SLOWER" and not (row.metric == TIME and self.fired)]

    @property
    def broken(self) -> list[Row]:
        """Rows that head lacks or breaks, mutes aside."""
        return [row for row in self._failing() if row.word in {"MISSING", "BROKEN"}]

    @property
    def expired(self) -> list[Mute]:
        """Mutes whose day is over."""
        return [mute for mute in self.mutes if mute.expired(self.today)]

    @property
    def fired(self) -> list[Row]:
        """A/A rows in which base differs from itself."""
        return [row for row in self.rows if row.twin and row.word in {"SLOWER", "FASTER"}]

    @property
    def inconclusive(self) -> list[Row]:
        """Rows of which nothing can be said."""
        return [row for row in self.rows if not row.twin and row.word == "INCONCLUSIVE"]

    @property
    def compared(self) -> list[Row]:
        """Rows of which base and head both have something to show."""
        return [row for row in self.rows if not row.twin and row.word not in {"MISSING", "BROKEN"}]

    @property
    def noise_floor(self) -> float | None:
        """What base differs from itself from one process to the next, as a share: the largest of the A/A rows."""
        return max((row.estimate.scatter for row in self.rows if row.twin and row.estimate), default=None)

    @property
    def smallest(self) -> float | None:
        """The slow-down that this run saw in 80 % of its repetitions, in the median row; as a share."""
        found = [row.estimate.smallest for row in self.rows if not row.twin and row.estimate]
        return statistics.median(found) if found else None

    @property
    def unfit(self) -> bool:
        """Whether the machine was so restless that the run could not have seen a quarter."""
        return self.smallest is not None and self.smallest > UNFIT

    @property
    def status(self) -> int:
        """The exit status: what certainly fails comes before what cannot be told."""
        if self.regressions:
            return REGRESSION
        if self.broken:
            return BROKEN
        if self.expired:
            return USAGE
        if not self.compared:
            return INCOMPARABLE
        if self.fired or self.unfit or (self.strict and self.inconclusive):
            return UNDECIDED
        return FINE

    @property
    def verdict(self) -> str:
        """The status in a line."""
        words = list(self._words()) or [f"no regression in {counted(len(self.compared), 'row')}"]
        if self.inconclusive:
            words.append(f"{len(self.inconclusive)} inconclusive")
        sign = {FINE: "pass", UNDECIDED: "undecided", INCOMPARABLE: "not comparable"}.get(self.status, "fail")
        return f"{sign}: {', '.join(words)}"

    def _words(self) -> Iterator[str]:
        if not self.compared:
            yield "base and head share no case that both run"
        if self.regressions:
            yield counted(len(self.regressions), "regression")
        if self.broken:
            yield f"{len(self.broken)} missing or broken"
        if self.expired:
            yield counted(len(self.expired), "expired mute")
        if self.fired:
            yield "base differs from itself (A/A), so no time counts"
        elif self.unfit:
            yield "the machine was too restless to see a slow-down of a quarter"

    def _failing(self) -> list[Row]:
        return [row for row in self.rows if row.fails and row.muted is None and not row.twin]


def muted(rows: Sequence[Row], mutes: Sequence[Mute], today: date) -> tuple[Row, ...]:
    """The rows, those that fail with the mute that covers them and has not expired."""
    valid = [mute for mute in mutes if not mute.expired(today)]
    return tuple(
        msgspec.structs.replace(
            row, muted=next((mute for mute in valid if row.fails and mute.covers(row.name, row.metric)), None)
        )
        for row in rows
    )
