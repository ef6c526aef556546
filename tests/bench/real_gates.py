"""Real gates of this commit against itself: `python -m tests.bench.real_gates`, half an hour on an idle machine.

Twenty of identical code, which must not fail, and ten in which head is slowed down by 15 %. Each is recorded in
`results/gate/<machine>.json` when it ends, and another call goes on from there, whatever commit it finds; `python -m
bench calibrate --no-draw --into bench/README.md` puts them into the table.
"""

import os
import statistics
import sys
from datetime import UTC, datetime

import msgspec
from rich.console import Console

from bench.environment import ROOT, git_state
from bench.gate.driver import Gate
from bench.gate.rates import FOLDER, RealGate, RealGates
from bench.gate.report import TIME, Report
from bench.gate.screening import Options
from bench.gate.simulation import naive_check
from bench.gate.tell import Teller
from bench.machine import machine, slug

from .injected import VARIABLE

CASE = "infer-injected-fp32-nchw-transposed-b1-64x64-1cpu-w8-d2-t1"
IDENTICAL, SLOWED, INJECTED = 20, 10, 0.15
BUDGET_S = 120.0


def main() -> None:
    here = machine()
    path = FOLDER / f"{slug(here)}.json"
    commit, dirty = git_state()
    if dirty:
        sys.exit("the sources are changed: commit them first, or the record is of nothing that exists")
    found = RealGates(machine=here, case=CASE, started=datetime.now(UTC), injected=INJECTED, budget_s=BUDGET_S)
    if path.exists():
        before = msgspec.json.decode(path.read_bytes(), type=RealGates)
        found = before if before.case == CASE else found
    while len(found.identical) < IDENTICAL or len(found.slowed) < SLOWED:
        # In turn, so that both meet the same machine.
        slow = len(found.slowed) * IDENTICAL < len(found.identical) * SLOWED
        name = "slowed" if slow else "identical"
        done = (*getattr(found, name), gate(commit, INJECTED if slow else 0.0))
        found = msgspec.structs.replace(found, **{name: done})
        FOLDER.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        one = done[-1]
        said = f"{name} {len(done)}: {one.word}, {one.change:+.1%}, {one.trials} trials, A/A {one.self_word}"
        sys.stdout.write(f"{said}, {one.seconds:.0f} s, load {one.load_average[1]:.1f}\n")
        sys.stdout.flush()


def gate(commit: str, injected: float) -> RealGate:
    """One gate of HEAD against the working tree, which is HEAD."""
    os.environ[VARIABLE] = f"{ROOT}={injected}" if injected else ""
    options = Options(
        base="HEAD", chosen=(CASE,), load=("tests.bench.injected",), budget_s=BUDGET_S, kernels=False, repository=ROOT
    )
    report = Gate(options, Teller(Console(file=sys.stderr, quiet=True))).run()
    return summarize(commit, report)


def summarize(commit: str, report: Report) -> RealGate:
    (row,) = [row for row in report.rows if row.metric == TIME and not row.twin]
    (twin,) = [row for row in report.rows if row.twin]
    mine = [sample for sample in report.samples if sample.row == row.name]
    naive = naive_check()
    failed = tuple(naive(statistics.median(one.base_ms), statistics.median(one.head_ms)) for one in mine)
    assert row.estimate is not None
    return RealGate(
        commit=commit,
        word=row.word,
        self_word=twin.word,
        change=row.estimate.change,
        trials=row.estimate.trials,
        scatter=row.estimate.scatter,
        naive=failed[0],
        naive_each=failed,
        seconds=report.seconds,
        load_average=report.load_average,
    )


if __name__ == "__main__":
    main()
