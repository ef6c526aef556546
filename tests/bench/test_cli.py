import csv
import io
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.builders import model
from bench.case import AXES, Case
from bench.results import Header, Record
from bench.runfile import RunFile

from .conftest import ROOT, Bench

MakeRecord = Callable[..., Record]


@pytest.fixture
def saved(header: Header, make_record: MakeRecord, tmp_path: Path) -> Path:
    file = RunFile.create(header, tmp_path)
    file.append(make_record(Case(), p50_ms=10.0, images_per_s=100.0))
    file.append(make_record(Case(implementation="triton"), "unsupported", "no CUDA device"))
    return file.path


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["list"], ["list", "--help"], ["report", "--help"], ["report", "RUN"]),
        *(["gate", "--help"], ["calibrate", "--help"], ["history", "--help"], ["scaling", "--help"]),
    ],
    ids=" ".join,
)
def test_readers_answer_within_a_second_and_without_torch(bench: Bench, saved: Path, arguments: list[str]) -> None:
    arguments = [str(saved) if word == "RUN" else word for word in arguments]
    code = (
        "import sys, bench.cli\n"
        "sys.argv[1:] = sys.argv[1:]\n"
        "try: bench.cli.main()\n"
        "finally: print('torch' in sys.modules, 'scipy' in sys.modules, file=sys.stderr)"
    )
    spent = []
    for _ in range(3):
        start = children_s()
        told = bench.call(sys.executable, "-c", code, *arguments)
        spent.append(children_s() - start)
        assert told.stderr.splitlines()[-1] == "False False", told.stderr
        assert told.stdout
    # The processor's seconds, the best of three: the machine is shared.
    assert min(spent) < 1


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_list_prints_the_cases_and_why_some_are_not_possible(bench: Bench) -> None:
    bench.variables["CUDA_VISIBLE_DEVICES"] = ""
    told = bench.read("list")
    assert told.returncode == 0
    lines = told.stdout.splitlines()
    assert len(lines) == 1 + 26
    assert sum(line.rstrip().endswith("unsupported: no CUDA device") for line in lines) == 8


def test_list_as_json_has_an_object_a_case(bench: Bench) -> None:
    told = bench.read("list", "--json", "--preset", "smoke", "--axis", "batch=1,2")
    rows = [json.loads(line) for line in told.stdout.splitlines()]
    assert [row["batch"] for row in rows] == [1, 2, 1, 2]
    assert set(rows[0]) == {"id", "unsupported", *AXES}


def test_list_explains_every_axis(bench: Bench) -> None:
    lines = bench.read("list", "--axes").stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [*AXES]


def test_tuning_needs_a_gpu_and_says_so(bench: Bench) -> None:
    bench.variables["CUDA_VISIBLE_DEVICES"] = ""
    told = bench.read("tune")
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("bench: unsupported: no CUDA device")


def test_list_says_which_cases_lack_a_compiler(bench: Bench) -> None:
    bench.variables["CXX"] = "no-such-compiler"
    lines = bench.read("list", "--axis", "implementation=compile").stdout.splitlines()[1:]
    assert lines
    assert all("unsupported: no C++ compiler" in line for line in lines)


