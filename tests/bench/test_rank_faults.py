"""One rank of a case fails, in every way: the case ends in time, the right rank is named, the next case is measured."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench import fitted
from bench.case import Case
from bench.processes import MARK

from .conftest import TINY, Bench

pytestmark = pytest.mark.skipif(psutil.cpu_count() == 1, reason="one core")
LIMIT_S = 100


def two_ranks(implementation: str) -> Case:
    return Case(implementation=implementation, task="train", devices="2cpu", **TINY)  # type: ignore[arg-type]


def _left_behind(name: str) -> Iterator[psutil.Process]:
    """Processes of cases of the run that was called `name`, zombies left out."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            variables = process.environ()
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and MARK in variables and variables.get("UNET_BENCH_TEST") == name:
                yield process


FAULTS = {
    "one_rank_raises": ("crash", "rank 1: ValueError: this rank has had enough"),
    "one_rank_raises_once": ("crash", "rank 1: ValueError: not the first time"),
    "one_rank_cut_off": ("crash", "rank 1: ValueError: somebody pulled the cable"),
    "one_rank_absent": ("timeout", "rank 1 did not come within 15 s; rank 0 waited"),
    "one_rank_hangs": ("timeout", "rank 1 does not answer; rank 0 waited: "),
    "one_rank_greedy": ("oom", "rank 1: "),
    "one_rank_killed": ("crash", "rank 1: the process was killed by SIGKILL"),
    "agent_killed": ("crash", "torchrun: the process was killed by SIGKILL"),
}


@pytest.mark.slow
def test_a_fault_of_one_rank_is_told_of_that_rank_and_the_next_case_is_measured(bench: Bench) -> None:
    bench.variables["UNET_BENCH_TEST"] = str(bench.results)
    options = ("--time-limit-s", str(LIMIT_S), "--rank-timeout-s", "15", "--join-timeout-s", "15")
    bench.measure(*map(two_ranks, FAULTS), Case(**TINY), options=options)  # type: ignore[arg-type]
    found = bench.records()
    assert list(found) == [*FAULTS, "eager"]
    for fault, (status, reason) in FAULTS.items():
        assert found[fault].reason.startswith(reason)
        assert found[fault].status == status, fault
        assert found[fault].figures == {}
        assert found[fault].wall_s < LIMIT_S
    assert found["eager"].status == "ok"
    assert not list(_left_behind(str(bench.results)))


@pytest.mark.slow
def test_ranks_with_weights_of_different_fits_are_not_measured(
    bench: Bench, fitted_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fitted.Recipe(upsampling="transposed", width=TINY["width"], depth=TINY["depth"])  # type: ignore[arg-type]
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    weights, dice = fitted.load(recipe)
    monkeypatch.setenv("UNET_BENCH_CACHE", str(tmp_path))
    other = dice / 2
    fitted._write({"weights": weights, "dice": other, "digest": fitted._digest(weights, other)}, fitted.path(recipe))
    bench.variables["CACHE_OF_RANK_1"] = str(tmp_path)
    bench.measure(two_ranks("eager"))
    record = bench.records()["eager"]
    assert record.status == "crash"
    assert "machines have weights of different fits: share one $UNET_BENCH_CACHE" in record.reason
