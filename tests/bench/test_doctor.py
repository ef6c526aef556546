import json
import math
import resource
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from bench import noise
from bench.case import Case
from bench.doctor import findings
from bench.engine.protocol import Outcome
from bench.largest import largest
from bench.results import Record
from bench.support import unsupported

from .conftest import MACHINE, TINY, Bench

MakeRecord = Callable[..., Record]


def told(load: float = 0.1, **changed: object) -> dict[str, str]:
    return {one.what: one.level for one in findings(msgspec.structs.replace(MACHINE, **changed), load)}


def test_a_machine_in_order_has_nothing_bad() -> None:
    assert "bad" not in told().values()


@pytest.mark.parametrize(
    ("changed", "what", "level"),
    [
        ({"load": 9.0}, "the machine is busy: 9.0 processes want", "bad"),
        ({"torch_version": None}, "torch is not installed", "bad"),
        ({"torch_version": "2.9.1+cu128"}, "torch 2.9.1+cu128 was never tried", "bad"),
        ({"triton_version": "3.10.0"}, "triton 3.10.0", "good"),
        ({"cxx": None, "cxx_missing": "no C++ compiler: `g++ --version` does not run"}, "no C++ compiler", "note"),
        ({}, "no CUDA device", "note"),
    ],
    ids=lambda part: str(part)[:24],
)
def test_each_trouble_is_named_with_its_weight(changed: dict[str, object], what: str, level: str) -> None:
    assert [found for text, found in told(**changed).items() if text.startswith(what)] == [level]  # type: ignore[arg-type]


def test_what_is_wrong_comes_with_what_to_do() -> None:
    broken = msgspec.structs.replace(MACHINE, torch_version=None, cxx=None, cxx_missing="no C++ compiler")
    assert all(one.advice for one in findings(broken, 9.0) if one.level == "bad")


def test_doctor_tells_people_words_and_programs_json_within_a_moment_and_without_torch(bench: Bench) -> None:
    spent = []
    for options in ((), ("--json",)):
        start = _children_s()
        answer = bench.read("doctor", "--quick", *options)
        spent.append(_children_s() - start)
        assert answer.returncode in {0, 4}
        if not options:
            assert answer.stdout.splitlines()[1].startswith("good  torch ")
    found = json.loads(answer.stdout)
    assert {one["level"] for one in found["findings"]} <= {"good", "note", "bad"}
    assert (answer.returncode == 4) == any(one["level"] == "bad" for one in found["findings"])
    assert min(spent) < 3