def test_list_knows_implementations_of_a_loaded_module(bench: Bench) -> None:
    told = bench.read("list", "--load", "tests.bench.faulty", "--axis", "implementation=sleeps", "--preset", "smoke")
    assert "infer-sleeps-" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "--preset", "quik"], "unknown preset 'quik'; allowed: smoke, quick, full, ci"),
        (["list", "--axis", "batch=0"], "batch='0' is not possible; allowed: a whole number from 1"),
        (["list", "--axis", "colour=red"], "unknown axis 'colour'; the axes are"),
        (["list", "--load", "no.such.module"], "No module named 'no'"),
        (["list", "--frobnicate"], "No such option: --frobnicate"),
        (["lits"], "No such command 'lits'"),
        (["report", "missing.jsonl"], "missing.jsonl: cannot read results (No such file or directory)"),
        (["report", "pyproject.toml"], "pyproject.toml: not a run file"),
        (["report", "results"], "results: cannot read results (Is a directory)"),
        (["tune", "--batch", "many"], "allowed: whole numbers from 1, and bf16, fp16, tf32, fp32"),
        (["tune", "--batch", "1,0"], "allowed: whole numbers from 1, and bf16, fp16, tf32, fp32"),
        (["tune", "--batch", "²"], "allowed: whole numbers from 1, and bf16, fp16, tf32, fp32"),
        (["campaign", "--out", "/dev/null/found", "--minutes", "nan"], "--minutes nan: expected a number above 0.33"),
        (["campaign", "--out", "pyproject.toml"], "--out pyproject.toml: cannot be a folder (File exists)"),
        (["calibrate", "--into", "missing.md"], "missing.md: cannot read it"),
        (["report", "--gate", "verdicts.json"], "--gate shows verdicts on the page: give --html FILE as well"),
        (["report", "--html", "-", "--gate", "pyproject.toml"], "not what `python -m bench gate --json` writes"),
        (["model", "--size", "8x8"], "an image of 8x8 is too small for 4 halvings: 16 pixels a side at least"),
        (["model", "--fold-transposed"], "--fold-transposed is one way to fuse: give --fused too"),
        (["model", "--width", "wide"], "width='wide' is not possible; allowed: a whole number from 1"),
        (["resources", "--target", "sm_ninety"], "given 'sm_ninety'"),
        (["resources", "--target", "sm_999"], "a target is one of sm_80, sm_89, sm_90, sm_100, sm_120; given 'sm_999'"),
        (["resources", "--kernel", "none"], "no kernel is called 'none'; there are: conv_bn_relu"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_a_mistake_is_answered_in_one_line_and_status_2(bench: Bench, arguments: list[str], expected: str) -> None:
    told = bench.read(*arguments)
    assert told.returncode == 2
    assert told.stdout == ""
    assert len(told.stderr.splitlines()) == 1, told.stderr
    assert expected in told.stderr


@pytest.mark.parametrize(
    ("upsampling", "parameters", "gmac"),
    [("transposed", "31,037,698", "449.303"), ("bilinear", "17,263,042", "373.247")],
)
def test_model_counts_what_the_field_counts(
    capsys: pytest.CaptureFixture[str], upsampling: str, parameters: str, gmac: str
) -> None:
    model(upsampling=upsampling, size="640x959")
    total = capsys.readouterr().out.splitlines()[-1].split()
    assert total[:3] == ["total", parameters, gmac]


def test_model_as_json_has_an_object_a_layer(bench: Bench) -> None:
    rows = [
        json.loads(line) for line in bench.read("model", "--json", "--width", "4", "--depth", "2").stdout.splitlines()
    ]
    assert rows[0]["layer"] == "inc.double_conv.0"
    assert rows[0]["output_shape"] == [1, 4, 256, 256]
    assert rows[0]["parameters"] == 3 * 4 * 9


@pytest.mark.parametrize(
    ("options", "total", "peaks"),
    [
        ({}, "22 kernels 0 others 385.4 666.6", "eager 176 MiB, fused 96.0 MiB (0.545×)"),
        ({"fold": True}, "18 kernels 0 others 359.6 551.3", "eager 176 MiB, fused 80.0 MiB (0.455×)"),
        ({"upsampling": "bilinear"}, "18 kernels 0 others 319.9 479.7", "eager 168 MiB, fused 72.0 MiB (0.429×)"),
    ],
)
def test_the_fused_model_is_counted_kernel_by_kernel(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], total: str, peaks: str
) -> None:
    model(fused=True, size="512x512", **options)
    told = capsys.readouterr().out.splitlines()
    if not options:  # what the other way to fuse comes to
        assert told.pop() == "with --fold-transposed: 18 kernels, 551.3 MB, 80.0 MiB (0.455×)"
    assert told[-2].split() == total.split()
    assert told[-1] == f"activations alive at once, at most: {peaks}"


