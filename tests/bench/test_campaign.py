"""Campaigns: walked through without a GPU, cut short, killed and gone on with."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from bench.campaign import conductor
from bench.campaign.conductor import RESERVE_S, Conductor, Outcome, ended, last
from bench.campaign.steps import Step, steps
from bench.environment import ROOT
from bench.gpus import Gpu
from bench.machine import Machine
from bench.results import read

from .conftest import MACHINE, Bench

GPU = Gpu(
    name="NVIDIA H200",
    uuid=None,
    memory_mib=None,
    driver=None,
    power_limit_w=None,
    compute_capability=None,
)


def step(name: str, code: str, **changed: object) -> Step:
    given = {"what": "made up", "command": ("-c", code), "gpu": False, "least_s": 1.0, "limit_s": 60.0, **changed}
    return Step(name=name, **given)  # type: ignore[arg-type]  # as Step has them


def run(folder: Path, *chosen: Step, seconds: float = 60.0, machine: Machine = MACHINE) -> list[Outcome]:
    told: list[str] = []
    Conductor(folder, machine, RESERVE_S + seconds).run(chosen, told.append, lambda: lambda *_: None)
    return [outcome for one in chosen if (outcome := last(folder, one)) is not None]


@pytest.mark.slow
def test_a_whole_campaign_at_toy_size_without_a_gpu(bench: Bench, tmp_path: Path) -> None:
    bench.variables["CUDA_VISIBLE_DEVICES"] = ""
    out = tmp_path / "found"
    told = bench.read("campaign", "--out", str(out), "--toy")
    assert told.returncode == 0, told.stdout + told.stderr
    found = {
        file.parent.name: json.loads(file.read_bytes()) for file in out.glob("*/*t*.json") if "step" in file.read_text()
    }
    reasons = {name: one["reason"] for name, one in found.items() if one["status"] == "unsupported"}
    assert reasons == {"tests": "no CUDA device", "tune": "no CUDA device"}
    assert {one["status"] for name, one in found.items() if name not in reasons} == {"ok"}
    assert set(found) == {one.name for one in steps(MACHINE, toy=True)}
    # The rivals are one run, so that its table compares them.
    (network,) = out.glob("network/*/*.jsonl")
    assert {(one.case.task, one.case.implementation, one.status) for one in read(network).records} == {
        *((task, "eager", "ok") for task in ("infer", "train")),
        *((task, "triton", "unsupported") for task in ("infer", "train")),
        *(("infer", "folded", "ok"), ("train", "folded", "unsupported")),
    }
    summary = (out / "summary.md").read_text()
    assert "| tests | every kernel right on this GPU | unsupported: no CUDA device | 0 |" in summary
    assert "| eager |" in summary
    with tarfile.open(out.with_name("found.tar.gz")) as archive:
        names = archive.getnames()
    assert {"found/summary.md", "found/environment.json", "found/network/log"} <= set(names)
    assert f"found/{network.relative_to(out)}" in names
    again = bench.read("campaign", "--out", str(out), "--toy")
    assert again.returncode == 0
    assert again.stdout.count(": ok before") == len(found) - 2


@pytest.mark.slow
def test_a_campaign_killed_in_mid_step_goes_on_and_measures_nothing_twice(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "found"
    command = [sys.executable, "-m", "bench", "campaign", "--out", str(out), "--toy", "--steps", "ceilings,network"]
    process = subprocess.Popen(command, cwd=ROOT, env=bench.variables, stdout=subprocess.DEVNULL)
    wait(lambda: any(b'"status":"ok"' in file.read_bytes() for file in out.glob("network/*/*.jsonl")))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert family
    wait(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))
    (file,) = out.glob("network/*/*.jsonl")
    first = {one.case.id: one.started for one in read(file).records if one.status == "ok"}
    told = subprocess.run(command, cwd=ROOT, env=bench.variables, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "ceilings: ok before" in told.stdout
    (file,) = out.glob("network/*/*.jsonl")
    records = {one.case.id: one.started for one in read(file).records}
    assert len(records) == 3
    assert {name: records[name] for name in first} == first
    assert "measured before" in (out / "network" / "log").read_text()


def wait(until: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_each_step_and_the_whole_run_are_bounded(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    plain = step("plain", "print('found')")
    stuck = step("stuck", "import time; time.sleep(1000)", limit_s=1.0, goes_on=False)
    long, late = step("long", deaf), step("late", "print('found')", least_s=30.0)
    start = time.monotonic()
    found = run(tmp_path, stuck, plain, long, late, seconds=5.0)
    assert time.monotonic() - start < 5.0 + RESERVE_S
    assert [one.status for one in found] == ["timeout", "ok", "unfinished", "unfinished"]
    assert found[0].reason == "longer than 1 s"
    assert found[2].reason.startswith("stopped after ")
    assert (found[3].reason, found[3].attempts) == ("no time left", 0)
    assert [ended(tmp_path, one) is not None for one in (stuck, plain, long, late)] == [True, True, False, False]


COUNT = """
import pathlib, time
file = pathlib.Path(FILE)
file.write_text(file.read_text() + "x" if file.exists() else "x")
print(file.read_text())
"""


def test_what_has_ended_is_not_done_again_and_what_has_not_goes_on(tmp_path: Path) -> None:
    def counting(name: str, then: str) -> Step:
        return step(name, COUNT.replace("FILE", repr(str(tmp_path / f"{name}.txt"))) + then)

    failing = counting("failing", "raise SystemExit('that was wrong')")
    cut = counting("cut", "time.sleep(0 if file.read_text() == 'xx' else 1000)")
    first = run(tmp_path, failing, cut, seconds=3.0)
    assert [one.status for one in first] == ["failed", "unfinished"]
    assert first[0].reason == "the process ended with status 1:\nthat was wrong"
    second = run(tmp_path, failing, cut)
    assert [(one.status, one.attempts) for one in second] == [("failed", 1), ("ok", 2)]
    assert (tmp_path / "failing.txt").read_text() == "x"
    assert [(tmp_path / "cut" / name).read_text() for name in ("log.1", "log")] == ["x\n", "xx\n"]


def test_launch_settings_measured_so_far_come_along_to_a_bare_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    here.mkdir(), there.mkdir()
    monkeypatch.setattr(conductor, "TUNED", here)
    run(out, step("tune", f"open({str(here / 'nvidia_toy.json')!r}, 'w').write('[1]')"))
    monkeypatch.setattr(conductor, "TUNED", there)
    run(out, step("more", "pass"))
    assert (there / "nvidia_toy.json").read_text() == "[1]"
    newer = there / "nvidia_toy.json"
    newer.write_text("[1, 2]")
    os.utime(newer, (time.time() + 10, time.time() + 10))
    run(out, step("still more", "pass"))
    assert newer.read_text() == "[1, 2]", "older settings never replace newer ones"


@pytest.mark.slow
def test_every_command_of_a_campaign_is_one_that_can_be_given_by_hand(bench: Bench) -> None:
    for one in steps(MACHINE, toy=False):
        if one.command[:3] == ("-m", "pytest", "bench"):
            told = bench.call(sys.executable, *one.command, "--dry-run", "-p", "no:cacheprovider")
            assert told.returncode == 0, told.stdout + told.stderr
            assert "unsupported: " in told.stdout


def test_steps_of_a_gpu_are_those_that_a_cpu_has_too() -> None:
    assert [one.name for one in steps(MACHINE, toy=True)] == [one.name for one in steps(MACHINE, toy=False)]
    assert all(one.gpu for one in steps(MACHINE, toy=False))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--steps", "tests,mend"), "--steps mend: no such step; there are: tests, ceilings, layers, tune"),
        (("--minutes", "0.1"), "--minutes 0.1: expected a number above 0.33, to end in order"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_made(
    bench: Bench, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    told = bench.read("campaign", "--out", str(tmp_path / "found"), *options)
    assert told.returncode == 2
    assert expected in told.stderr
    assert not (tmp_path / "found").exists()


def test_missing_packages_are_named_in_one_line() -> None:
    told = subprocess.run(
        [sys.executable, "-S", "-m", "bench", "campaign"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    (line,) = told.stderr.splitlines()
    assert "missing here: torch>=2.11" in line
    assert "msgspec>=0.19" in line


def test_without_a_gpu_that_torch_can_use_its_steps_are_unsupported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = step("gpu", "print('never')", gpu=True), step("plain", "print('found')")
    found = run(tmp_path / "none", *chosen)
    assert [(one.status, one.reason) for one in found] == [("unsupported", "no CUDA device"), ("ok", "")]
    assert not (tmp_path / "none" / "gpu" / "log").exists()
    # NVML names one and torch claims CUDA, but a driver is not there: tests would all be skipped, and pass.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    claimed = msgspec.structs.replace(MACHINE, gpus=(GPU,), torch_cuda="13.0")
    found = run(tmp_path / "claimed", *chosen, machine=claimed)
    assert [one.status for one in found] == ["unsupported", "ok"]
    assert found[0].reason.startswith("torch cannot use the GPU: ")
