"""A gate's own decisions: its processes are left out, and what they would answer is written down."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.gate.checkout import Side
from bench.gate.decision import Rule, Trial
from bench.gate.driver import Gate, trial
from bench.gate.processes import Processes, Tell
from bench.gate.protocol import Answer
from bench.gate.report import Row
from bench.gate.screening import Options, Screening
from bench.gate.tell import Teller

BASE, HEAD = Side(ref="main", commit="a" * 40, root="base"), Side(ref="topic", commit="b" * 40, root="head")
OK = Answer(status="ok", figures={"gflop": 10.0})
Trials = Callable[[str, tuple[str, str], bool], Answer]


def timed(base_ms: float, head_ms: float, **more: float) -> Answer:
    """A trial of five pairs, nearly all of which last so long."""
    return Answer(status="ok", base_ms=(*[base_ms] * 4, 99.0), head_ms=(*[head_ms] * 4, 1.0), **more)  # type: ignore[arg-type]


class Written(Processes):
    """What each probe and each trial would answer."""

    def __init__(self, probes: dict[str, Answer] | None = None, trials: Trials | None = None) -> None:
        super().__init__(Path(), ())
        self.probes, self.trials = probes or {}, trials
        self.asked: list[tuple[str, str]] = []

    def probe(self, case: str, side: Side, tell: Tell = lambda _: None) -> Answer:
        del tell
        self.asked.append((case, side.root))
        return self.probes[side.root]

    def trial(
        self, case: str, roots: tuple[str, str], *, together: bool, seed: int, tell: Tell = lambda _: None
    ) -> Answer:
        del seed, tell
        assert self.trials is not None
        return self.trials(case, roots, together)


def gate(**options: object) -> Gate:
    chosen = Options(base="main", rule=Rule(fewest=2, most=4, confidence=0.9), **options)  # type: ignore[arg-type]
    return Gate(chosen, Teller(Console(file=io.StringIO(), width=200)))


def screened(work: Written, *chosen: str) -> tuple[Gate, list[str]]:
    one = gate(chosen=chosen)
    return one, Screening(one.options, BASE, HEAD, work, one.found).run()


def rows(trials: Trials, *chosen: str) -> tuple[Gate, dict[str, Row]]:
    one = gate()
    one._time(chosen, BASE, HEAD, Written(trials=trials))
    return one, {row.name: row for row in one.found.rows}


def failed(status: str, reason: str) -> Answer:
    return Answer(status=status, reason=reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "head", "word", "fails", "reason"),
    [
        ("ok", "missing", "MISSING", True, "missing in head: its words"),
        ("ok", "broken", "BROKEN", True, "broken in head: its words"),
        ("ok", "unsupported", "BROKEN", True, "unsupported in head: its words"),
        ("missing", "ok", "MISSING", False, "base has no such case: nothing to compare"),
        ("broken", "ok", "BROKEN", False, "broken in base: the other's"),
        ("unsupported", "ok", "BROKEN", False, "unsupported in base: the other's"),
        ("missing", "missing", "MISSING", True, "neither has it: its words"),
        ("broken", "broken", "BROKEN", True, "broken in head: its words; broken in base: the other's"),
    ],
)
def test_what_head_lacks_or_breaks_fails_and_what_base_did_is_told(
    base: str,
    head: str,
    word: str,
    fails: bool,  # noqa: FBT001
    reason: str,
) -> None:
    answers = {"base": failed(base, "the other's"), "head": failed(head, "its words")}
    one, shared = screened(Written(answers), "infer-x")
    (row,) = one.found.rows
    assert (row.name, row.metric, row.word, row.fails, row.reason) == ("infer-x", "*", word, fails, reason)
    assert shared == []


def test_what_neither_supports_is_a_note_and_no_row() -> None:
    answers = {"base": failed("unsupported", "no GPU"), "head": failed("unsupported", "no GPU at all")}
    one, shared = screened(Written(answers), "infer-x")
    assert (one.found.rows, shared) == ([], [])
    assert one.found.notes == ["infer-x: unsupported in base and head: no GPU at all"]


def test_figures_of_head_are_held_against_those_of_base_and_the_case_is_timed() -> None:
    more = Answer(status="ok", figures={"gflop": 11.0, "live_mib": 1.0})
    one, shared = screened(Written({"base": OK, "head": more}), "infer-x")
    (row,) = one.found.rows
    assert (row.metric, row.word, row.base, row.head, row.fails) == ("gflop", "SLOWER", 10.0, 11.0, True)
    assert row.repeat == "python -m bench gate --base main --case infer-x"
    assert shared == ["infer-x"]


def test_a_case_that_is_named_twice_is_compared_once() -> None:
    work = Written({"base": OK, "head": OK})
    one, shared = screened(work, "infer-x", "infer-y", "infer-x")
    assert shared == ["infer-x", "infer-y"]
    assert len(one.found.rows) == 2
    assert work.asked == [(case, side) for case in shared for side in ("base", "head")]


def sides(tmp_path: Path, base: str, head: str) -> tuple[Side, Side]:
    """Two checkouts whose `bench list` says so: a line each of id and why it is unsupported, or a complaint."""
    found = []
    for name, told in (("base", base), ("head", head)):
        root = tmp_path / name
        (root / "bench").mkdir(parents=True)
        (root / "bench/__init__.py").touch()
        (root / "bench/__main__.py").write_text(told)
        found.append(Side(ref=name, commit="a" * 40, root=str(root)))
    return found[0], found[1]


def listing(**known: str) -> str:
    lines = [{"id": case, "unsupported": why or None} for case, why in known.items()]
    return f"import json\nfor line in {lines!r}: print(json.dumps(line))\n"


def listed(tmp_path: Path, base: str, head: str) -> tuple[Gate, Sequence[str]]:
    one = gate(head="topic")
    return one, Screening(one.options, *sides(tmp_path, base, head), Written(), one.found)._cases()


def test_each_case_that_one_side_alone_lists_or_runs_is_told_of(tmp_path: Path) -> None:
    base = listing(both="", gone="", gone_unsupported="no", dropped="", never="no GPU", grown="no GPU")
    head = listing(both="", new="", new_unsupported="no GPU", dropped="no longer", never="no GPU", grown="")
    one, shared = listed(tmp_path, base, head)
    assert shared == ["both", "new", "grown"]
    assert [(row.name, row.word, row.fails, row.reason) for row in one.found.rows] == [
        ("gone", "MISSING", True, "base has this case, head has not"),
        ("dropped", "BROKEN", True, "base runs it; unsupported in head: no longer"),
    ]
    assert one.found.notes == ["2 cases not supported here, such as new_unsupported: no GPU"]


def test_where_base_lists_nothing_heads_cases_are_taken_and_it_is_said(tmp_path: Path) -> None:
    one, shared = listed(tmp_path, "raise SystemExit('unknown preset')", listing(one="", other="no GPU"))
    assert shared == ["one"]
    assert one.found.rows == []
    assert one.found.notes == [
        "base cannot list the preset ci (unknown preset): its cases are taken to be head's",
        "1 case not supported here, such as other: no GPU",
    ]


def test_a_command_that_repeats_names_a_case_only_where_there_is_one(tmp_path: Path) -> None:
    one, _ = listed(tmp_path, listing(a=""), "raise SystemExit('no preset')")
    assert [row.repeat for row in one.found.rows] == ["python -m bench gate --base main --head topic --preset ci"]
    one, _ = listed(tmp_path / "again", listing(a=""), listing(b=""))
    assert [row.repeat for row in one.found.rows] == ["python -m bench gate --base main --head topic --case a"]


def test_a_checkout_that_prints_something_else_cannot_tell_its_cases(tmp_path: Path) -> None:
    one, shared = listed(tmp_path, listing(a=""), "print('here')\n" + listing(a=""))
    (row,) = one.found.rows
    assert (row.word, row.fails) == ("BROKEN", True)
    assert "here" in row.reason
    assert shared == []


def test_a_slower_head_is_slower_and_not_the_other_way_round() -> None:
    one, found = rows(lambda _, roots, __: timed(10.0, 10.0 if roots == ("base", "base") else 12.0), "infer-x")
    slow, self_row = found["infer-x"], found["A/A infer-x"]
    assert (slow.word, slow.fails, slow.base, slow.head) == ("SLOWER", True, 10.0, 12.0)
    assert slow.change == pytest.approx(0.2)
    assert slow.estimate is not None
    assert slow.estimate.trials == 6  # the first pass and twice as many to confirm
    assert (slow.twin, self_row.twin) == (False, True)
    assert (self_row.word, self_row.base, self_row.head) == ("SAME", 10.0, 10.0)
    assert slow.repeat == self_row.repeat == "python -m bench gate --base main --case infer-x"
    assert (slow.processes, slow.reason) == (1, "")
    assert [sample.phase for sample in one.samples if sample.row == "infer-x"] == [
        *["first pass"] * 2,
        *["confirming pass"] * 4,
    ]


def test_base_runs_against_itself_once_a_task_and_a_way_of_holding_the_versions() -> None:
    def trials(case: str, _: object, together: bool) -> Answer:  # noqa: FBT001
        if case == "infer-apart" and together:
            return failed("unshareable", "they set threads differently")
        return timed(10.0, 10.0)

    one, found = rows(trials, "infer-a", "infer-b", "train-a", "infer-apart")
    assert [name for name in found if name.startswith("A/A")] == ["A/A infer-a", "A/A train-a", "A/A infer-apart"]
    assert {name: found[name].processes for name in ("infer-a", "infer-apart", "A/A infer-apart")} == {
        "infer-a": 1,
        "infer-apart": 2,
        "A/A infer-apart": 2,
    }
    assert one.found.notes == [
        "infer-apart: a process each for base and head, which is noisier: they set threads differently"
    ]


@pytest.mark.parametrize(("wall_per_cpu", "told"), [(1.05, ""), (1.3, "others had the core: wall time 1.30 times")])
def test_a_core_that_others_had_is_said(wall_per_cpu: float, told: str) -> None:
    _, found = rows(lambda *_: timed(10.0, 10.0, wall_per_cpu=wall_per_cpu), "infer-x")
    assert found["infer-x"].reason.startswith(told)
    assert bool(found["infer-x"].reason) == bool(told)


@pytest.mark.parametrize(
    ("side", "fails", "begins"), [("base", False, "base when timed: "), ("head", True, "head when timed: ")]
)
def test_a_case_that_cannot_be_timed_is_held_against_the_side_that_failed(
    side: str,
    fails: bool,  # noqa: FBT001
    begins: str,
) -> None:
    broken = Answer(status="broken", side=side, reason="ZeroDivisionError")
    _, found = rows(lambda *_: broken, "infer-x")
    (row,) = found.values()
    assert (row.name, row.word, row.fails) == ("infer-x", "BROKEN", fails)
    assert row.reason == begins + "ZeroDivisionError"


def test_a_process_that_dies_without_a_word_is_told_of_without_a_side() -> None:
    calls = iter(range(9))
    for first in (0, 1):  # in the rehearsal, and after it
        calls = iter(range(-first, 9))
        died = failed("broken", "the process ended with status 7")
        _, found = rows(lambda *_: timed(1.0, 1.0) if next(calls) < 0 else died, "infer-x")  # noqa: B023
        row = found["infer-x"]
        assert (row.word, row.fails) == ("BROKEN", True)
        assert row.reason == f"{'in a trial' if first else 'when timed'}: the process ended with status 7"


def test_base_that_fails_against_itself_is_bases_fault_and_repeats_as_its_case() -> None:
    def trials(_: str, roots: tuple[str, str], __: bool) -> Answer:  # noqa: FBT001
        if roots == ("base", "base"):
            return Answer(status="broken", side="head", reason="out of memory")
        return timed(10.0, 10.0)

    _, found = rows(trials, "infer-x")
    row = found["A/A infer-x"]
    assert (row.word, row.fails, row.reason) == ("BROKEN", False, "base in a trial: out of memory")
    assert row.repeat == found["infer-x"].repeat == "python -m bench gate --base main --case infer-x"
    assert found["infer-x"].word == "SAME"


def test_a_trial_is_the_median_of_its_pairs_in_time_and_in_cycles() -> None:
    answer = Answer(status="ok", base_ms=(10.0, 10.0, 10.0), head_ms=(12.0, 12.0, 90.0))
    assert trial(answer) == Trial(time=pytest.approx(math.log(1.2)))
    slowed = msgspec.structs.replace(answer, clock_mhz=((1200.0, 1000.0),) * 3)
    assert trial(slowed).cycles == pytest.approx(0, abs=1e-12), "a sixth less clock, a fifth more time"
