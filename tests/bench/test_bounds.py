"""The bounds by which a measurement is judged: wrong, disturbed, without meaning, out of memory."""

import math
from typing import Any

import psutil
import pytest
import torch

from bench import allowance
from bench.engine.accuracy import _each_rel_l2, _fault, rel_l2
from bench.engine.exchange import _digest, _rounds
from bench.engine.latency import clocks
from bench.engine.measure import most
from bench.engine.metric import Found
from bench.readings import Block
from bench.results import Rank, Settings

RIGHT = {
    "rel_l2": 1e-3,
    "rel_l2_limit": 1e-3,
    "class_agreement": 0.99,
    "statistics_rel_l2": 0.1,
    "statistics_limit": 0.1,
}


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({}, ""),
        ({"rel_l2": 1.001e-3}, "relative L2 0.001 against fp32 eager, limit 0.001"),
        ({"rel_l2": math.nan}, "relative L2 nan"),
        ({"rel_l2_limit": math.nan}, "relative L2 0.001 against fp32 eager, limit nan"),
        ({"rel_l2": math.inf, "rel_l2_limit": math.inf}, "relative L2 inf"),
        ({"class_agreement": 0.9899}, "class agreement 0.9899 with fp32 eager, limit 0.99"),
        ({"class_agreement": math.nan}, "class agreement nan"),
        ({"statistics_rel_l2": 0.11}, "BatchNorm's running statistics are 0.11 of a step's change off, limit 0.1"),
        ({"statistics_rel_l2": math.nan}, "BatchNorm's running statistics are nan"),
    ],
    ids=str,
)
def test_a_result_beyond_its_limit_or_that_is_no_number_is_a_fault(figures: dict[str, float], told: str) -> None:
    fault = _fault(Found(**{**RIGHT, **figures}))
    assert fault.startswith(told)
    assert bool(fault) == bool(told)


def test_a_distance_is_that_of_all_tensors_together_or_of_each_alike() -> None:
    large, small = torch.full((100,), 3.0), torch.ones(1)
    assert rel_l2([large * 1.1, small], [large, small]) == pytest.approx(0.1 * (900 / 901) ** 0.5, rel=1e-5)
    assert _each_rel_l2([large * 1.1, small], [large, small]) == pytest.approx(0.1 / 2**0.5, rel=1e-5)
    assert rel_l2([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert rel_l2([torch.ones(2)], [torch.zeros(2)]) == math.inf, "off nothing, by something"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("an illegal memory access; out of memory, who knows"), False),
        (ValueError("DefaultCPUAllocator: "), False),
    ],
    ids=repr,
)
def test_only_an_allocators_own_error_is_out_of_memory(error: Exception, expected: bool) -> None:  # noqa: FBT001
    assert allowance.is_out_of_memory(error) == expected


def test_a_sixteenth_of_the_free_memory_is_left_to_others() -> None:
    before = psutil.virtual_memory().available
    mib = allowance.free_mib()
    # Others take and give meanwhile.
    assert 0 < mib <= max(before, psutil.virtual_memory().available) / 2**20 * 15 / 16 + 64


def test_a_throttled_block_counts_by_its_steps_and_a_silent_one_says_nothing() -> None:
    blocks = [
        Block(samples=30, sm_mhz=1000, temperature_c=50, throttled=("sw_power_cap",)),
        Block(samples=50, sm_mhz=3000, temperature_c=70),
        Block(samples=10, sm_mhz=2000, temperature_c=60, throttled=("hw_slowdown", "sw_power_cap")),
        Block(samples=5),
        Block(samples=5),
    ]
    assert clocks(blocks) == {
        "sm_mhz": 2000,
        "temperature_c": 70,
        "throttled": "hw_slowdown,sw_power_cap",
        "throttled_share": 0.4,
    }


def test_the_rank_that_runs_out_first_counts() -> None:
    figures: list[dict[str, Any]] = [{"load_ms": 1.0}, {"load_ms": 3.0}, {"load_ms": None}]
    ranks = [Rank(rank=number, node="a", figures=one, samples_ms=()) for number, one in enumerate(figures)]
    assert most(ranks, "load_ms") == 3.0


@pytest.mark.parametrize(("round_s", "rounds"), [(0.1, 6), (0.2, 5), (10.0, 3)])
def test_what_is_measured_in_turns_has_rounds_enough_for_a_median(round_s: float, rounds: int) -> None:
    assert _rounds(round_s, Settings(measure_s=1.0)) == rounds


def test_a_digest_of_parameters_changes_with_a_bit_and_with_their_order() -> None:
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert _digest(one) == _digest(one.clone())
    assert _digest(one) != _digest(one.T.contiguous())
    off = one.clone()
    off[1, 1] = torch.nextafter(one, one + 1)[1, 1]
    assert _digest(one) != _digest(off)
