"""What follows from figures: shares of measured ceilings, break-even, places on the roofline."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from bench.case import Case
from bench.derive import ceiling_of, derived, place_of, roofline
from bench.readings import Ceiling, Stage
from bench.report.stages import stage_rows
from bench.report.terminal import show
from bench.results import Header, Record, Run, frame, read
from bench.runfile import RunFile

MakeRecord = Callable[..., Record]
# Half a TFLOP/s, 20 GB/s.
CEILING = Ceiling(device="cpu", threads=2, precision="fp32", tflop_per_s=0.5, gb_per_s=20.0)


def run_of(header: Header, folder: Path, *records: Record, ceilings: tuple[Ceiling, ...] = (CEILING,)) -> Run:
    file = RunFile.create(msgspec.structs.replace(header, ceilings=ceilings), folder)
    for record in records:
        file.append(record)
    return read(file.path)


def test_mfu_is_work_over_time_over_the_rate_that_this_run_measured(
    header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    run = run_of(header, tmp_path, make_record(Case(), p50_ms=100.0, gflop=10.0, gbyte=0.5))
    (found,) = derived(run)
    assert found["mfu"] == pytest.approx((10e9 / 0.1) / 0.5e12)
    assert found["bandwidth_share"] == pytest.approx((0.5e9 / 0.1) / 20e9)
    assert frame([run])["mfu"].tolist() == [found["mfu"]]


@pytest.mark.parametrize(
    "other",
    [{"threads": 1}, {"precision": "bf16"}, {"device": "gpu", "threads": 0}],
    ids=",".join,
)
def test_no_share_is_told_of_another_threads_precisions_or_devices_ceiling(
    header: Header, make_record: MakeRecord, tmp_path: Path, other: dict[str, object]
) -> None:
    ceiling = msgspec.structs.replace(CEILING, **other)
    run = run_of(header, tmp_path, make_record(Case(), p50_ms=100.0, gflop=10.0, gbyte=0.5), ceilings=(ceiling,))
    assert next(derived(run)) == {}


def test_autocast_is_held_against_the_dtype_that_it_casts_to(
    header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    bf16 = msgspec.structs.replace(CEILING, precision="bf16")
    run = run_of(header, tmp_path, make_record(Case(precision="amp_bf16"), p50_ms=1.0), ceilings=(CEILING, bf16))
    assert ceiling_of(run, run.records[0]) == bf16


def test_break_even_is_where_both_have_spent_the_same(header: Header, make_record: MakeRecord, tmp_path: Path) -> None:
    eager = make_record(Case(), p50_ms=10.0, first_call_ms=20.0, images_per_s=100.0)
    fast = make_record(Case(implementation="compile"), p50_ms=5.0, first_call_ms=5020.0, images_per_s=200.0)
    slow = make_record(Case(implementation="compile_freezing"), p50_ms=12.0, first_call_ms=5020.0, images_per_s=80.0)
    alone = make_record(Case(implementation="compile", batch=2), p50_ms=5.0, first_call_ms=5020.0, images_per_s=200.0)
    found = list(derived(run_of(header, tmp_path, eager, fast, slow, alone)))
    images = found[1]["break_even_images"]
    assert 20 + images * 10 == pytest.approx(5020 + images * 5)
    # Eager never breaks even with itself; who is slower never does; without eager nothing is said.
    assert all("break_even_images" not in other for other in (found[0], found[2], found[3]))
    assert found[1]["compile_cold_ms"] == 5015.0


def test_who_is_hardly_faster_breaks_even_late_and_who_is_no_faster_never_does(
    header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    eager = make_record(Case(), p50_ms=10.0, first_call_ms=20.0, images_per_s=100.0)
    same = make_record(Case(implementation="compile"), p50_ms=10.0, first_call_ms=5020.0, images_per_s=100.0)
    hardly = make_record(Case(implementation="compile_freezing"), p50_ms=9.5, first_call_ms=520.0, images_per_s=105.0)
    cheap = make_record(Case(implementation="folded"), p50_ms=9.0, first_call_ms=10.0, images_per_s=110.0)
    found = list(derived(run_of(header, tmp_path, eager, same, hardly, cheap)))
    assert "break_even_images" not in found[1]
    assert found[2]["break_even_images"] == pytest.approx(500 / (10 - 1000 / 105))
    assert found[3]["break_even_images"] == 0, "it never was behind"


@pytest.mark.parametrize("lacks", [{"images_per_s": 0.0}, {"images_per_s": None}, {"first_call_ms": None}], ids=str)
def test_without_a_figure_of_eagers_nobody_breaks_even(
    header: Header, make_record: MakeRecord, tmp_path: Path, lacks: dict[str, float | None]
) -> None:
    figures: dict[str, Any] = {"p50_ms": 10.0, "first_call_ms": 20.0, "images_per_s": 100.0}
    fast = make_record(Case(implementation="compile"), p50_ms=5.0, first_call_ms=5020.0, images_per_s=200.0)
    _, found = derived(run_of(header, tmp_path, make_record(Case(), **{**figures, **lacks}), fast))
    assert set(found) == {"compile_cold_ms"}


@pytest.mark.parametrize("median", [{}, {"p50_ms": 0.0}, {"p50_ms": None}], ids=str)
def test_nothing_follows_without_a_median(
    header: Header, make_record: MakeRecord, tmp_path: Path, median: dict[str, Any]
) -> None:
    run = run_of(header, tmp_path, make_record(Case(), gflop=1.0, gbyte=1.0, first_call_ms=9.0, **median))
    assert list(derived(run)) == [{}]


def test_a_gpus_ceiling_is_that_of_no_threads_and_a_process_has_its_share_of_the_cores() -> None:
    assert place_of(Case(devices="1gpu", precision="bf16"), 8) == ("gpu", 0, "bf16")
    assert place_of(Case(devices="2cpu", task="train"), 8) == ("cpu", 4, "fp32")
    assert place_of(Case(devices="2cpu", task="train"), 1) == ("cpu", 1, "fp32")
    assert place_of(Case(threads=3), 8) == ("cpu", 3, "fp32")


def test_what_failed_has_no_derived_figures_and_is_no_baseline(
    header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    failed = make_record(Case(), "oom", "out of memory", p50_ms=1.0, gflop=1.0, first_call_ms=1.0, images_per_s=1.0)
    fast = make_record(Case(implementation="compile"), p50_ms=5.0, first_call_ms=9.0, images_per_s=200.0)
    found = list(derived(run_of(header, tmp_path, failed, fast)))
    assert found[0] == {}
    assert "break_even_images" not in found[1]


def test_a_stage_is_held_against_the_ceiling_that_it_meets_first() -> None:
    # The ridge is at 25 FLOP a byte: 0.5 TFLOP/s over 20 GB/s.
    lean = Stage(name="outc", ms=10.0, gflop=0.1, gbyte=0.1)
    dense = Stage(name="down4", ms=10.0, gflop=4.0, gbyte=0.01)
    places = {
        place.stage.name: place for place in roofline([lean, dense, Stage(name="x", ms=1, gflop=0, gbyte=0)], CEILING)
    }
    assert (places["outc"].bound, places["down4"].bound) == ("bandwidth", "arithmetic")
    assert places["outc"].share == pytest.approx((0.1 / 0.01) / 20)
    assert places["down4"].share == pytest.approx((4.0 / 0.01) / 500)
    assert set(places) == {"outc", "down4"}


def test_stages_are_shown_with_their_share_of_the_ceiling_only_where_that_was_measured(
    header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    stages = (Stage(name="inc", ms=30.0, gflop=4.0, gbyte=0.01), Stage(name="outc", ms=10.0, gflop=0.1, gbyte=0.1))
    record = msgspec.structs.replace(make_record(Case(), p50_ms=40.0), stages=stages)
    shown = [list(stage_rows(run, run.records[0])) for run in _with_and_without(header, tmp_path, record)]
    assert shown[0][0] == ("inc", "30.0", "75.0%", "4.00", "0.0100", "400", "arithmetic", "27%")
    assert shown[0][1][-2:] == ("bandwidth", "50%")
    assert all(row[-2:] == ("–", "–") for row in shown[1])
    out = io.StringIO()
    show(run_of(header, tmp_path, record), Console(file=out, width=120))
    assert f"stages of {Case().id}" in out.getvalue()


def _with_and_without(header: Header, folder: Path, record: Record) -> tuple[Run, Run]:
    return run_of(header, folder, record), run_of(header, folder, record, ceilings=())
