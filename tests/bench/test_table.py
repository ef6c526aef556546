import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.case import Case
from bench.report.table import DASH, Table, conditions, counted, markdown, tables, three_digits
from bench.report.terminal import show
from bench.results import Header, Record, Run

MakeRecord = Callable[..., Record]


@pytest.fixture
def run(header: Header) -> Callable[..., Run]:
    return lambda *records: Run(path=Path("results/amd-epyc-2cpu/x.jsonl"), header=header, records=records)


def cell(table: Table, row: int, heading: str) -> str:
    return table.rows[row][table.headings.index(heading)]


def test_the_baseline_comes_first_and_is_one(run: Callable[..., Run], make_record: MakeRecord) -> None:
    (table,) = tables(
        run(
            make_record(Case(implementation="compile", precision="amp_bf16"), p50_ms=5.0, images_per_s=200.0),
            make_record(Case(implementation="compile"), p50_ms=8.0, images_per_s=125.0),
            make_record(Case(), p50_ms=10.0, images_per_s=100.0),
        )
    )
    assert [cell(table, row, "speed") for row in range(3)] == ["1.00×", "1.25×", "2.00×"]
    assert cell(table, 0, "implementation") == "eager"


def test_each_upsampling_has_its_own_baseline(run: Callable[..., Run], make_record: MakeRecord) -> None:
    (table,) = tables(
        run(
            make_record(Case(upsampling="bilinear"), p50_ms=10.0, images_per_s=100.0),
            make_record(Case(upsampling="bilinear", implementation="compile"), p50_ms=5.0, images_per_s=200.0),
            make_record(Case(upsampling="transposed"), p50_ms=20.0, images_per_s=50.0),
        )
    )
    assert [cell(table, row, "speed") for row in range(3)] == ["1.00×", "2.00×", "1.00×"]


def test_speed_of_many_devices_is_told_against_the_fewest(run: Callable[..., Run], make_record: MakeRecord) -> None:
    (table,) = tables(
        run(
            make_record(Case(devices="2cpu"), p50_ms=12.0, images_per_s=180.0),
            make_record(Case(devices="1cpu"), p50_ms=10.0, images_per_s=100.0),
        )
    )
    shown = {cell(table, row, "devices"): cell(table, row, "speed") for row in range(2)}
    assert shown == {"1cpu": "1.00×", "2cpu": "1.80×"}


@pytest.mark.parametrize("status", ["oom", "timeout", "crash", "unsupported"])
def test_a_case_that_failed_is_a_word_and_never_a_number(
    run: Callable[..., Run], make_record: MakeRecord, status: str
) -> None:
    (table,) = tables(
        run(
            make_record(Case(), p50_ms=10.0, images_per_s=100.0),
            make_record(Case(implementation="compile"), status, "for a reason"),
        )
    )
    assert cell(table, 1, "p50 ms") == status
    assert cell(table, 1, "speed") == cell(table, 1, "img/s") == DASH
    assert f"compile: {status}: for a reason" in table.notes


def test_an_inaccurate_case_shows_how_far_off_it_is_and_no_speed(
    run: Callable[..., Run], make_record: MakeRecord
) -> None:
    wrong = make_record(
        Case(implementation="compile"), "inaccurate", "too far", images_per_s=1e6, rel_l2=0.5, p50_ms=1e-3
    )
    (table,) = tables(run(make_record(Case(), p50_ms=10.0, images_per_s=100.0, rel_l2=0.0), wrong))
    assert cell(table, 1, "p50 ms") == "inaccurate"
    assert cell(table, 1, "speed") == cell(table, 1, "img/s") == DASH
    assert cell(table, 1, "rel. L2") == "0.500"


def test_a_baseline_that_failed_is_no_baseline(run: Callable[..., Run], make_record: MakeRecord) -> None:
    (table,) = tables(
        run(
            make_record(Case(), "oom", "why"), make_record(Case(implementation="compile"), p50_ms=1.0, images_per_s=9.0)
        )
    )
    assert "speed" not in table.headings


def test_agreement_of_a_network_that_learnt_nothing_is_called_so(
    run: Callable[..., Run], make_record: MakeRecord
) -> None:
    record = make_record(Case(), p50_ms=1.0, images_per_s=9.0, class_agreement=1.0, agreement_meaningful=False)
    (table,) = tables(run(record))
    assert cell(table, 0, "same class") == "not meaningful"


