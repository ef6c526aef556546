"""What can be compared at all, and what needs no timing: cases of both sides, their probes, the kernels' resources."""

import shlex
from pathlib import Path

import msgspec

from bench.environment import ROOT
from bench.gate import deterministic, processes
from bench.gate.checkout import Side
from bench.gate.decision import Rule, Word
from bench.gate.protocol import Answer
from bench.gate.report import Row
from bench.gate.tell import Teller
from bench.report.table import counted

BASE_ONLY = "base has no such case: nothing to compare"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate is asked to do.

    Args:
        base: commit to compare with.
        head: commit to judge; the working tree, as it is, if None.
        preset: which cases.
        chosen: ids of cases instead of a preset's.
        load: modules that register further implementations.
        rule: what counts as evidence.
        budget_s: seconds after which no further trial is added.
        strict: whether an inconclusive row keeps the gate from passing.
        kernels: whether the kernels' compiled resources are compared.
        repository: whose commits these are.
    """

    base: str
    head: str | None = None
    preset: str = "ci"
    chosen: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    rule: Rule = Rule()
    budget_s: float = 600.0
    strict: bool = False
    kernels: bool = True
    repository: Path = ROOT

    def repeat(self, case: str = "") -> str:
        """The shell command that repeats a case, or the whole."""
        words = ["python", "-m", "bench", "gate", "--base", self.base]
        words += ["--head", self.head] if self.head else []
        words += ["--case", case] if case else ["--preset", self.preset]
        words += [word for module in self.load for word in ("--load", module)]
        return shlex.join(words)


class Findings:
    """Rows and notes as they come up, each row told at once unless it is a deterministic one that is SAME.

    Args:
        options: what the gate was asked to do.
        teller: who is told.
    """

    def __init__(self, options: Options, teller: Teller) -> None:
        self.options = options
        self.tell = teller
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def add(self, *rows: Row) -> None:
        """Take rows in."""
        self.rows += rows
        for row in rows:
            if row.word != "SAME" or row.estimate is not None:
                self.tell.row(row)

    def fault(self, name: str, word: Word, reason: str, *, fails: bool, case: str = "", metric: str = "*") -> None:
        """Take in a row that has no figures, of one case or of the whole."""
        repeat = self.options.repeat(case)
        self.add(Row(name=name, metric=metric, word=word, fails=fails, reason=reason, repeat=repeat))


class Screening:
    """Compares what is deterministic, and finds out which cases both sides can run.

    Args:
        options: what the gate was asked to do.
        base: what head is compared with.
        head: what is judged.
        work: starts the processes.
        found: takes the rows.
    """

    def __init__(self, options: Options, base: Side, head: Side, work: processes.Processes, found: Findings) -> None:
        self.options = options
        self.base = base
        self.head = head
        self.work = work
        self.found = found

    def run(self) -> list[str]:
        """Ids of the cases that can be timed."""
        shared = [case for case in self._cases() if self._probe(case)]
        if self.options.kernels and not self.options.chosen:
            self._resources()
        return shared

    def _cases(self) -> list[str]:
        """Ids that both sides may have; what base has and head lacks becomes a row at once."""
        if self.options.chosen:
            return list(dict.fromkeys(self.options.chosen))
        theirs: dict[str, str | None] = {}
        try:
            mine = processes.cases(self.head, self.options.preset, self.options.load)
        except LookupError as error:
            self.found.fault(
                "every case", "BROKEN", f"head cannot list the preset {self.options.preset}: {error}", fails=True
            )
            return []
        try:
            theirs |= processes.cases(self.base, self.options.preset, self.options.load)
        except LookupError as error:
            self.found.notes.append(
                f"base cannot list the preset {self.options.preset} ({error}): its cases are taken to be head's"
            )
        for case, unsupported in theirs.items():
            if case not in mine and unsupported is None:
                self.found.fault(case, "MISSING", "base has this case, head has not", fails=True, case=case)
        left_out = [case for case, why in mine.items() if why and (case not in theirs or theirs[case])]
        if left_out:
            self.found.notes.append(
                f"{counted(len(left_out), 'case')} not supported here, such as {left_out[0]}: {mine[left_out[0]]}"
            )
        for case, why in mine.items():
            if why and case not in left_out:
                reason = f"base runs it; unsupported in head: {why}"
                self.found.fault(case, "BROKEN", reason, fails=True, case=case)
        return [case for case, why in mine.items() if not why]

    def _probe(self, case: str) -> bool:
        """Deterministic rows of a case; whether it can be timed."""
        answers = []
        for name, side in (("base", self.base), ("head", self.head)):
            with self.found.tell.during(f"{case} · probing {name}") as tell:
                answers.append(self.work.probe(case, side, tell))
        before, after = answers
        if (row := self._unequal(case, before, after)) is not None:
            self.found.add(row)
            return False
        if before.status == "unsupported":
            self.found.notes.append(f"{case}: unsupported in base and head: {after.reason}")
            return False
        self.found.add(*deterministic.probed(case, before, after, self.options.rule, self.options.repeat(case)))
        return True

    def _unequal(self, case: str, base: Answer, head: Answer) -> Row | None:
        """The row of a case that not both can run. What head lacks or breaks fails; what base did is told."""
        words: dict[str, Word] = {"missing": "MISSING", "broken": "BROKEN", "unsupported": "BROKEN"}
        repeat = self.options.repeat(case)
        if base.status == head.status == "unsupported":
            return None
        if head.status == "missing" and base.status == "missing":
            return Row(name=case, metric="*", word="MISSING", fails=True, reason=f"neither has it: {head.reason}")
        if head.status != "ok":
            reason = f"{head.status} in head: {head.reason}"
            if base.status != "ok":
                reason += f"; {base.status} in base: {base.reason}"
            word = words[head.status]
            return Row(name=case, metric="*", word=word, fails=True, reason=reason, repeat=repeat)
        if base.status == "missing":
            return Row(name=case, metric="*", word="MISSING", reason=BASE_ONLY, repeat=repeat)
        if base.status != "ok":
            reason = f"{base.status} in base: {base.reason}"
            return Row(name=case, metric="*", word="BROKEN", reason=reason, repeat=repeat)
        return None

    def _resources(self) -> None:
        if processes.kernels_hash(self.base) == processes.kernels_hash(self.head):
            self.found.notes.append("kernels/ is the same in base and head: their compiled resources are")
            return
        found: dict[str, list[processes.Layer]] = {}
        for name, side in (("base", self.base), ("head", self.head)):
            with self.found.tell.during(f"compiling the kernels of {name} for {', '.join(deterministic.TARGETS)}"):
                try:
                    found[name] = processes.resources(side, deterministic.TARGETS)
                except LookupError as error:
                    self.found.fault("kernels", "BROKEN", f"{name}: {error}", fails=name == "head", metric="resources")
        if found.keys() == {"base", "head"}:
            rule, repeat = self.options.rule, self.options.repeat()
            self.found.add(*deterministic.compiled(found["base"], found["head"], rule, repeat))
