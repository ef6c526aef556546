import json
import resource
import shlex
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from bench.results import Header
from bench.runfile import RunFile
from bench.weights import digest
from unet import UNet
from unet.checkpoint import save_weights

from .conftest import ROOT, Bench
from .evidence import case, record


@pytest.fixture
def saved(header: Header, tmp_path: Path) -> Path:
    file = RunFile.create(header, tmp_path)
    file.append(record(case(), p50=20.0, p90_ms=22.0))
    file.append(record(case("compile"), p50=10.0, p90_ms=11.0, first_call_ms=20_000.0, peak_memory_mib=900.0))
    file.append(record(case("triton"), "unsupported"))
    return file.path


def test_recommend_answers_within_a_second_and_without_torch(bench: Bench, saved: Path) -> None:
    code = (
        "import sys, bench.cli\n"
        "try: bench.cli.main()\n"
        "finally: print('torch' in sys.modules, 'scipy' in sys.modules, file=sys.stderr)"
    )
    for arguments in (["recommend", "--help"], ["recommend", str(saved)]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = bench.call(sys.executable, "-c", code, *arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert told.stderr.splitlines()[-1] == "False False", told.stderr
        assert told.stdout
        # Time of the processor: the machine is shared.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_recommend_prints_winner_front_losers_and_what_may_win(bench: Bench, saved: Path) -> None:
    told = bench.read("recommend", str(saved), "--max-latency-ms", "15", "--percentile", "90")
    assert told.returncode == 0, told.stderr
    assert f"recommended: {case('compile').id}" in told.stdout
    assert f"{case().id}: latency 22.0 ms, limit 15.0 ms, 1.47 times as much" in told.stdout
    assert "triton: unsupported: for a reason" in told.stdout
    assert f"python -m pytest bench --case {case('compile', layout='nhwc').id}" in told.stdout


def test_what_is_missing_is_not_measured_here_for_another_machine(bench: Bench, header: Header, tmp_path: Path) -> None:
    machine = msgspec.structs.replace(header.environment.machine, cpu="Intel Xeon of somebody else")
    environment = msgspec.structs.replace(header.environment, machine=machine)
    file = RunFile.create(msgspec.structs.replace(header, environment=environment), tmp_path)
    file.append(record(case()))
    told = bench.read("recommend", str(file.path), "--measure")
    assert (told.returncode, told.stdout) == (2, "")
    assert "--measure adds to its own" in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_a_number_of_devices_may_leave_their_kind_to_the_machine(bench: Bench, saved: Path) -> None:
    whole, plain = (bench.read("recommend", str(saved), "--axis", f"devices={one}") for one in ("1cpu", "1"))
    assert (plain.returncode, plain.stdout) == (0, whole.stdout), plain.stderr


def test_where_nothing_can_be_measured_no_run_is_begun(bench: Bench) -> None:
    bench.variables["CUDA_VISIBLE_DEVICES"] = ""
    told = bench.read("recommend", "--measure", "--axis", "devices=4000", "--results", str(bench.results))
    assert (told.returncode, told.stdout) == (2, "")
    assert "and this machine supports none" in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert bench.runs() == []


def test_recommend_as_json_is_an_object_a_question(bench: Bench, saved: Path) -> None:
    (line,) = bench.read("recommend", str(saved), "--json").stdout.splitlines()
    found = json.loads(line)
    assert found["decision"]["winner"]["id"] == case("compile").id
    assert found["decision"]["winner"]["figures"]["memory"] == {"value": 900.0, "low": 900.0, "high": 900.0}
    assert found["decision"]["break_even"]["against"] == case().id
    assert found["question"]["machine"] == "amd-epyc-2cpu"


def test_recommend_has_a_status_of_its_own_where_nothing_fits(bench: Bench, saved: Path) -> None:
    told = bench.read("recommend", str(saved), "--max-memory-mib", "600")
    assert told.returncode == 3
    assert "relax --max-memory-mib from 600 to 700" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--objective", "beauty"], "--objective beauty: allowed: throughput, latency, memory, energy"),
        (["--percentile", "95"], "--percentile 95: allowed: 10, 50, 90, 99"),
        (["--max-latency-ms", "-1"], "--max-latency-ms -1: expected a number above 0"),
        (["--min-agreement", "99.9"], "--min-agreement 99.9: expected a share, 1 at most"),
        (["--measure", "--measure-s", "nan"], "--measure-s nan: expected a number of seconds above 0"),
        (["--axis", "batch=64"], "no record of batch=64, task=infer in"),
        (["--size", "0x0"], "size='0x0' is not possible"),
        (["--weights", "missing.pt"], "missing.pt: cannot read the weights (No such file or directory)"),
        (["--measure", "--json", "--load", "none"], "cannot load 'none'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_a_wrong_wish_is_answered_in_one_line_and_status_2(
    bench: Bench, saved: Path, arguments: list[str], expected: str
) -> None:
    told = bench.read("recommend", str(saved), *arguments)
    assert (told.returncode, told.stdout) == (2, "")
    assert len(told.stderr.splitlines()) == 1, told.stderr
    assert expected in told.stderr


@pytest.mark.slow
def test_what_is_missing_is_measured_first_with_ones_own_weights(bench: Bench, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "mine.pt"
    save_weights(UNet(3, 2, bilinear=True, width=4, depth=2), path)
    options = ["--weights", str(path), "--size", "32x32", "--results", str(bench.results)]
    narrow = ["--axis", "threads=1", "--axis", "implementation=eager,folded", "--axis", "precision=fp32"]
    told = bench.read("recommend", *options, *narrow, "--measure", "--measure-s", "0.2")
    assert told.returncode == 0, told.stderr
    (run,) = bench.runs()
    assert {(one.case.implementation, one.case.layout, one.case.upsampling) for one in run.records} == {
        (name, layout, "bilinear") for name in ("eager", "folded") for layout in ("nchw", "nhwc")
    }
    assert f"weights {digest(path)[:12]}" in told.stdout
    # Nothing is missing now but what throughput may gain by: a larger batch, a further device.
    again = bench.read("recommend", *options, *narrow, "--objective", "latency", "--measure")
    assert again.returncode == 0, again.stderr
    assert len(bench.runs()) == 1
    # The same records say nothing about other weights.
    save_weights(UNet(3, 2, bilinear=True, width=4, depth=2), path)
    other = bench.read("recommend", *options)
    assert other.returncode == 2
    assert "with these weights" in other.stderr


def test_the_walk_in_the_readme_decides_as_its_run_says(bench: Bench) -> None:
    """What was not measured depends on what the reader has installed; everything before it on the run's file alone."""
    text = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    block = text.partition("$ python -m bench recommend results/")[2].partition("```")[0]
    command, _, shown = f"recommend results/{block}".partition("\n")
    bench.variables["COLUMNS"] = "300"
    told = bench.read(*shlex.split(command.replace("\\\n", " ")))
    assert told.returncode == 0, told.stderr
    decided = told.stdout.partition("not measured, so it might win")[0]
    assert [line.rstrip() for line in decided.splitlines()] == [
        line.rstrip() for line in shown.partition("not measured, so it might win")[0].splitlines()
    ]
