"""`pytest bench` as a person runs it: every fault happens for real, in child processes."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.case import Case
from bench.engine.metric import metrics
from bench.results import Run

from .conftest import ROOT, TINY, Bench


def tiny(implementation: str = "eager", **axes: object) -> Case:
    return Case(implementation=implementation, **{**TINY, **axes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, fitted_cache: Path) -> tuple[Run, str, Path]:
    """A run of three cases, what it printed, and what pytest-benchmark stored."""
    bench = Bench(tmp_path_factory.mktemp("measured"), fitted_cache)
    file = bench.results.parent / "benchmark.json"
    told = bench.measure(tiny(), tiny(task="train"), tiny("triton"), options=(f"--benchmark-json={file}",))
    assert told.returncode == 0, told.stdout + told.stderr
    (run,) = bench.runs()
    return run, told.stdout, file


def test_a_run_records_every_case_and_says_where(measured: tuple[Run, str, Path]) -> None:
    run, told, _ = measured
    assert [record.status for record in run.records] == ["ok", "ok", "unsupported"]
    assert f"saved: {run.path}" in told
    assert "2 passed, 1 skipped in" in told
    for record in run.records[:2]:
        figures = record.figures
        assert figures["samples"] == len(record.samples_ms) >= 6
        assert figures["images_per_s"] == pytest.approx(1000 * len(record.samples_ms) / sum(record.samples_ms))
        assert min(figures["p50_ms"], figures["first_call_ms"]) > 0
        assert figures["peak_memory_kind"] == "resident"
        assert 100 < figures["peak_memory_mib"] < 4000
        assert figures["rel_l2"] == 0
        assert figures["gflop"] > 0
        assert record.repeat.startswith(f"python -m pytest bench --case {record.case.id} --measure-s 0.2")
    infer, train = (record.figures for record in run.records[:2])
    # Backward costs two convolutions for each of forward; the first layer needs no gradient of the image.
    assert 2.5 < train["gflop"] / infer["gflop"] < 3


def test_what_pytest_benchmark_stores_is_what_was_measured_bit_for_bit(measured: tuple[Run, str, Path]) -> None:
    run, _, file = measured
    stored, ours = (json.loads(path.read_text())["benchmarks"] for path in (file, run.path.with_suffix(".json")))
    for number, record in enumerate(run.records[:2]):
        data = [sample / 1000 for sample in record.samples_ms]
        assert stored[number]["stats"]["data"] == ours[number]["stats"]["data"] == data


def test_every_figure_of_a_record_is_explained_in_the_schema(measured: tuple[Run, str, Path]) -> None:
    from bench.engine.measure import COLUMNS

    explained = set(COLUMNS).union(*(metric.columns for metric in metrics()))
    schema = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    for record in measured[0].records:
        for name in record.figures:
            base = name.replace("_low_ms", "_ms").replace("_high_ms", "_ms")
            assert base in explained, name
            assert f"`{base}`" in schema, name


def test_a_killed_worker_is_a_crash_and_the_others_are_measured(bench: Bench) -> None:
    told = bench.measure(tiny("killed"), tiny())
    assert told.returncode == 1
    found = bench.records()
    assert found["killed"].status == "crash"
    assert "killed by SIGKILL" in found["killed"].reason
    assert found["killed"].figures == {}
    assert found["eager"].status == "ok"
    assert bench.runs()[0].damaged == 0
    assert "1 failed, 1 passed in" in told.stdout


def test_out_of_memory_is_oom_and_nothing_else_is(bench: Bench) -> None:
    bench.measure(tiny("greedy"), tiny("breaks"))
    found = bench.records()
    assert found["greedy"].status == "oom"
    # "out of" and "memory" stand in its message too: only the allocator's own errors count.
    assert found["breaks"].status == "crash"
    assert "illegal memory access" in found["breaks"].reason
    assert "faulty.py" in found["breaks"].reason


@pytest.mark.slow
def test_a_case_that_fills_the_memory_is_oom_before_the_machine_suffers(bench: Bench) -> None:
    bench.measure(tiny("fills"))
    assert bench.records()["fills"].status == "oom"


def test_a_batch_that_can_never_fit_is_oom(bench: Bench) -> None:
    bench.measure(tiny(batch=900_000, size="4096x4096"))
    assert bench.records()["eager"].status == "oom"


@pytest.mark.slow
def test_a_hang_is_a_timeout_within_its_limit_and_leaves_no_process(bench: Bench, tmp_path: Path) -> None:
    bench.variables["HELPER_PID"] = str(tmp_path / "helper.pid")
    bench.measure(tiny("hangs"), options=("--time-limit-s", "15"))
    record = bench.records()["hangs"]
    assert record.status == "timeout"
    assert "longer than 15 s, in phase: latency" in record.reason
    assert record.wall_s < 15 + 10
    helper = int((tmp_path / "helper.pid").read_text())
    assert not psutil.pid_exists(helper) or psutil.Process(helper).status() == psutil.STATUS_ZOMBIE


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_garbage_on_standard_output_disturbs_nothing(bench: Bench) -> None:
    bench.measure(tiny("chatty"))
    assert bench.records()["chatty"].status == "ok"


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (tiny("wrong"), "relative L2"),
        *(
            pytest.param(case, why, marks=pytest.mark.slow)
            for case, why in (
                (tiny("unwritten"), "relative L2 nan"),
                (tiny("remembers"), "relative L2"),
                (tiny("writes_input"), "the implementation wrote into its inputs"),
                (tiny("wrong_gradient", task="train"), "relative L2"),
                (
                    tiny("forgets_statistics", task="train"),
                    "BatchNorm's running statistics are 1 of a step's change off",
                ),
            )
        ),
    ],
    ids=lambda part: part.implementation if isinstance(part, Case) else None,
)
def test_a_wrong_result_is_inaccurate_however_fast(bench: Bench, case: Case, why: str) -> None:
    told = bench.measure(case)
    record = bench.records()[case.implementation]
    assert (told.returncode, record.status) == (1, "inaccurate")
    assert record.reason.startswith(why)


@pytest.mark.slow
def test_a_run_that_was_interrupted_keeps_its_records_and_goes_on(bench: Bench) -> None:
    cases = (tiny(), tiny("sleeps"), tiny(layout="nhwc"))
    options = ("--axis", "task=infer")
    with bench.started(*cases, options=options) as process:
        _wait_until(lambda: bench.results.exists() and any(len(run.records) for run in bench.runs()))
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 2, told
    kept = bench.runs()[0].records
    assert 1 <= len(kept) < 3
    assert "saved: " in told, "the table of what was measured is printed all the same"

    told_again = bench.measure(*cases, options=(*options, "--resume"))
    (run,) = bench.runs()
    assert {record.case for record in run.records} == set(cases)
    assert run.records[0] == kept[0], "what was measured is kept"
    assert "measured before" in told_again.stdout


def _wait_until(condition: "object") -> None:
    end = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def _worker_in_phase(process: subprocess.Popen[str], phase: str) -> psutil.Process:
    """The process of the case in hand, once it is in `phase`."""
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = [child for child in psutil.Process(process.pid).children() if "bench.engine" in _command(child)]
        at = Path(_command(found[0])[-1]) / "phase.0" if found and _command(found[0]) else None
        return at is not None and at.exists() and at.read_text() == phase

    _wait_until(there)
    return found[0]


def test_a_parent_that_is_killed_takes_its_worker_along(bench: Bench) -> None:
    with bench.started(tiny("hangs")) as process:
        worker = _worker_in_phase(process, "latency")
        process.kill()
        _wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_the_parent_idles_while_a_child_measures(bench: Bench) -> None:
    with bench.started(tiny("hangs")) as process:
        _worker_in_phase(process, "latency")
        parent = psutil.Process(process.pid)
        before, start = parent.cpu_times(), time.monotonic()
        time.sleep(10)
        after, spent = parent.cpu_times(), time.monotonic() - start
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    used = after.user + after.system - before.user - before.system
    assert used / spent < 0.05


@pytest.mark.slow
def test_a_case_costs_little_beyond_its_own_measuring(bench: Bench) -> None:
    overheads, imports = [], []
    libraries = "import torch, torch.distributed, scipy.stats, skimage"
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", libraries], check=True)
        imports.append(time.perf_counter() - start)
        bench.measure(tiny("sleeps"))
        record = bench.runs()[-1].records[0]
        own = sum(seconds for phase, seconds in record.spent_s.items() if phase not in {"import", "load"})
        overheads.append(record.wall_s - own)
    # The best of three: the machine is shared. Where even importing the libraries takes seconds, twice that.
    assert min(overheads) < max(6, 2 * min(imports))


@pytest.mark.slow
def test_two_processes_train_as_one_case(bench: Bench) -> None:
    if psutil.cpu_count() == 1:
        pytest.skip("one core")
    case = tiny(task="train", devices="2cpu")
    told = bench.measure(case)
    record = bench.records()["eager"]
    assert record.status == "ok", told.stdout
    # Images of both processes count; each step is as long as its slowest rank's.
    assert record.figures["images_per_s"] == pytest.approx(2000 * len(record.samples_ms) / sum(record.samples_ms))
    assert record.figures["cpu_threads"] == 1


@pytest.mark.slow
def test_compile_is_measured_with_its_first_call_apart(bench: Bench) -> None:
    bench.measure(tiny("compile"), options=("--time-limit-s", "300"))
    record = bench.records()["compile"]
    assert record.status == "ok", record.reason
    assert record.figures["first_call_ms"] > 20 * record.figures["p50_ms"]
    assert 0 < record.figures["rel_l2"] < 1e-4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--axis", "batch=none"), "batch='none' is not possible; allowed: a whole number from 1"),
        (("--axis", "colour=red"), "unknown axis 'colour'"),
        (("--preset", "quik"), "unknown preset 'quik'; allowed: smoke, quick, full, ci, h200"),
        (("--case", "infer-magic"), "is not possible; allowed: eager, eager_graph, compile"),
        (("--measure-s", "soon"), "--measure-s soon: expected a number of seconds above 0"),
        (("--time-limit-s", "-1"), "--time-limit-s -1: expected a number of seconds above 0"),
        (("--dry-run", "--weights", ""), "cannot read the weights (Is a directory)"),
        (("--load", "no.such.module"), "cannot load 'no.such.module': ModuleNotFoundError: No module named 'no'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else None,
)
def test_a_wrong_option_is_one_line_before_anything_runs(bench: Bench, options: tuple[str, ...], expected: str) -> None:
    told = bench.measure(options=options)
    lines = [line for line in (told.stdout + told.stderr).splitlines() if "ERROR" in line]
    assert told.returncode == 4
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in told.stdout + told.stderr
    assert not bench.runs()


@pytest.mark.slow
def test_gradients_that_overflow_fp16_are_taken_at_a_smaller_scale(bench: Bench) -> None:
    bench.measure(tiny("overflows", task="train", precision="amp_fp16"))
    record = bench.records()["overflows"]
    assert record.status == "ok", record.reason
    assert math.isfinite(record.figures["rel_l2"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def broken(:", "SyntaxError"),
        ("import nothing_like_it", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
    ids=["syntax", "import", "exit"],
)
def test_a_module_that_cannot_be_loaded_is_one_line(bench: Bench, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    bench.variables["PYTHONPATH"] = str(tmp_path)
    for answer in (bench.measure(options=("--load", "mine")), bench.read("list", "--load", "mine")):
        assert answer.returncode in {2, 4}
        assert f"cannot load 'mine': {told}" in answer.stdout + answer.stderr
        assert "Traceback" not in answer.stdout + answer.stderr


@pytest.mark.slow
def test_results_of_a_loaded_module_that_changed_are_not_continued(bench: Bench, tmp_path: Path) -> None:
    bench.variables["PYTHONPATH"] = str(tmp_path)
    module = tmp_path / "mine.py"
    module.write_text("# as it was\n")
    bench.measure(tiny(), options=("--load", "mine"))
    module.write_text("# and as it is\n")
    told = bench.measure(tiny(), options=("--load", "mine", "--resume"))
    assert "nothing to continue" in told.stdout
    assert len(bench.runs()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_orderly_end_prints_what_was_measured_and_leaves_no_worker(bench: Bench, number: signal.Signals) -> None:
    with bench.started(tiny(), tiny("hangs")) as process:
        _wait_until(lambda: bench.results.exists() and any(len(run.records) for run in bench.runs()))
        worker = _worker_in_phase(process, "latency")
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)
    assert "saved: " in told
    assert "--resume goes on from here" in told
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_benchmark_only_measures_cases(bench: Bench) -> None:
    told = bench.measure(tiny(), options=("--benchmark-only",))
    assert told.returncode == 0, told.stdout
    assert bench.records()["eager"].status == "ok"


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii_is_no_reason_to_fail(bench: Bench) -> None:
    bench.variables["PYTHONIOENCODING"] = "ascii"
    told = bench.measure(tiny())
    assert told.returncode == 0, told.stdout + told.stderr
    assert bench.read("report", str(bench.runs()[0].path)).returncode == 0


@pytest.mark.slow
def test_selecting_by_name_measures_those_alone(bench: Bench) -> None:
    bench.measure(options=("--preset", "smoke", "--axis", "width=4", "--axis", "depth=2", "-k", "infer"))
    ((record,),) = (run.records for run in bench.runs())
    assert record.case.task == "infer"


def test_collecting_alone_leaves_no_file(bench: Bench) -> None:
    told = bench.measure(options=("--collect-only", "-q"))
    assert told.returncode == 0
    assert not bench.runs()


def test_plugins_that_are_not_loaded_by_themselves_are_no_reason_to_fail(bench: Bench) -> None:
    bench.variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    told = bench.measure(tiny(), options=("--dry-run",))
    assert told.returncode == 0, told.stdout + told.stderr
    assert "1 case, 1 to measure" in told.stdout


def test_a_selection_that_pytest_refuses_leaves_no_file(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "test_broken.py"
    broken.write_text("raise RuntimeError\n")
    for refused, status in (("-k", "train and"), pytest.ExitCode.USAGE_ERROR), ((str(broken),), 2):
        told = bench.measure(tiny(), options=refused)
        assert told.returncode == status, told.stdout
        assert not bench.runs()


@pytest.mark.slow
def test_benchmark_disable_still_measures_and_records(bench: Bench) -> None:
    told = bench.measure(tiny(), options=("--benchmark-disable",))
    assert told.returncode == 0, told.stdout
    assert bench.records()["eager"].status == "ok"
