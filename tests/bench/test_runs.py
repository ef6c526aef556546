"""Runs as a person starts them: their order, their plan, their options, two of them at once."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from bench import display
from bench.case import Case, product
from bench.estimate import prior_s
from bench.machine import machine, usable_gpus
from bench.matrix import PRESETS, shuffled
from bench.options import Options
from bench.report.table import tables
from bench.results import Header, Record, Settings, read
from bench.runfile import RunFile
from bench.session import Session
from bench.support import unsupported

from .conftest import ROOT, TINY, Bench


def tiny(implementation: str = "eager", **axes: object) -> Case:
    return Case(implementation=implementation, **{**TINY, **axes})  # type: ignore[arg-type]


def test_the_order_of_a_preset_is_drawn_from_a_seed() -> None:
    cases = [Case(batch=batch) for batch in range(1, 30)]
    assert set(shuffled(cases, 1)) == set(cases)
    assert shuffled(cases, 1) == shuffled(cases, 1) != shuffled(cases, 2)
    # Interleaved, not sorted: what drifts while a run goes on meets all alike.
    assert list(shuffled(cases, 1)) != cases


def test_cases_that_were_named_keep_their_order_and_have_no_seed() -> None:
    chosen = tuple(tiny(batch=batch) for batch in (3, 1, 2))
    assert Session(Options(chosen=chosen, seed=7)).cases == chosen


def test_the_seed_is_in_the_header_and_gives_the_order_again(tmp_path: Path) -> None:
    run = Session(Options(preset="quick", seed=11, results=tmp_path))
    run.open(run.cases, Console(quiet=True))
    header = run.close().header  # type: ignore[union-attr]  # it was opened
    assert header.seed == 11
    assert Session(Options(preset="quick", seed=header.seed)).cases == run.cases
    assert Session(Options(preset="quick", seed=12)).cases != run.cases


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_table_is_the_same_in_whatever_order_the_cases_ran(header: Header, tmp_path: Path, seed: int) -> None:
    cases = product(
        task=("infer", "train"),
        upsampling=("bilinear", "transposed"),
        precision=("amp_bf16", "fp32"),
        implementation=("triton", "compile", "eager"),
        batch=(1, 16),
    )
    moment = datetime(2026, 11, 23, tzinfo=UTC)

    def shown(order: tuple[Case, ...]) -> object:
        file = RunFile.create(header, tmp_path)
        for case in order:
            figures = {"p50_ms": float(len(case.id)), "images_per_s": 1.0}
            file.append(Record(case=case, status="ok", figures=figures, started=moment))
        return list(tables(read(file.path)))

    assert shown(shuffled(cases, seed)) == shown(cases)


def test_a_dry_run_tells_cases_and_minutes_and_measures_nothing(bench: Bench) -> None:
    told = bench.measure(options=("--preset", "quick", "--dry-run", "-p", "no:cacheprovider"))
    assert told.returncode == 0, told.stdout
    here = machine()
    possible = sum(unsupported(case, here) is None for case in PRESETS["quick"](here))
    assert f"26 cases, {possible} to measure: about " in told.stdout
    assert "unsupported: no CUDA device" in told.stdout
    assert " min" in told.stdout
    assert not bench.results.exists()


@pytest.mark.slow
def test_a_dry_run_knows_what_a_resumed_run_has_already(bench: Bench) -> None:
    axes = ("--axis", "task=infer")
    bench.measure(tiny(), options=axes)
    told = bench.measure(tiny(), tiny(layout="nhwc"), options=(*axes, "--dry-run", "--resume"))
    (line,) = [line for line in told.stdout.splitlines() if line.startswith(f"{tiny().id} ")]
    assert line.rstrip().endswith("  measured before")
    assert "2 cases, 1 to measure" in told.stdout
    nothing = bench.measure(tiny(), options=(*axes, "--dry-run", "--resume"))
    assert "1 case, 0 to measure\n" in nothing.stdout


def test_quick_fits_into_a_quarter_of_an_hour_by_its_own_estimate() -> None:
    here = machine()
    if here.gpus:
        pytest.skip("a CPU's promise")
    assert sum(prior_s(case, Settings(), here) for case in PRESETS["quick"](here)) <= 15 * 60


@pytest.mark.slow
def test_ceilings_are_in_the_header_and_shares_in_the_csv(bench: Bench) -> None:
    told = bench.measure(tiny(precision="amp_bf16"), tiny(), options=("--ceilings",))
    assert told.returncode == 0, told.stdout
    (run,) = bench.runs()
    assert {(one.device, one.threads, one.precision) for one in run.header.ceilings} == {
        ("cpu", 1, "bf16"),
        ("cpu", 1, "fp32"),
    }
    assert all(one.tflop_per_s > 0.001 and one.gb_per_s > 0.5 for one in run.header.ceilings)
    table = bench.read("report", "--csv", "-", str(run.path)).stdout.splitlines()
    assert {"mfu", "bandwidth_share"} <= set(table[0].split(","))


@pytest.mark.slow
def test_a_cold_start_is_measured_again_with_full_caches_and_for_a_second_size(bench: Bench) -> None:
    told = bench.measure(tiny(), tiny("compile"), options=("--cold-start",))
    assert told.returncode == 0, told.stdout
    found = bench.records()
    eager, compiled = found["eager"].figures, found["compile"].figures
    assert eager["first_call_warm_ms"] > 0
    assert eager["second_size_ms"] > 0
    assert compiled["first_call_warm_ms"] < compiled["first_call_ms"] / 2
    assert (compiled["graphs"], compiled["graph_breaks"], compiled["recompiles"]) == (1, 0, 1)
    assert found["eager"].repeat.endswith("--cold-start --load tests.bench.faulty")


@pytest.mark.slow
def test_every_implementation_that_runs_here_is_accurate(bench: Bench) -> None:
    cases = [
        tiny(name) for name in ("compile_freezing", "compile_max_autotune", "compile_reduce_overhead", "eager_graph")
    ]
    bench.measure(*cases, tiny("compile_freezing", task="train"), options=("--time-limit-s", "300"))
    found = {(record.case.implementation, record.case.task): record for run in bench.runs() for record in run.records}
    assert found["compile_freezing", "infer"].status == "ok", found["compile_freezing", "infer"].reason
    assert found["compile_max_autotune", "infer"].status == "ok", found["compile_max_autotune", "infer"].reason
    assert found["compile_freezing", "train"].reason == "for inference alone: training changes the weights"
    for graphs in ("compile_reduce_overhead", "eager_graph"):
        assert found[graphs, "infer"].reason == "CUDA graphs are for CUDA devices: no CUDA device"


@pytest.mark.slow
def test_a_case_that_takes_long_says_what_it_is_doing_where_there_is_no_bar(
    fitted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    monkeypatch.setattr(display, "SILENCE_S", 0.1)
    run = Session(Options(chosen=(tiny(),), settings=Settings(measure_s=0.2, warmup_s=0.1), results=tmp_path))
    told = Console(file=io.StringIO(), width=200)
    run.open(run.cases, told)
    assert run.measure(tiny(), told).status == "ok"
    run.close()
    assert f"{tiny().id} · import " in told.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_one_device_and_two_are_compared_on_a_cpu_by_nothing_but_the_axis(bench: Bench) -> None:
    here = machine()
    if usable_gpus(here) or here.cores == 1:
        pytest.skip("a CPU's promise, of one with two cores")
    sizes = [word for name in TINY for word in ("--axis", f"{name}={TINY[name]}")]
    told = bench.measure(options=("--preset", "smoke", "-k", "train", "--axis", "devices=1,2", *sizes))
    assert told.returncode == 0, told.stdout
    (run,) = bench.runs()
    one, two = sorted(run.records, key=lambda record: record.case.device_count)
    assert (one.case.devices, two.case.devices) == ("1cpu", "2cpu")
    assert two.case.shared_by == "ddp"
    assert (one.status, two.status) == ("ok", "ok")
    parts = ("scaling_efficiency", "lost_to_compute", "lost_to_imbalance", "lost_to_allreduce")
    assert sum(float(two.figures[part] or 0) for part in parts) == pytest.approx(1)
    assert two.case.id in bench.read("scaling", str(run.path)).stdout


@pytest.mark.slow
def test_two_runs_into_one_folder_at_once_are_two_whole_files(bench: Bench) -> None:
    with bench.started(tiny()) as one, bench.started(tiny()) as other:
        for process in (one, other):
            told, _ = process.communicate(timeout=120)
            assert process.returncode == 0, told
    runs = bench.runs()
    assert len({run.path for run in runs}) == 2
    assert all(len(run.records) == 1 and not run.damaged for run in runs)


def test_a_run_that_is_being_written_is_not_continued_by_another_process(header: Header, tmp_path: Path) -> None:
    file = RunFile.create(header, tmp_path)
    file.hold()
    code = """
