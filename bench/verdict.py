"""How a case has ended, from what its processes left behind; and from what several machines say of it."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.engine.protocol import Outcome
from bench.processes import died, killed_rank, never_met, phase, tail

FAILED = frozenset({"oom", "timeout", "crash", "unsupported"})


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one of several machines has to say of a case: why it failed there, or of number 0 also what was found."""

    outcome: Outcome | None = None


def joint(parts: Sequence[Part | None], titles: Sequence[str]) -> Outcome | None:
    """What all have to say together: a failure before a finding, and one's own failure before another's.

    Args:
        parts: of each machine, in order; None of one that has left.
        titles: their names.
    """
    left = [title for part, title in zip(parts, titles, strict=True) if part is None]
    told = [part.outcome for part in parts if part is not None and part.outcome is not None]
    if left:
        told.append(Outcome(status="crash", reason=f"{', '.join(left)} has left the run"))
    failed = [outcome for outcome in told if outcome.status in FAILED]
    return min(failed or told, key=lambda outcome: outcome.secondhand, default=None)


def part_of(folder: Path, code: int, launched: str) -> Outcome:
    """What the first rank here found, unless one failed: then the failure, the earliest, one's own before another's."""
    files = sorted(folder.glob("outcome.*.json"), key=lambda path: path.stat().st_mtime)
    try:
        found = [msgspec.json.decode(path.read_bytes(), type=Outcome) for path in files]
    except (OSError, msgspec.DecodeError) as error:
        return Outcome(status="crash", reason=f"what the process left cannot be read: {error}{tail(folder)}")
    # With torchrun its ranks have died, or of it.
    killed = f"{launched}: {died(code)}" if launched and code < 0 else killed_rank(folder)
    if killed is not None:
        return Outcome(status="crash", reason=f"{killed} in phase: {phase(folder)}{tail(folder)}")
    failed = [outcome for outcome in found if outcome.status in FAILED]
    if failed:
        first = min(failed, key=lambda outcome: outcome.secondhand)
        who = "" if first.secondhand or first.status == "unsupported" or not launched else f"rank {first.rank}: "
        where = f", in phase: {phase(folder)}" if first.secondhand else ""
        return msgspec.structs.replace(first, reason=f"{who}{first.reason}{where}")
    if code == 0 and found:
        return min(found, key=lambda outcome: outcome.rank)
    if launched and never_met(folder):
        return Outcome(
            status="timeout", reason=f"{launched} waited for the others in vain{tail(folder)}", secondhand=True
        )
    return Outcome(status="crash", reason=f"{died(code)} in phase: {phase(folder)}{tail(folder)}")
