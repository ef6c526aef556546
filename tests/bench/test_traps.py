"""Traps that harnesses of the field have fallen into, each by its name. What the gate must not do is tested beside it.

Elsewhere in this folder: warm-up that never runs and rules without an end (test_sampling), any RuntimeError called out
of memory and outputs that nobody wrote (test_measuring), masks of one class (test_picture), throttled blocks that leave
no number (test_nvml), shares of somebody else's peak (test_derive).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.case import Case
from bench.derive import derived
from bench.distributed import Group
from bench.formats import benchmark_json, tracked
from bench.report.table import tables
from bench.results import Header, Record, Run, frame, read
from bench.runfile import RunFile
from bench.statistics import summary
from bench.subject import Subject, build

from .conftest import TINY

MakeRecord = Callable[..., Record]


@pytest.fixture
def failed(header: Header, make_record: MakeRecord, tmp_path: Path) -> Run:
    """A run in which the case that would be fastest failed in every way there is, whatever figures it left."""
    file = RunFile.create(header, tmp_path)
    file.append(make_record(Case(), p50_ms=10.0, images_per_s=100.0, peak_memory_mib=400.0))
    for batch, status in enumerate(("oom", "timeout", "crash", "inaccurate", "unsupported"), start=2):
        file.append(make_record(Case(batch=batch), status, "why", p50_ms=0.0, images_per_s=math.inf))
    return read(file.path)


def test_out_of_memory_is_no_zero_that_ranks_fastest(failed: Run) -> None:
    assert all(one.value > 0 for one in tracked(failed))
    assert [one["name"] for one in benchmark_json(failed)["benchmarks"]] == [Case().id]
    cells = [cell for table in tables(failed) for row in table.rows for cell in row]
    assert "oom" in cells
    assert not {"0", "0.00", "inf"} & set(cells)


def test_an_errored_row_is_never_shown_as_fastest(failed: Run) -> None:
    for table in tables(failed):
        for row in table.rows:
            shown = dict(zip(table.headings, row, strict=True))
            if shown["p50 ms"] in {"timeout", "crash", "inaccurate", "unsupported", "oom"}:
                assert shown.get("img/s", "–") == shown.get("speed", "–") == "–"
    assert all(
        not follows for record, follows in zip(failed.records, derived(failed), strict=True) if record.status != "ok"
    )


def test_a_peak_from_a_data_sheet_is_used_for_no_mfu(failed: Run) -> None:
    # Sparse peaks are twice the dense ones. None is written down anywhere: without a measurement nothing is said.
    assert "mfu" not in frame([failed]).columns


def test_a_minimum_is_never_printed_as_a_maximum() -> None:
    samples = [1.0] * 100 + [2.0] * 800 + [9.0] * 100
    figures = summary(samples, 1)
    assert (figures["p10_ms"], figures["p50_ms"], figures["p99_ms"]) == (pytest.approx(1.9, abs=1), 2.0, 9.0)
    assert figures["p10_ms"] <= figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"]


def test_throughput_is_the_batch_over_the_latency() -> None:
    figures = summary([20.0] * 50, images=8)
    assert figures["images_per_s"] == pytest.approx(8 / 0.020)


@pytest.fixture
def tiny(fitted_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    return lambda **axes: build(Case(**{**TINY, **axes}), Group())


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("axes", [{}, {"task": "layer"}, {"precision": "bf16"}], ids=str)
def test_nothing_but_the_network_runs_inside_the_timed_step(tiny: Callable[..., Subject], axes: dict[str, str]) -> None:
    made = tiny(**axes)
    with Operations() as step:
        made.step()
    with Operations() as network, torch.inference_mode():
        made.call(*made.inputs)
    assert step.names == network.names, "no argmax, softmax, copy or conversion of inputs beside the forward pass"


def test_a_training_step_computes_forward_backward_and_optimizer_once(tiny: Callable[..., Subject]) -> None:
    made = tiny(task="train")
    made.step()
    with Operations() as step:
        made.step()
    convolutions = sum("convolution.default" in name for name in step.names)
    backward = sum("convolution_backward" in name for name in step.names)
    assert convolutions == backward == 13, "ten of blocks, two upsampling, one head"
    assert not [name for name in step.names if "argmax" in name]


def test_the_json_that_others_read_has_no_nan_and_no_infinity(failed: Run) -> None:
    text = json.dumps([one.value for one in tracked(failed)], allow_nan=False)
    assert "NaN" not in text
