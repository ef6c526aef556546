"""Metrics of the engine in this process, on tiny cases: what they count is compared with what can be reckoned."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import pytest
import torch

import kernels
from bench.case import Case
from bench.distributed import Group
from bench.engine.accuracy import Accuracy, _limit, _meaningful
from bench.engine.compiled import graph_breaks
from bench.engine.latency import Latency, _disturbed
from bench.engine.metric import Found
from bench.engine.saved import Saved
from bench.engine.second_size import SecondSize
from bench.engine.stages import Stages
from bench.engine.work import Work
from bench.layers import chain
from bench.pinning import pin
from bench.results import Settings
from bench.subject import Subject, build
from kernels.settings import Problem

from .conftest import TINY

BRIEF = Settings(measure_s=0.2, warmup_s=0.05, warmup_extra_s=0.1)


@pytest.fixture(autouse=True)
def _tiny_weights(fitted_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("UNET_BENCH_CACHE", str(fitted_cache))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def subject(**axes: Any) -> Subject:  # noqa: ANN401
    return build(Case(**{**TINY, **axes}), Group())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layer", ["inc_1", "inc_2", "down2_1", "up1_1", "up2_2"])
def test_bytes_and_operations_of_a_layer_are_those_of_the_kernels_own_cost(layer: str, precision: str) -> None:
    made = subject(task="layer", layer=layer, precision=precision, batch=2)
    batch, channels, height, width = made.inputs[0].shape
    outputs = made.forward(made.call)[0].shape[1]
    problem = Problem(
        batch=batch, height=height, width=width, in_channels=channels, out_channels=outputs, precision=precision
    )
    (kernel,) = (one for one in kernels.KERNELS if one.name == "conv_bn_relu")
    found = Work().measure(made, BRIEF)
    assert found["gbyte"] * 1e9 == pytest.approx(kernel.bytes(problem))
    assert found["gflop"] * 1e9 == pytest.approx(kernel.flops(problem), rel=0.02)  # the epilogue is not a convolution


def test_a_layer_is_given_what_comes_there_in_the_network_and_gives_what_goes_on() -> None:
    made = subject(task="layer", layer="down1_2")
    network = subject()
    seen: list[torch.Tensor] = []
    layer = chain(network.call, "down1_2")  # type: ignore[arg-type]  # eager's call is the network
    layer[0].register_forward_pre_hook(lambda _module, given: seen.append(given[0].clone()))
    layer[2].register_forward_hook(lambda _module, _given, result: seen.append(result.clone()))
    network.step()
    torch.testing.assert_close(made.inputs[0], seen[0])
    torch.testing.assert_close(made.forward(made.call)[0], seen[1])


@pytest.mark.parametrize(
    "axes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "bf16", "task": "train"},
        {"precision": "bf16", "modification": "vector"},
        {"task": "layer", "layer": "up2_1", "layout": "nhwc"},
        {"task": "layer", "precision": "fp16", "batch": 2},
    ],
    ids=str,
)
def test_eager_is_accurate_by_its_own_measure(axes: dict[str, Any]) -> None:
    made = subject(**axes)
    made.step()
    found = Accuracy().measure(made, BRIEF)
    assert found.fault == ""
    if axes.get("precision"):
        assert found["rel_l2"] > 1e-4, "weights and activations are in fewer bits"
        dtypes = {parameter.dtype for parameter in made.eager().parameters()}
        assert dtypes == {{"bf16": torch.bfloat16, "fp16": torch.float16}[axes["precision"]]} == {made.inputs[0].dtype}


def test_a_layer_that_is_wrong_is_inaccurate() -> None:
    made = subject(task="layer")
    wrong = made.call
    object.__setattr__(made, "call", lambda x: wrong(x) * 1.01)
    assert Accuracy().measure(made, BRIEF).fault.startswith("relative L2")


def test_saved_activations_are_what_the_formula_of_the_layers_says() -> None:
    made = subject(task="train")
    width, side = TINY["width"], 32
    pixels = [side * side, side * side // 4, side * side // 16]
    saved = 0
    # fp32. Each convolution saves its input, BatchNorm its input and two numbers a channel; ReLU's result is the next
    # convolution's input, the head's, or the skip that is saved inside the concatenation.
    for block, (channels, level) in {"inc": (width, 0), "down1": (2 * width, 1), "down2": (4 * width, 2)}.items():
        saved += (
            2 * channels * pixels[level] + 2 * channels * pixels[level] + 4 * channels
        )  # conv outputs, ReLU results
        if block != "inc":
            below = channels // 2
            saved += below * pixels[level] + 2 * below * pixels[level]  # pooled, and int64 indices: two fp32's each
    for channels, level in ((2 * width, 1), (width, 0)):
        saved += 2 * channels * pixels[level]  # the concatenation: skip and upsampled
        saved += 2 * channels * pixels[level] + 2 * channels * pixels[level] + 4 * channels
    exact = Saved().measure(made, BRIEF)["saved_mib"] * 2**20
    loss = 2 * 2 * pixels[0] * 4  # log-softmax and its exponential, two classes, and what Dice keeps
    assert 4 * saved <= exact <= 4 * saved + 4 * loss
    assert Saved().measure(made, BRIEF)["saved_mib"] * 2**20 == exact, "no statistics"


def test_recomputed_activations_are_saved_no_more() -> None:
    kept, recomputed = (
        Saved().measure(subject(task="train", activations=one), BRIEF)["saved_mib"] for one in ("kept", "recomputed")
    )
    assert recomputed < kept / 3


def test_saved_memory_grows_with_the_batch_and_no_parameter_is_in_it() -> None:
    one, two = (Saved().measure(subject(task="train", batch=batch), BRIEF)["saved_mib"] for batch in (1, 2))
    # Only BatchNorm's numbers do not double: parameters would show.
    assert two == pytest.approx(2 * one, rel=0.01)


def test_inference_saves_nothing() -> None:
    assert Saved().measure(subject(), BRIEF) == {}


def test_the_stages_are_the_blocks_and_their_work_is_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.engine.stages.SECONDS", 0.1)
    made = subject()
    stages = Stages().measure(made, Settings(stages=True)).stages
    assert [stage.name for stage in stages] == ["inc", "down1", "down2", "up1", "up2", "outc"]
    assert all(stage.ms > 0 for stage in stages)
    whole = Work().measure(made, BRIEF)
    assert sum(stage.gflop for stage in stages) == pytest.approx(whole["gflop"])
    assert sum(stage.gbyte for stage in stages) == pytest.approx(whole["gbyte"])
    assert not made.call._forward_hooks, "the network is left as it was"  # type: ignore[attr-defined]


def test_stages_are_timed_where_asked_for_alone() -> None:
    assert Stages().measure(subject(), BRIEF).stages == ()
    assert Stages().measure(subject(task="train"), Settings(stages=True)).stages == ()


def test_a_cold_cache_costs_the_layer_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared = []
    made = subject(task="layer", cache="cold")
    monkeypatch.setattr("bench.engine.latency._flush", lambda _: lambda: cleared.append(made))
    found = Latency().measure(made, BRIEF)
    # Once before every step, warm-up and timed alike, and not inside what is timed.
    assert len(cleared) == found["samples"] + found["warmup_steps"]


def test_a_cold_case_really_writes_more_than_a_cache_holds() -> None:
    from bench.engine.latency import FLUSHED_MIB, _flush

    assert _flush(subject(task="layer", cache="cold"))().numel() == FLUSHED_MIB * 2**20  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("threads", "others", "wall_per_cpu", "expected"),
    [
        (1, 0.0, 1.09, False),
        (1, 0.0, 1.11, True),
        (2, 0.0, 9.0, False),  # threads that wait for each other use no core
        (2, 2.05, 1.0, False),  # of four cores
        (2, 2.15, 1.0, True),
        (9, 0.05, 1.0, False),  # more threads than cores are the case's own doing
        (9, 0.15, 1.0, True),
    ],
)
def test_a_case_is_disturbed_when_others_want_its_cores(
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    others: float,
    wall_per_cpu: float,
    expected: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 4)
    made = subject()
    torch.set_num_threads(threads)
    assert _disturbed(made, others, wall_per_cpu) == expected


def test_a_step_that_waits_for_a_core_and_who_else_computes_are_seen() -> None:
    made = subject()
    network = made.call

    def slow(*images: torch.Tensor) -> Any:  # noqa: ANN401
        time.sleep(0.005)
        return network(*images)

    object.__setattr__(made, "call", slow)
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        found = Latency().measure(made, msgspec.structs.replace(BRIEF, measure_s=1.0))
        busy.kill()
    assert found["wall_per_cpu"] > 1.1
    assert found["disturbed"] is True
    assert found["others_cores"] > 0.1
    assert found["wall_step_ms"] >= fmean(found.samples_ms), "with what goes on between steps"
    torch.set_num_threads(2)
    assert "wall_per_cpu" not in Latency().measure(made, BRIEF)


def test_a_sustained_case_is_timed_for_all_its_time_however_narrow_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.engine.sampling.TARGET", 10.0)  # every interval is
    brief = msgspec.structs.replace(BRIEF, sustained_s=1.0)
    patient = msgspec.structs.replace(BRIEF, measure_s=60.0)
    assert Latency().measure(subject(), patient)["stopped"] == "interval"
    found = Latency().measure(subject(regime="sustained"), brief)
    assert found["stopped"] == "time"
    assert found["samples"] * found["wall_step_ms"] >= 1000


@pytest.mark.parametrize(
    ("axes", "dice", "largest", "expected"),
    [
        ({}, 0.9, 1.0, True),
        ({}, 0.89, 0.5, False),
        ({"modification": "head"}, 1.0, 0.5, False),
        ({}, None, 0.99, True),
        ({}, None, 0.991, False),
    ],
)
def test_an_agreement_means_something_only_of_a_network_that_tells_classes_apart(
    axes: dict[str, str],
    dice: float | None,
    largest: float,
    expected: bool,  # noqa: FBT001
) -> None:
    made = subject(**axes)
    object.__setattr__(made, "fitted_dice", dice)
    assert _meaningful(made, Found(largest_class=largest)) == expected


@pytest.mark.parametrize(
    ("axes", "margin", "floor"),
    [({}, 1.5, 1e-4), ({"task": "layer"}, 1.5, 1e-4), ({"task": "train"}, 2.5, 4e-3)],
    ids=str,
)
def test_a_limit_is_a_margin_over_eager_with_a_floor(axes: dict[str, str], margin: float, floor: float) -> None:
    made = subject(**axes)
    assert _limit(made, 1.0) == margin
    assert _limit(made, 0.0) == floor


def test_eager_at_the_cases_own_precision_is_the_measure_of_fewer_bits() -> None:
    for precision, eagers in (("fp32", 0.0), ("bf16", None)):
        made = subject(precision=precision)
        found = Accuracy().measure(made, BRIEF)
        eager = eagers if eagers is not None else found["rel_l2"]
        assert found["rel_l2_limit"] == max(1e-4, 1.5 * eager)


def test_a_second_size_is_one_column_narrower_and_runs() -> None:
    made = subject(task="train")
    narrow = made.narrower()
    assert narrow.inputs[0].shape[-1] == narrow.masks.shape[-1] == 31
    found = SecondSize().measure(made, Settings(cold_start=True))
    assert found["second_size_ms"] > 0
    assert "recompiles" not in found
    assert SecondSize().measure(made, BRIEF) == {}, "only where asked for"


def test_graph_breaks_are_counted() -> None:
    torch._dynamo.reset()
    before = graph_breaks()

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch.compile(broken, backend="eager")(torch.zeros(2))
    assert graph_breaks() == before + 1
    torch._dynamo.reset()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_process_keeps_to_as_many_cores_as_it_has_threads() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        pin(Case(threads=1), 2, 0, 1)
        assert len(os.sched_getaffinity(0)) == 1
        os.sched_setaffinity(0, allowed)
        kept = []
        for rank in (0, 1):
            pin(Case(devices="2cpu", threads=1), 2, rank, 2)
            kept.append(os.sched_getaffinity(0))
            os.sched_setaffinity(0, allowed)
        assert not kept[0] & kept[1], "each rank has its own"
        pin(Case(), len(allowed), 0, 1)
        assert os.sched_getaffinity(0) == allowed, "who wants all cores keeps them"
    finally:
        os.sched_setaffinity(0, allowed)
