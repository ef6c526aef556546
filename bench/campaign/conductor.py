"""Give the commands of a campaign one after another, each with its time limit, and remember which have ended.

`DIR/<step>/outcome.json` is there once a step has ended: it is not begun again until somebody removes the folder. All
else in the folder belongs to the command; `log` is what it printed last, `log.1`, … what it printed before.
"""

import functools
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from bench.campaign.steps import Step
from bench.environment import ROOT
from bench.machine import Machine, usable_gpus
from bench.processes import Progress, died, supervise, tail

# Until a stopped command and its processes are gone, the summary is written and all is packed.
RESERVE_S = 20.0
TRY = "import torch; torch.zeros(1, device='cuda').item()"
TRY_S = 60.0
TUNED = ROOT / "kernels" / "tuned"
SCRATCH = ("triton", "inductor", "pytest-of-*", "unet-bench-*", "tmp*")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an attempt at a step ended.

    Args:
        step: its name.
        status: `ok`; `failed` (something in it did: see the log); `timeout` (over its own limit); `unsupported`;
            `unfinished` (the run had no more time for it: the next one goes on).
        reason: why it is not `ok`.
        command: as one gives it by hand.
        seconds: that the attempt took.
        attempts: how many there were.
        started: when, in UTC.
    """

    step: str
    status: Literal["ok", "failed", "timeout", "unsupported", "unfinished"]
    reason: str = ""
    command: str
    seconds: float = 0.0
    attempts: int = 0
    started: datetime


class Conductor:
    """A campaign in its folder.

    Args:
        folder: DIR, absolute.
        machine: where.
        seconds: that this run may take, from now on.
    """

    def __init__(self, folder: Path, machine: Machine, seconds: float) -> None:
        self.folder = folder
        self.machine = machine
        self._end = time.monotonic() + seconds

    def run(self, steps: Sequence[Step], tell: Callable[[str], None], progress: Callable[[], Progress]) -> None:
        """Attempt every step that has not ended, in order, while there is time."""
        self._hand_over(self.folder / "tune", TUNED)
        for step in steps:
            if (before := ended(self.folder, step)) is not None:
                tell(f"{step.name}: {before.status} before")
                continue
            outcome = self._attempt(step, tell, progress())
            tell(f"{step.name}: {outcome.status}, {outcome.seconds:.0f} s{outcome.reason and f': {outcome.reason}'}")

    def _command(self, step: Step) -> list[str]:
        return [word.replace("{out}", str(self.folder)) for word in step.command]

    @functools.cached_property
    def _why_no_gpu(self) -> str:
        """Why the GPU cannot be used, found out once; empty if it can: tests would be skipped, and pass for fine."""
        if not usable_gpus(self.machine):
            return "no CUDA device"
        own = self.folder / "cuda"
        own.mkdir(parents=True, exist_ok=True)
        code, stopped = supervise([sys.executable, "-c", TRY], own, TRY_S, lambda *_: None)
        return f"torch cannot use the GPU: {tail(own, 1).strip() or died(code)}" if code or stopped else ""

    def _attempt(self, step: Step, tell: Callable[[str], None], progress: Progress) -> Outcome:
        own = self.folder / step.name
        own.mkdir(parents=True, exist_ok=True)
        attempts = len(list(own.glob("log*")))
        outcome = Outcome(
            step=step.name,
            status="unfinished",
            reason="no time left",
            command=" ".join(["python", *self._command(step)]),
            attempts=attempts,
            started=datetime.now(UTC),
        )
        why = self._why_no_gpu if step.gpu else ""
        limit_s = min(step.limit_s, self._end - time.monotonic() - RESERVE_S)
        if why:
            outcome = msgspec.structs.replace(outcome, status="unsupported", reason=why)
        elif limit_s >= min(step.least_s, step.limit_s):
            tell(f"{step.name}: {outcome.command}")
            if attempts:
                (own / "log").rename(own / f"log.{attempts}")
            outcome = self._supervised(step, own, limit_s, progress, outcome)
        _write(own / ("attempt.json" if outcome.status in {"unfinished", "unsupported"} else "outcome.json"), outcome)
        return outcome

    def _supervised(self, step: Step, own: Path, limit_s: float, progress: Progress, outcome: Outcome) -> Outcome:
        start = time.monotonic()
        # It becomes the command, and dies with this process however that dies.
        command = [sys.executable, "-m", "bench.lifeline", sys.executable, *self._command(step)]
        code, stopped = supervise(command, own, limit_s, progress, cwd=ROOT)
        self._hand_over(TUNED, self.folder / "tune")
        seconds, attempts = time.monotonic() - start, outcome.attempts + 1
        outcome = msgspec.structs.replace(outcome, seconds=seconds, attempts=attempts)
        if stopped and (step.goes_on or limit_s < step.limit_s):
            return msgspec.structs.replace(outcome, reason=f"stopped after {limit_s:.0f} s")
        for scratch in (path for pattern in SCRATCH for path in own.glob(pattern)):
            shutil.rmtree(scratch, ignore_errors=True)
        if stopped:
            return msgspec.structs.replace(outcome, status="timeout", reason=f"longer than {limit_s:.0f} s")
        if code:
            return msgspec.structs.replace(outcome, status="failed", reason=f"{died(code)}:{tail(own, 1)}")
        return msgspec.structs.replace(outcome, status="ok", reason="")

    @staticmethod
    def _hand_over(source: Path, target: Path) -> None:
        """Launch settings measured so far, where they are newer: a machine may be bare when the campaign goes on."""
        for file in source.glob("nvidia*.json"):
            other = target / file.name
            if not other.exists() or other.stat().st_mtime < file.stat().st_mtime:
                target.mkdir(exist_ok=True)
                shutil.copy2(file, other)


def ended(folder: Path, step: Step) -> Outcome | None:
    """How a step ended, or None while it has not."""
    return _read(folder / step.name / "outcome.json")


def last(folder: Path, step: Step) -> Outcome | None:
    """How the last attempt at a step ended, or None if there was none."""
    return ended(folder, step) or _read(folder / step.name / "attempt.json")


def _read(path: Path) -> Outcome | None:
    return msgspec.json.decode(path.read_bytes(), type=Outcome) if path.exists() else None


def _write(path: Path, outcome: Outcome) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=1))
    part.replace(path)