def _children_s() -> float:
    """CPU seconds of the processes that ended: other work on the machine does not change them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same_case(make_record: MakeRecord, seed: int, between: float) -> Callable[[], Record]:
    rng = np.random.default_rng(seed)

    def measure() -> Record:
        p50 = float(10 * rng.lognormal(0, between))
        return make_record(noise.CASE, p50_ms=p50, p50_low_ms=p50 * 0.999, p50_high_ms=p50 * 1.001, disturbed=False)

    return measure


def test_the_noise_is_that_between_processes_and_not_that_inside_one(make_record: MakeRecord) -> None:
    clock = iter(range(10_000))
    found = noise.noise(same_case(make_record, 1, 0.05), lambda: next(clock) / 10)
    assert found is not None
    assert found.processes > 100
    assert found.between == pytest.approx(0.05, rel=0.15)
    assert found.within == pytest.approx(0.001)


def test_the_smallest_difference_is_exceeded_by_chance_in_5_of_100_pairs(make_record: MakeRecord) -> None:
    rng = np.random.default_rng(2)
    false = 0
    measure = same_case(make_record, 4, 0.03)
    known = noise.scatter([measure() for _ in range(2000)])
    for _ in range(4000):
        one, other = 10 * rng.lognormal(0, 0.03, (2, 5))
        false += abs(one.mean() / other.mean() - 1) > known.smallest
    # Student's t for eight degrees of freedom is wider than a spread that 2,000 processes have told.
    assert 0.01 < false / 4000 < 0.05


def test_noise_is_told_of_three_processes_at_least_and_intervals_of_those_that_have_one(
    make_record: MakeRecord,
) -> None:
    hours = iter(range(0, 10**6, 3600))
    found = noise.noise(same_case(make_record, 5, 0.01), lambda: float(next(hours)))
    assert found is not None
    assert found.processes == 3
    wide = [
        make_record(noise.CASE, p50_ms=10.0, p50_low_ms=10 - half, p50_high_ms=10 + half, disturbed=half == 0.2)
        for half in (0.1, 0.2, 0.3)
    ]
    told = noise.scatter([*wide, make_record(noise.CASE, p50_ms=10.0)])
    assert (told.processes, told.disturbed, told.between) == (4, 0.25, 0.0)
    assert told.within == pytest.approx(0.02)
    assert math.isnan(noise.scatter([make_record(noise.CASE, p50_ms=10.0)] * 2).within)


def test_a_noise_that_others_made_is_bad_news_and_a_case_that_does_not_run_too(make_record: MakeRecord) -> None:
    measure = same_case(make_record, 3, 0.01)
    quiet = noise.scatter([measure() for _ in range(5)])
    assert noise.about(quiet).level == "good"
    disturbed = noise.about(msgspec.structs.replace(quiet, disturbed=0.4))
    assert disturbed.level == "bad"
    assert "others disturbed 40% of them" in disturbed.what
    failed = noise.noise(lambda: make_record(noise.CASE, "crash", "why"), lambda: 0.0)
    assert failed is None
    assert noise.about(failed).level == "bad"


@pytest.mark.parametrize("what", ["batch", "size"])
@pytest.mark.parametrize("limit", [0, 1, 16, 17, 63, 64, 65, 1000, 4097])
def test_the_largest_is_found_exactly_in_few_tries(what: str, limit: int) -> None:
    def fits(case: Case) -> Outcome:
        number = case.batch if what == "batch" else case.height
        assert case.height == case.breadth
        return Outcome(status="ok" if number <= limit else "oom")

    found = largest(Case(), what, fits)  # type: ignore[arg-type]  # one of the two
    step = 16 if what == "size" else 1
    assert found.number == limit // step * step
    assert found.bounded
    assert len(found.tries) <= 26


def test_a_search_in_which_all_fits_ends_at_the_most_that_is_tried() -> None:
    found = largest(Case(), "batch", lambda _: Outcome(status="ok"))
    assert (found.number, found.bounded, found.why) == (65_536, False, "no more than 65536 is tried")
    assert max(one.number for one in found.tries) == 65_536


@pytest.mark.parametrize("depth", [1, 4, 6])
@pytest.mark.parametrize("task", ["infer", "train"])
def test_the_search_of_a_size_begins_with_one_that_the_network_takes(task: str, depth: int) -> None:
    case = Case(task=task, depth=depth)  # type: ignore[arg-type]  # one of the two
    found = largest(case, "size", lambda one: Outcome(status="oom" if unsupported(one, MACHINE) is None else "crash"))
    assert [one.outcome.status for one in found.tries] == ["oom"]
    assert found.bounded


def test_a_search_that_time_ended_says_that_its_limit_is_not_memory() -> None:
    def fits(case: Case) -> Outcome:
        return Outcome(status="ok") if case.batch < 20 else Outcome(status="timeout", reason="longer than 5 s")

    found = largest(Case(), "batch", fits)
    assert (found.number, found.bounded) == (19, False)
    assert found.why == "20: timeout: longer than 5 s"


def test_a_case_that_cannot_run_at_all_is_told_so(bench: Bench) -> None:
    bench.variables["CUDA_VISIBLE_DEVICES"] = ""
    answer = bench.read("fit", "--axis", "devices=1gpu")
    assert answer.returncode == 3
    assert answer.stdout == "no batch fits: no CUDA device\n"
    plain = bench.read("fit", "--axis", "devices=4000")  # the kind is left to the machine
    assert plain.stdout.startswith("no batch fits: 4000 processes wanted"), plain.stderr
    assert bench.read("fit", "--axis", "width=1,2").returncode == 2
    assert "2 cases; expected one value an axis" in bench.read("fit", "--axis", "width=1,2").stderr


@pytest.mark.slow
def test_the_largest_batch_under_a_limit_is_one_below_the_first_that_runs_out_of_memory(bench: Bench) -> None:
    axes = [f"--axis={name}={value}" for name, value in {**TINY, "size": "512x512"}.items()]
    answer = bench.read("fit", "--find-max", "batch", *axes, "--memory-mib", "600", "--json")
    found = json.loads(answer.stdout)
    ended = {one["number"]: one["outcome"]["status"] for one in found["tries"]}
    assert found["bounded"], answer.stderr
    assert ended[found["number"]] == "ok"
    assert ended[found["number"] + 1] == "oom"