def test_agreement_is_never_rounded_up_to_all(run: Callable[..., Run], make_record: MakeRecord) -> None:
    record = make_record(Case(), p50_ms=1.0, images_per_s=9.0, class_agreement=0.99999, agreement_meaningful=True)
    (table,) = tables(run(record))
    assert cell(table, 0, "same class") == "0.9999"


def test_what_is_not_compared_makes_a_table_of_its_own(run: Callable[..., Run], make_record: MakeRecord) -> None:
    titles = [table.title for table in tables(run(make_record(Case()), make_record(Case(threads=1))))]
    assert titles == [
        "infer · batch 1 · 256x256 · fp32 · nchw · transposed · 1cpu",
        "infer · batch 1 · 256x256 · fp32 · nchw · transposed · 1cpu · threads 1",
    ]


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_a_narrow_terminal_loses_columns_and_never_a_digit(
    run: Callable[..., Run], make_record: MakeRecord, width: int
) -> None:
    figures = {"p50_ms": 1234.5, "p50_low_ms": 1230.0, "p50_high_ms": 1240.0, "images_per_s": 0.8101, "rel_l2": 0.00123}
    records = [
        make_record(Case(implementation=name, precision=precision, upsampling=upsampling), **figures)
        for name in ("eager", "compile")
        for precision in ("fp32", "amp_bf16")
        for upsampling in ("bilinear", "transposed")
    ]
    out = io.StringIO()
    show(run(*records), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    body = [line for line in lines if "1,230" in line]
    assert len(body) == 8
    assert all("1.00×" in line for line in body), "p50 and speed stay, whatever the width"
    assert "…" not in "".join(body).replace("1,230 … 1,240", "")
    if width >= 80:
        assert max(map(len, body)) <= width


def test_a_disturbed_case_is_marked_and_the_mark_explained(run: Callable[..., Run], make_record: MakeRecord) -> None:
    (table,) = tables(run(make_record(Case(), p50_ms=10.0, images_per_s=100.0, disturbed=True)))
    assert cell(table, 0, "p50 ms") == "10.0*"
    assert any(note.startswith("* other processes used the cores") for note in table.notes)


def test_equal_reasons_are_said_once(run: Callable[..., Run], make_record: MakeRecord) -> None:
    records = [
        make_record(Case(implementation="triton", precision=precision), "unsupported", "no CUDA device")
        for precision in ("fp32", "amp_bf16")
    ]
    (table,) = tables(run(*records))
    assert "triton: unsupported: no CUDA device (2 cases)" in table.notes


def test_results_of_changed_sources_say_that_they_do_not_count(header: Header) -> None:
    import msgspec

    env = msgspec.structs.replace(header.environment, dirty=True)
    changed = Run(path=Path("x"), header=msgspec.structs.replace(header, environment=env), records=())
    assert "these results do not count" in conditions(changed)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (1234567.0, "1,230,000"),
        (1.03e36, "1.03e+36"),
        (float("inf"), "inf"),
        (1230, "1,230"),
        (412.4, "412"),
        (41.24, "41.2"),
        (4.1249, "4.12"),
        (0.41249, "0.412"),
        (0.0412, "0.0412"),
        (3.21e-6, "3.21e-06"),
        (0.0, "0"),
        (9.996, "10.0"),
        (None, DASH),
        (float("nan"), DASH),
        ("text", DASH),
    ],
)
def test_figures_have_three_digits(number: object, shown: str) -> None:
    assert three_digits(number) == shown


def test_what_is_counted_is_one_or_several() -> None:
    assert [counted(number, "case") for number in (0, 1, 2, 1024)] == ["0 cases", "1 case", "2 cases", "1,024 cases"]


@given(st.floats(1e-3, 1e9))
def test_three_digits_lose_less_than_a_percent(number: float) -> None:
    assert float(three_digits(number).replace(",", "")) == pytest.approx(number, rel=6e-3)


def test_markdown_has_a_row_a_case(run: Callable[..., Run], make_record: MakeRecord) -> None:
    text = markdown(run(make_record(Case(), p50_ms=10.0, images_per_s=100.0), make_record(Case(precision="amp_bf16"))))
    assert [line for line in text.splitlines() if line.startswith("| ")][2].startswith("| fp32 |")


def test_markdown_shows_hostile_text_as_text(run: Callable[..., Run], make_record: MakeRecord) -> None:
    text = markdown(run(make_record(Case(), "crash", "<img src=x> | [a](http://b) `c`\n| d |")))
    assert "&lt;img src=x> \\| \\[a\\](http://b) \\`c\\`" in text
    assert "| d |" not in text
