"""The gate's error rates, drawn and real, as one table; `results/gate/` holds what it is made of."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from bench.environment import ROOT
from bench.errors import UsageError
from bench.gate.decision import Word
from bench.gate.simulation import Rates
from bench.machine import Machine

FOLDER = ROOT / "results" / "gate"
SIMULATED = "simulated.json"
MARKS = ("<!-- error rates: written by `python -m bench calibrate --into FILE` -->", "<!-- end of error rates -->")


class RealGate(msgspec.Struct, frozen=True, kw_only=True):
    """One gate on a machine.

    Args:
        commit: whose code was compared with itself.
        word: the verdict on the time of its one case.
        self_word: that of base against itself.
        change: the estimate, as a share.
        trials: behind it.
        scatter: of the trials.
        naive: whether pytest-benchmark's `median:5%` fails the first trial's samples.
        naive_each: the same of every trial.
        seconds: that it took.
        load_average: over one minute, before and after.
    """

    commit: str
    word: Word
    self_word: Word
    change: float
    trials: int
    scatter: float
    naive: bool
    naive_each: tuple[bool, ...]
    seconds: float
    load_average: tuple[float, float]


class RealGates(msgspec.Struct, frozen=True, kw_only=True):
    """Gates of one case on one machine, as `python -m tests.bench.real_gates` records them.

    Args:
        machine: where.
        case: id.
        started: when the first began, UTC.
        identical: gates of identical code.
        slowed: gates in which head was slowed down.
        injected: by this share.
        budget_s: of each.
    """

    machine: Machine
    case: str
    started: datetime
    identical: tuple[RealGate, ...] = ()
    slowed: tuple[RealGate, ...] = ()
    injected: float
    budget_s: float


def read(folder: Path = FOLDER) -> tuple[list[Rates], list[RealGates]]:
    """What was simulated, and what was run.

    Raises:
        UsageError: there is no simulation, or a file cannot be read.
    """
    try:
        simulated = msgspec.json.decode((folder / SIMULATED).read_bytes(), type=list[Rates])
        real = [
            msgspec.json.decode(path.read_bytes(), type=RealGates)
            for path in sorted(folder.glob("*.json"))
            if path.name != SIMULATED
        ]
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{folder}: no error rates there ({error}); `python -m bench calibrate` draws them") from error
    return simulated, real


def table(simulated: Sequence[Rates], real: Iterable[RealGates]) -> str:
    """Markdown: a row a noise and budget, then a row a machine; shares of whole gates."""
    head = (
        "| gates | noise of a trial | budget | false alarms | slow-down found | rows of identical code told SAME "
        "| `median:5%` false alarms | `median:5%` finds it |"
    )
    lines = [head, "|:--|--:|--:|--:|--:|--:|--:|--:|"]
    lines += [
        f"| drawn: {rates.gates:,} of {rates.rows} cases | {rates.noise:.1%} | {rates.budget_s:,.0f} s "
        f"| {rates.false_alarms:.1%} | {rates.found:.1%} of {rates.effect:.0%} | {rates.conclusive:.0%} "
        f"| {rates.naive_false_alarms:.1%} | {rates.naive_found:.1%} |"
        for rates in simulated
    ]
    lines += [_real_row(one) for one in real]
    return "\n".join([*lines, "", *_notes(real)])


def _real_row(one: RealGates) -> str:
    scatters = sorted(gate.scatter for gate in (*one.identical, *one.slowed))
    same = sum(gate.word == "SAME" for gate in one.identical)
    return (
        f"| real: {len(one.identical)} and {len(one.slowed)} of one case, {one.machine.cpu}, {one.machine.cores} cores "
        f"| {scatters[len(scatters) // 2]:.1%} | {one.budget_s:,.0f} s | {_share(one.identical, 'SLOWER')} "
        f"| {_share(one.slowed, 'SLOWER')} of {one.injected:.0%} | {same} of {len(one.identical)} "
        f"| {_naive(one.identical)} | {_naive(one.slowed)} |"
    )


def _share(gates: Sequence[RealGate], word: Word) -> str:
    return f"{sum(gate.word == word for gate in gates)} of {len(gates)}"


def _naive(gates: Sequence[RealGate]) -> str:
    return f"{sum(gate.naive for gate in gates)} of {len(gates)}"


def _notes(real: Iterable[RealGates]) -> Iterator[str]:
    yield (
        "Drawn: normal noise from process to process, 3 s a trial, A/A rows included; through the functions that CI "
        "calls. `median:5%` is pytest-benchmark's own check, on the first trial of each row."
    )
    for one in real:
        gates = (*one.identical, *one.slowed)
        loads = [load for gate in gates for load in gate.load_average]
        commits = ", ".join(dict.fromkeys(gate.commit[:7] for gate in gates))
        each = [failed for gate in one.identical for failed in gate.naive_each]
        fired = sum(gate.self_word in {"SLOWER", "FASTER"} for gate in one.identical)
        yield (
            f"\nReal: `{one.case}`, each commit against itself ({commits}), {one.started:%Y-%m-%d}; load average "
            f"{min(loads):.1f} to {max(loads):.1f} on {one.machine.cores} cores; A/A fired in {fired} of "
            f"{len(one.identical)}. `median:5%` would have failed {sum(each)} of {len(each)} single trials of "
            f"identical code, and these flatter it: base and head are interleaved in one process there, which its own "
            f"two runs are not."
        )


def around(path: Path) -> tuple[str, str]:
    """What stands before and after the place of the rates in a Markdown file, marks included.

    Raises:
        UsageError: the file cannot be read, or has no marks.
    """
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read it ({error})") from error
    before, begin, rest = whole.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise UsageError(f"{path}: no place for the error rates; expected the lines {MARKS[0]} and {MARKS[1]}")
    return before + begin, end + after


def insert(path: Path, text: str) -> None:
    """Replace what stands between the marks in a Markdown file.

    Raises:
        UsageError: as `around`.
    """
    before, after = around(path)
    path.write_text(f"{before}\n\n{text}\n{after}", encoding="utf-8")
