"""The verdicts of `python -m bench gate --json F`, as a page shows them: what it reads of that file is said here."""

from collections import Counter
from pathlib import Path

import msgspec

from bench.results import ResultsError


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A change as a share, above 0 where head is slower, and its bounds."""

    change: float
    low: float | None = None
    high: float | None = None


class Mute(msgspec.Struct, frozen=True, kw_only=True):
    """Why a row that fails may fail, and until when."""

    reason: str = ""
    expires: str = ""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One case, or kernel and target, and one metric.

    Args:
        name: what was compared.
        metric: `time`, or the name of a deterministic figure.
        word: FASTER, SAME, SLOWER, INCONCLUSIVE, MISSING or BROKEN.
        reason: why it is what it is.
        base: figure of base.
        head: figure of head.
        estimate: of the change of time.
        twin: base against itself.
        muted: the mute that covers it.
        repeat: the command that repeats the row.
    """

    name: str
    metric: str
    word: str
    reason: str = ""
    base: float | None = None
    head: float | None = None
    estimate: Estimate | None = None
    twin: bool = False
    muted: Mute | None = None
    repeat: str = ""

    @property
    def change(self) -> float | None:
        """As a share, above 0 where head is worse; None where there is no telling."""
        if self.estimate is not None:
            return self.estimate.change
        return self.head / self.base - 1 if self.base and self.head is not None else None


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two that were compared."""

    ref: str
    commit: str = ""
    dirty: bool = False

    @property
    def said(self) -> str:
        """`main f1957e7`, `working tree 7abe945 with changes`."""
        return f"{self.ref} {self.commit[:7]}{' with changes' if self.dirty else ''}"


class Verdicts(msgspec.Struct, frozen=True, kw_only=True):
    """A gate's outcome.

    Args:
        base: what head is compared with.
        head: what is judged.
        rows: one a case and metric.
        notes: what else is to be known.
    """

    base: Side
    head: Side
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        """How many rows of each word, the worst first; base against itself is not counted."""
        count = Counter(row.word for row in self.rows if not row.twin)
        words = ("BROKEN", "MISSING", "SLOWER", "INCONCLUSIVE", "FASTER", "SAME")
        return ", ".join(f"{count[word]} {word}" for word in words if count[word]) or "no row"


def read(path: Path) -> Verdicts:
    """Read a gate's JSON; fields that are not known here are passed over.

    Raises:
        ResultsError: no such file, or not a gate's.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Verdicts)
    except OSError as error:
        raise ResultsError(f"{path}: cannot read verdicts ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not what `python -m bench gate --json` writes ({error})") from error
