"""The ring's arithmetic, and `python -m bench scaling`: what was measured and what is predicted, kept apart."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.case import Case
from bench.results import Header, Record
from bench.ring import Interconnect, Step, all_reduce_ms, buckets, predict
from bench.runfile import RunFile

from .conftest import ROOT, TINY, Bench

STEP = Step(step_ms=100.0, backward_ms=60.0, gradient_mib=118.4, images=16)
steps = st.builds(
    lambda backward_ms, more_ms, gradient_mib: Step(
        step_ms=backward_ms + more_ms, backward_ms=backward_ms, gradient_mib=gradient_mib, images=4
    ),
    st.floats(0.1, 1e3),
    st.floats(0.1, 1e3),
    st.floats(0.01, 1e4),
)
links = st.builds(Interconnect, gb_per_s=st.floats(1e-3, 1e3), latency_us=st.floats(0, 1e3), overlap=st.booleans())
numbers = st.integers(2, 512)


def test_a_ring_sends_its_share_of_the_bytes_twice_around() -> None:
    """100 MB among 4 devices: 6 messages of 25 MB at 10 GB/s and 5 µs."""
    link = Interconnect(gb_per_s=10.0, latency_us=5.0)
    assert all_reduce_ms(100e6 / 2**20, 4, link) == pytest.approx(6 * (2.5 + 0.005))


def test_without_overlap_the_whole_all_reduce_is_exposed() -> None:
    link = Interconnect(gb_per_s=10.0, overlap=False)
    found = predict(STEP, 8, link)
    assert found.exposed_ms == pytest.approx(found.allreduce_ms) == pytest.approx(all_reduce_ms(118.4, 8, link))
    assert found.efficiency == pytest.approx(100 / (100 + found.allreduce_ms))
    assert found.images_per_s == pytest.approx(8 * 16 / (0.1 + found.allreduce_ms / 1e3))


def test_an_exchange_faster_than_the_backward_pass_leaves_its_last_bucket_exposed() -> None:
    link = Interconnect(gb_per_s=100.0)
    last = list(buckets(118.4))[-1]
    assert predict(STEP, 8, link).exposed_ms == pytest.approx(all_reduce_ms(last, 8, link))


@given(steps)
def test_buckets_hold_every_byte_and_none_more_than_the_limit(step: Step) -> None:
    found = list(buckets(step.gradient_mib))
    assert sum(found) == pytest.approx(step.gradient_mib)
    assert found[0] <= 1
    assert all(0 < bucket <= 25 for bucket in found)


@given(steps, links, numbers)
def test_a_prediction_lies_between_no_exchange_and_all_of_it_exposed(
    step: Step, link: Interconnect, devices: int
) -> None:
    found = predict(step, devices, link)
    last = list(buckets(step.gradient_mib))[-1]
    slack = 1e-9 * (step.step_ms + found.allreduce_ms)
    assert all_reduce_ms(last, devices, link) - slack <= found.exposed_ms <= found.allreduce_ms + slack
    assert 0 < found.efficiency <= 1


@given(steps, links, numbers)
def test_more_devices_and_a_slower_interconnect_never_help(step: Step, link: Interconnect, devices: int) -> None:
    found = predict(step, devices, link).efficiency
    slower = msgspec.structs.replace(link, gb_per_s=link.gb_per_s / 2)
    later = msgspec.structs.replace(link, latency_us=link.latency_us + 10)
    for worse in (predict(step, devices + 1, link), predict(step, devices, slower), predict(step, devices, later)):
        assert worse.efficiency <= found * (1 + 1e-12)


@pytest.fixture
def saved(header: Header, make_record: Callable[..., Record], tmp_path: Path) -> Path:
    one, two = Case(task="train", devices="1gpu"), Case(task="train", devices="2gpu")
    file = RunFile.create(header, tmp_path)
    file.append(make_record(one, p50_ms=100.0, images_per_s=10.0, backward_ms=60.0, gradient_mib=118.4))
    figures = {"scaling_efficiency": 0.8, "lost_to_compute": 0.05, "lost_to_imbalance": 0.05, "lost_to_allreduce": 0.1}
    file.append(make_record(two, p50_ms=125.0, images_per_s=16.0, gradient_mib=118.4, data_ms=1.0, **figures))
    return file.path


def scaling(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "scaling", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_measured_and_predicted_rows_are_never_mixed(saved: Path) -> None:
    rows = [
        json.loads(line) for line in scaling(saved, "--gb-per-s", 10, "--devices", "2,8", "--json").stdout.splitlines()
    ]
    assert [(row["kind"], row["devices"]) for row in rows] == [("measured", 2), ("predicted", 2), ("predicted", 8)]
    assert rows[0]["lost_to_allreduce"] == 0.1
    text = scaling(saved, "--gb-per-s", 10).stdout
    assert text.index("measured: ") < text.index("predicted, not measured: all-reduce in a ring, 10 GB/s and 0 µs")
    below = [line for line in text.split("predicted, not measured")[1].splitlines()[2:] if line]
    assert len(below) == 9
    assert all(line.startswith("predicted ") for line in below)


def test_scaling_answers_within_a_second_and_without_torch(saved: Path) -> None:
    code = "import sys, bench.cli\ntry: bench.cli.main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "scaling", str(saved), "--gb-per-s", "10"]
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert told.stderr.splitlines()[-1] == "False"
    # The processor's seconds, the best of three: the machine is shared.
    assert min(spent) < 1


def test_without_a_stated_interconnect_nothing_is_predicted(saved: Path) -> None:
    found = scaling(saved)
    assert "predicted" not in found.stdout
    assert "10.0%" in found.stdout, "what the all-reduce cost"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gb-per-s", "0"), "expected more than 0"),
        (("--gb-per-s", "nan"), "expected more than 0"),
        (("--devices", "1,2"), "expected whole numbers from 2"),
        (("-k", "1gpu"), "to predict from one device state --gb-per-s"),
        (("-k", "other"), "measure with `nox -s bench -- -k train --axis devices=1,2`"),
    ],
)
def test_what_cannot_be_told_is_one_line_and_status_2(saved: Path, arguments: tuple[str, ...], said: str) -> None:
    found = scaling(saved, *arguments)
    assert found.returncode == 2
    assert said in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(psutil.cpu_count() == 1, reason="one core")
def test_the_ring_says_what_two_processes_on_a_cpu_show(bench: Bench) -> None:
    """Everything of one process group, in turns: a busy machine slows both sides alike."""
    # Enough to compute that it is not launching and waking that is compared.
    case = Case(task="train", devices="2cpu", batch=8, **{**TINY, "size": "96x96"})  # type: ignore[arg-type]
    bench.measure(case, options=("--measure-s", "4"))
    record = bench.records()["eager"]
    slowest = max(float(rank.figures["compute_ms"] or 0) for rank in record.ranks)
    exchanged, backward, rate, mib, allreduce = (
        float(record.figures[name] or 0)
        for name in ("exchanged_ms", "backward_ms", "allreduce_gb_s", "gradient_mib", "allreduce_ms")
    )
    # The cores compute, so that gloo's exchange hides behind nothing.
    step = Step(step_ms=slowest, backward_ms=backward, gradient_mib=mib, images=8)
    found = predict(step, 2, Interconnect(gb_per_s=rate, overlap=False))
    assert found.allreduce_ms == pytest.approx(allreduce, rel=1e-6)
    assert 0.6 < found.step_ms / exchanged < 1.6
