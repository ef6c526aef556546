from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.errors import UsageError
from bench.gate import mutes
from bench.gate.checkout import Side
from bench.gate.decision import Rule, Word, estimate
from bench.gate.deterministic import compiled
from bench.gate.markdown import markdown
from bench.gate.mutes import Mute
from bench.gate.report import Report, Row, muted
from bench.gate.terminal import show

from .conftest import MACHINE

TODAY = date(2026, 11, 26)
MakeReport = Callable[..., Report]


def timed(word: Word, change: float = 0.0, name: str = "infer-eager", *, twin: bool = False) -> Row:
    found = estimate([change, change + 0.002, change - 0.002, change], Rule())
    return Row(
        name=name,
        metric="time",
        word=word,
        fails=word == "SLOWER",
        base=10.0,
        head=10.0 * (1 + change),
        estimate=found,
        processes=1,
        twin=twin,
        repeat=f"python -m bench gate --base main --case {name}",
    )


def report(*rows: Row, mute: tuple[Mute, ...] = (), strict: bool = False) -> Report:
    return Report(
        base=Side(ref="main", commit="a" * 40),
        head=Side(ref="working tree", commit="b" * 40, dirty=True),
        machine=MACHINE,
        started=datetime(2026, 11, 26, tzinfo=UTC),
        seconds=300.0,
        load_average=(0.5, 1.0),
        rule=Rule(),
        rows=muted(rows, mute, TODAY),
        mutes=mute,
        today=TODAY,
        strict=strict,
    )


SAME, SLOWER, SHRUG = timed("SAME"), timed("SLOWER", 0.1, "train-eager"), timed("INCONCLUSIVE", 0.01)
GONE = Row(name="infer-gone", metric="*", word="MISSING", fails=True, reason="head has not")
NEW = Row(name="infer-new", metric="*", word="MISSING", reason="base has no such case")
MORE = Row(name="train-eager", metric="saved_mib", word="SLOWER", fails=True, base=10.0, head=11.0)
FIRED = timed("FASTER", -0.1, "A/A infer-eager", twin=True)


@pytest.mark.parametrize(
    ("rows", "strict", "status"),
    [
        ((SAME, NEW), False, 0),
        ((SAME, SLOWER), False, 1),
        ((SAME, MORE), False, 1),
        ((SAME, GONE), False, 3),
        ((SLOWER, GONE), False, 1),
        ((SAME, SHRUG), False, 0),
        ((SAME, SHRUG), True, 4),
        ((SAME, FIRED), False, 4),
        ((SLOWER, FIRED), False, 4),  # a machine on which base differs from itself cannot fail anyone
        ((SLOWER, MORE, FIRED), False, 1),  # but memory is no matter of the machine
        ((NEW,), False, 5),
        ((NEW, GONE), False, 3),  # a head that breaks all there is has nothing in common with base, and fails
        ((), False, 5),
    ],
)
def test_exit_status(rows: tuple[Row, ...], strict: bool, status: int) -> None:  # noqa: FBT001
    assert report(*rows, strict=strict).status == status


def test_an_expired_mute_fails_where_nothing_can_be_compared_too() -> None:
    mute = Mute(row="x", metric="*", reason="for now", expires=date(2026, 11, 25))
    assert report(NEW, mute=(mute,)).status == 2


def test_a_head_that_breaks_all_there_is_fails_in_words_too() -> None:
    assert report(GONE).verdict == "fail: base and head share no case that both run, 1 missing or broken"
    assert report(NEW).verdict == "not comparable: base and head share no case that both run"


def test_rows_of_base_against_itself_are_held_against_nobody() -> None:
    wide = estimate([0.3, -0.3, 0.2, -0.2], Rule())
    twin = msgspec.structs.replace(FIRED, word="INCONCLUSIVE", fails=True, estimate=wide)
    found = report(SAME, SAME, twin)
    assert (found.status, found.verdict) == (0, "pass: no regression in 2 rows")
    assert found.noise_floor == wide.scatter
    assert found.smallest == SAME.estimate.smallest if SAME.estimate else None
    assert report(twin).status == 5, "base against itself is no comparison"


def test_what_a_run_could_have_seen_is_that_of_its_median_row_and_the_floor_of_its_noisiest() -> None:
    def of(scatter: float, *, twin: bool = False) -> Row:
        found = estimate([scatter, -scatter, scatter, -scatter], Rule())
        return msgspec.structs.replace(SAME, estimate=found, twin=twin)

    found = report(of(0.01), of(0.02), of(0.2), of(0.03, twin=True), of(0.001, twin=True))
    assert found.smallest == pytest.approx(estimate([0.02, -0.02] * 2, Rule()).smallest)
    assert found.noise_floor == pytest.approx(estimate([0.03, -0.03] * 2, Rule()).scatter)
    assert (report().smallest, report().noise_floor) == (None, None)


def test_the_change_of_a_figure_is_its_share_of_base() -> None:
    rows = {
        (base, head): msgspec.structs.replace(MORE, base=base, head=head)
        for base, head in ((10.0, 11.0), (0.0, 1.0), (0.0, 0.0))
    }
    assert rows[10.0, 11.0].change == pytest.approx(0.1)
    assert (rows[0.0, 1.0].change, rows[0.0, 0.0].change, GONE.change) == (float("inf"), 0.0, None)