def test_the_fused_model_as_json_has_an_object_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    model(fused=True, json=True, width="8", depth="2")
    *calls, total = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert total["kernels"] == len(calls) == 12
    assert total["fused_peak_mib"] < total["eager_peak_mib"]
    assert calls[0]["kernel"] == "conv_bn_relu"
    assert calls[0]["shapes"] == [[1, 8, 256, 256]]


@pytest.mark.slow
def test_resources_of_a_target_that_is_not_here(bench: Bench) -> None:
    rows = [json.loads(line) for line in bench.read("resources", "--target", "sm_90", "--json").stdout.splitlines()]
    wanted = {"kernel", "target", "config", "registers", "spill_bytes", "shared_bytes", "tensor_core", "instructions"}
    assert rows
    assert all(wanted <= row.keys() and row["registers"] > 0 for row in rows)


def test_report_prints_the_table_of_a_run_again(bench: Bench, saved: Path) -> None:
    told = bench.read("report", str(saved))
    assert told.returncode == 0
    assert "1.00×" in told.stdout
    assert "triton: unsupported: no CUDA device" in told.stdout
    assert "\x1b" not in told.stdout, "a pipe gets plain text"


def test_report_as_markdown_and_csv(bench: Bench, saved: Path) -> None:
    assert "| eager |" in bench.read("report", "--markdown", "-", str(saved)).stdout
    rows = list(csv.DictReader(io.StringIO(bench.read("report", "--csv", "-", str(saved)).stdout)))
    assert [row["status"] for row in rows] == ["ok", "unsupported"]
    assert rows[0]["p50_ms"] == "10.0"
    assert rows[1]["p50_ms"] == ""


def test_report_says_how_much_of_a_torn_file_is_lost(bench: Bench, saved: Path) -> None:
    with saved.open("ab") as file:
        file.write(b'{"case": {"ta')
    told = bench.read("report", str(saved))
    assert told.returncode == 0
    assert "1 line(s) of" in told.stdout


def test_report_into_a_pipe_that_closes_early_ends_without_a_word(saved: Path) -> None:
    many = " ".join([str(saved)] * 300)
    command = f"{sys.executable} -m bench report {many} | head -n 1; exit ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.stderr == ""
    assert told.returncode == 128 + signal.SIGPIPE


def test_a_closed_output_is_no_reason_for_a_traceback(bench: Bench) -> None:
    told = bench.call("/bin/sh", "-c", 'exec "$0" -m bench list --axes >&-', sys.executable)
    assert (told.returncode, told.stderr) == (0, "")


def test_report_onto_a_full_disk_is_one_line(bench: Bench, saved: Path) -> None:
    command = f"{sys.executable} -m bench report {saved} > /dev/full"
    told = bench.call("bash", "-c", command)
    assert told.returncode == 1
    assert told.stderr.splitlines() == ["bench: [Errno 28] No space left on device"]


def test_text_in_a_record_cannot_colour_or_move_the_terminal(
    bench: Bench, header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    file = RunFile.create(header, tmp_path)
    file.append(make_record(Case(), "crash", "\x1b[2J[red]boo[/red]\x07"))
    told = bench.read("report", str(file.path))
    assert told.returncode == 0
    assert "[red]boo[/red]" in told.stdout
    assert "\x1b" not in told.stdout
    assert "\x07" not in told.stdout


def test_a_record_of_an_unknown_implementation_is_still_read(bench: Bench, saved: Path) -> None:
    """Runs of other branches and of loaded modules are results like any other."""
    line = saved.read_bytes().splitlines()[1]
    record = msgspec.json.decode(line)
    record["case"]["implementation"] = "of_somebody_else"
    with saved.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")
    assert "of_somebody_else" in bench.read("report", str(saved)).stdout