import pathlib, sys
from bench.results import ResultsError, read
from bench.runfile import RunFile
path = pathlib.Path(sys.argv[1])
try:
    RunFile(path, read(path).header).hold()
except ResultsError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(file.path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "another process is measuring into it; wait for its end, or leave out --resume" in told
    file.release()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.slow
def test_a_clock_set_back_spoils_nothing_and_an_outcome_written_by_half_is_a_crash(bench: Bench) -> None:
    bench.measure(tiny("writes_half"), tiny("sets_clock_back"))
    found = bench.records()
    half, back = found["writes_half"], found["sets_clock_back"]
    assert half.status == "crash"
    assert "what the process left cannot be read" in half.reason
    assert back.status == "ok", back.reason
    assert min(back.samples_ms) > 0
    assert back.wall_s > 0
    assert all(seconds >= 0 for seconds in back.spent_s.values())


def test_under_xdist_a_run_is_refused_before_anything_is_measured(bench: Bench) -> None:
    pytest.importorskip("xdist")
    told = bench.measure(tiny(), options=("-n", "2"))
    assert told.returncode == 4
    assert (
        "cases are measured one at a time, or they would disturb each other: leave out -n" in told.stdout + told.stderr
    )
    assert not bench.runs()


def test_tracking_services_get_names_units_values_and_ranges_and_no_zero_for_what_failed(
    bench: Bench, header: Header, make_record: Callable[..., Record], tmp_path: Path
) -> None:
    file = RunFile.create(header, tmp_path)
    file.append(make_record(tiny(), p50_ms=10.0, p50_low_ms=9.5, p50_high_ms=10.1, peak_memory_mib=400.0))
    file.append(make_record(tiny("compile"), "oom", "out of memory", p50_ms=0.0))
    assert json.loads(bench.read("report", "--tracking", "-", str(file.path)).stdout) == [
        {"name": f"{tiny().id} p50_ms", "unit": "ms", "value": 10.0, "range": "± 0.3"},
        {"name": f"{tiny().id} peak_memory_mib", "unit": "MiB", "value": 400.0, "range": ""},
    ]
    assert bench.read("report", "--tracking", "-", "--csv", "-", str(file.path)).returncode == 2
