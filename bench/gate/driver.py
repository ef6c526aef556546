"""A gate from two commits to its report: screening, a rehearsal of each case, then trials until all is said.

The parent imports no torch; what is measured runs in processes of its own, one after another.
"""

import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.gate import mutes, processes
from bench.gate.checkout import Side, checked_out
from bench.gate.decision import Trial, estimate
from bench.gate.proceedings import Proceedings
from bench.gate.protocol import Answer
from bench.gate.report import TIME, Report, Row, Samples, muted
from bench.gate.screening import Findings, Options, Screening
from bench.gate.tell import Teller
from bench.machine import machine
from bench.processes import ending_in_order


class Gate:
    """One gate.

    Args:
        options: what it is asked to do.
        teller: who is told how far it is.
    """

    def __init__(self, options: Options, teller: Teller) -> None:
        self.options = options
        self.tell = teller
        self.found = Findings(options, teller)
        self.samples: list[Samples] = []
        self.together: dict[str, bool] = {}
        self._start = time.monotonic()
        self._seeds = random.SystemRandom()

    def run(self) -> Report:
        """Measure and judge.

        Raises:
            UsageError: no such commit, no git, or a mutes file that cannot be read.
            KeyboardInterrupt: Ctrl-C, SIGTERM or a closed terminal; worktrees and processes are gone by then.
        """
        options, started, load = self.options, datetime.now(UTC), os.getloadavg()[0]
        with (
            ending_in_order(),
            checked_out(options.repository, options.base) as base,
            checked_out(options.repository, options.head) as head,
            tempfile.TemporaryDirectory(prefix="unet-bench-gate-", ignore_cleanup_errors=True) as folder,
        ):
            accepted = mutes.read(Path(head.root))
            self.tell.line(f"base {base.name}, head {head.name}")
            work = processes.Processes(Path(folder), options.load)
            shared = Screening(options, base, head, work, self.found).run()
            self._time(shared, base, head, work)
        today = datetime.now(UTC).date()
        return Report(
            base=msgspec.structs.replace(base, root=""),
            head=msgspec.structs.replace(head, root=""),
            machine=machine(),
            started=started,
            seconds=self._elapsed_s(),
            load_average=(load, os.getloadavg()[0]),
            rule=options.rule,
            rows=muted(self.found.rows, accepted, today),
            notes=tuple(dict.fromkeys(self.found.notes)),
            mutes=accepted,
            today=today,
            strict=options.strict,
            samples=tuple(self.samples),
        )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def _time(self, cases: Sequence[str], base: Side, head: Side, work: processes.Processes) -> None:
        timed = [case for case in cases if self._rehearse(case, base, head, work)]
        twins = {_twin(case): case for case in _representatives(timed, self.together)}
        course = Proceedings([*timed, *twins], self.options.rule, self.options.budget_s, random.Random())  # noqa: S311
        number = 0
        while (row := course.ask(self._elapsed_s())) is not None:
            number += 1
            case = twins.get(row, row)
            roots = (base.root, base.root if row in twins else head.root)
            left = course.waiting * course.trial_s
            what = f"{course.phase} · trial {number}, {course.waiting} owed, about {left:.0f} s · {row}"
            start = time.monotonic()
            with self.tell.during(what) as tell:
                answer = work.trial(
                    case, roots, together=self.together[case], seed=self._seeds.getrandbits(32), tell=tell
                )
            if answer.status != "ok":
                course.drop(row)
                side = "base" if row in twins else answer.side
                reason = f"{side} in a trial: {answer.reason}".lstrip()  # without a word nobody knows which side died
                self.found.fault(row, "BROKEN", reason, fails=side != "base", case=case)
                continue
            course.tell(row, trial(answer), time.monotonic() - start)
            self.samples.append(_samples(row, course.phase, answer))
        for row in course.first:
            self._judge(row, course, twin=row in twins, case=twins.get(row, row))

    def _rehearse(self, case: str, base: Side, head: Side, work: processes.Processes) -> bool:
        """A trial that does not count: it fills the compiler's caches, and shows whether one process holds both."""
        for together in (True, False):
            with self.tell.during(f"{case} · rehearsal{'' if together else ' in two processes'}") as tell:
                answer = work.trial(case, (base.root, head.root), together=together, seed=0, tell=tell)
            if answer.status != "unshareable":
                break
            self.found.notes.append(f"{case}: a process each for base and head, which is noisier: {answer.reason}")
        self.together[case] = together
        if answer.status != "ok":
            reason = f"{answer.side} when timed: {answer.reason}".lstrip()
            self.found.fault(case, "BROKEN", reason, fails=answer.side != "base", case=case)
        return answer.status == "ok"

    def _judge(self, row: str, course: Proceedings, *, twin: bool, case: str) -> None:
        word = course.word(row)
        mine = [sample for sample in self.samples if sample.row == row]
        disturbed = [s.wall_per_cpu for s in mine if s.wall_per_cpu]
        crowded = statistics.median(disturbed) if disturbed else 1.0
        found = Row(
            name=row,
            metric=TIME,
            word=word,
            fails=word == "SLOWER",
            reason=f"others had the core: wall time {crowded:.2f} times CPU time" if crowded > 1.1 else "",  # noqa: PLR2004
            base=statistics.median(statistics.median(sample.base_ms) for sample in mine),
            head=statistics.median(statistics.median(sample.head_ms) for sample in mine),
            estimate=estimate([one.time for one in course.evidence(row)], self.options.rule),
            processes=1 if self.together[case] else 2,
            twin=twin,
            repeat=self.options.repeat(case),
        )
        self.found.add(found)


def _twin(case: str) -> str:
    return f"A/A {case}"


def _representatives(cases: Sequence[str], together: dict[str, bool]) -> list[str]:
    """The cases that base runs against itself: the first of each task and of each way of holding the versions."""
    first: dict[tuple[str, bool], str] = {}
    for case in cases:
        first.setdefault((case.partition("-")[0], together[case]), case)
    return list(first.values())


def trial(answer: Answer) -> Trial:
    """Medians over the pairs of a trial of log(head / base)."""
    logs = [math.log(head / base) for base, head in zip(answer.base_ms, answer.head_ms, strict=True)]
    cycles = [log + math.log(head / base) for log, (base, head) in zip(logs, answer.clock_mhz, strict=False)]
    return Trial(time=statistics.median(logs), cycles=statistics.median(cycles) if cycles else None)


def _samples(row: str, phase: str, answer: Answer) -> Samples:
    return Samples(
        row=row,
        phase=phase,
        base_ms=answer.base_ms,
        head_ms=answer.head_ms,
        clock_mhz=answer.clock_mhz,
        wall_per_cpu=answer.wall_per_cpu,
    )
