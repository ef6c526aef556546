"""Regressions that somebody has accepted: `bench/mutes.toml`, each with a reason and a day on which it ends.

    [[mute]]
    row = "train-eager-*"            # id of a case, or kernel and target; * and ? as in a shell
    metric = "time"                  # as in the table; * for all
    reason = "AdamW replaced by SGD with momentum, see #42"
    expires = 2027-03-31

An expired one fails the gate.
"""

import fnmatch
import tomllib
from datetime import date
from pathlib import Path

import msgspec

from bench.errors import UsageError

FILE = Path("bench") / "mutes.toml"


class Mute(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry; it holds up to and including the day `expires`."""

    row: str
    metric: str
    reason: str
    expires: date

    def expired(self, today: date) -> bool:
        """Whether its day is over: then it mutes nothing, and fails the gate until somebody takes it out."""
        return today > self.expires

    def covers(self, row: str, metric: str) -> bool:
        """Whether it speaks of this row."""
        return fnmatch.fnmatchcase(row, self.row) and fnmatch.fnmatchcase(metric, self.metric)


class _Mutes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    mute: tuple[Mute, ...] = ()


def read(root: Path) -> tuple[Mute, ...]:
    """The mutes of a checkout; none if it has no such file.

    Raises:
        UsageError: the file is not as described above, or a reason is empty.
    """
    path = root / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    try:
        mutes = msgspec.convert(tomllib.loads(text), _Mutes).mute
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"{FILE}: {error}; expected [[mute]] with row, metric, reason and expires (a date such as 2027-03-31)"
        ) from error
    for mute in mutes:
        if not mute.reason.strip():
            raise UsageError(f"{FILE}: the mute of {mute.row!r} has no reason: say why it is accepted")
    return mutes