def test_verdicts_count_in_the_plural_what_there_is_more_of() -> None:
    mutes = tuple(Mute(row=name, metric="*", reason="for now", expires=date(2026, 11, 25)) for name in "ab")
    assert report(SLOWER, MORE, GONE, SHRUG, mute=mutes).verdict == (
        "fail: 2 regressions, 1 missing or broken, 2 expired mutes, 1 inconclusive"
    )


def test_a_machine_too_restless_to_see_a_quarter_neither_passes_nor_fails() -> None:
    wild = msgspec.structs.replace(SHRUG, estimate=estimate([0.5, -0.5, 0.4, -0.4], Rule()))
    assert report(wild).status == 4
    assert "restless" in report(wild).verdict


def test_a_mute_lets_its_row_pass_until_its_day_and_is_shown() -> None:
    mute = Mute(row="train-*", metric="time", reason="SGD now, #42", expires=TODAY)
    found = report(SAME, SLOWER, mute=(mute,))
    assert found.status == 0
    assert "SLOWER, muted" in markdown(found)
    assert "SGD now, #42" in markdown(found)
    assert report(SAME, MORE, mute=(mute,)).status == 1, "another metric is not muted"


def test_an_expired_mute_mutes_nothing_and_fails_by_itself() -> None:
    mute = Mute(row="train-*", metric="*", reason="for now", expires=date(2026, 11, 25))
    assert report(SAME, SLOWER, mute=(mute,)).status == 1
    healthy = report(SAME, mute=(mute,))
    assert healthy.status == 2
    assert "1 expired mute" in healthy.verdict
    assert "expired on 2026-11-25" in markdown(healthy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[mute]]\nrow = "x"\nmetric = "*"\nexpires = 2027-01-01', "missing required field `reason`"),
        ('[[mute]]\nrow = "x"\nmetric = "*"\nreason = " "\nexpires = 2027-01-01', "has no reason"),
        ('[[mute]]\nrow = "x"\nmetric = "*"\nreason = "y"', "missing required field `expires`"),
        ('[[mute]]\nrow = "x"\nmetric = "*"\nreason = "y"\nexpires = "soon"', "expected \\[\\[mute\\]\\]"),
        ('[[mute]]\nrow = "x"\nfor = 3', "unknown field"),
        ("[[mute", "expected \\[\\[mute\\]\\]"),
    ],
)
def test_a_mute_without_reason_or_day_is_a_mistake(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / mutes.FILE).write_text(text)
    with pytest.raises(UsageError, match=expected):
        mutes.read(tmp_path)


def test_mutes_are_read_from_the_checkout(tmp_path: Path) -> None:
    assert mutes.read(tmp_path) == ()
    (tmp_path / "bench").mkdir()
    (tmp_path / mutes.FILE).write_text('[[mute]]\nrow = "x*"\nmetric = "time"\nreason = "y"\nexpires = 2027-01-01')
    (mute,) = mutes.read(tmp_path)
    assert mute.covers("xyz", "time")
    assert not mute.covers("xyz", "gflop")
    assert not mute.covers("axyz", "time")


def test_a_comment_says_verdict_worst_noise_floor_and_how_to_repeat() -> None:
    many = [timed("SAME", 0.001 * number, f"infer-{number}") for number in range(8)]
    text = markdown(report(SLOWER, GONE, *many, timed("SAME", 0.0, "A/A infer-0", twin=True)))
    lines = text.splitlines()
    assert lines[0] == "### ❌ Performance gate: fail: 1 regression, 1 missing or broken"
    assert "Noise floor 0.2 %" in text
    assert "smallest slow-down this run could have seen: 2.0 %" in text
    assert "worst five of 8" in text
    assert text.index("train-eager") < text.index("infer-7") < text.index("<details>")
    assert "python -m bench gate --base main --case train-eager" in text
    assert text.count("<details>") == text.count("</details>") == 2


def test_what_a_row_says_cannot_break_the_table() -> None:
    row = msgspec.structs.replace(GONE, reason="a | b <script>\nmore")
    assert "a \\| b &lt;script>" in markdown(report(SAME, row))


def test_a_terminal_ends_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(SAME, SLOWER, timed("SAME", 0.0, "A/A x", twin=True)), Console(width=160))
    assert capsys.readouterr().out.splitlines()[-1].strip() == "fail: 1 regression"


def test_a_narrow_terminal_gets_rows_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    show(report(SAME, SLOWER, GONE, timed("SAME", 0.0, "A/A x", twin=True)), Console(width=80))
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 80


def layer(problem: str, settings: str = "w4", **resources: int) -> dict[str, str | int]:
    equal = {"registers": 128, "spill_bytes": 0, "shared_bytes": 1024, "instructions": 1000}
    return {"kernel": "k", "target": "sm_90", "config": f"{problem} | {settings}", **equal, **resources}


def test_kernels_are_compared_layer_by_layer_whatever_their_launch_settings() -> None:
    base = [layer("64→64"), layer("64→128")]
    head = [layer("64→64", "w8"), layer("64→128", spill_bytes=16, instructions=990)]
    found = {row.metric: row for row in compiled(base, head, Rule(), "")}
    assert found["registers"].word == "SAME"
    assert (found["spill_bytes"].word, found["spill_bytes"].head) == ("SLOWER", 16.0)
    assert "1 of 2 layers; most in 64→128" in found["spill_bytes"].reason
    assert found["instructions"].word == "FASTER"


def test_a_layer_that_vanished_is_missing() -> None:
    found = list(compiled([layer("64→64"), layer("64→128")], [layer("64→64")], Rule(), ""))
    assert found[0].word == "MISSING"
    assert found[0].fails
    assert "64→128" in found[0].reason
