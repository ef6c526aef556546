import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics import half_width, summary

durations = st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=400)


@given(durations)
def test_percentiles_are_monotone(samples: list[float]) -> None:
    figures = summary(samples, 1)
    shown = [figures[name] for name in ("p10_ms", "p50_ms", "p90_ms", "p99_ms") if name in figures]
    assert shown == sorted(shown)


@given(durations, st.integers(1, 64))
def test_throughput_is_images_over_the_time_of_the_same_samples(samples: list[float], images: int) -> None:
    figures = summary(samples, images)
    assert figures["images_per_s"] == pytest.approx(images * len(samples) / (math.fsum(samples) / 1000))


@pytest.mark.parametrize(("percentile", "enough"), [(10, 20), (90, 20), (99, 200)])
def test_a_percentile_is_given_only_with_enough_samples_behind_it(percentile: int, enough: int) -> None:
    assert f"p{percentile}_ms" not in summary([1.0] * (enough - 1), 1)
    assert f"p{percentile}_ms" in summary([1.0] * enough, 1)


def test_the_median_has_an_interval_from_six_samples_on() -> None:
    assert "p50_low_ms" not in summary([1, 2, 3, 4, 5], 1)
    assert summary([1, 2, 3, 4, 5, 6], 1)["p50_low_ms"] == 1
    assert summary([1, 2, 3, 4, 5, 6], 1)["p50_high_ms"] == 6


@given(durations)
def test_an_interval_holds_its_percentile(samples: list[float]) -> None:
    figures = summary(samples, 1)
    for percentile in (10, 50, 90, 99):
        if f"p{percentile}_low_ms" in figures:
            low, at, high = (figures[f"p{percentile}_{end}"] for end in ("low_ms", "ms", "high_ms"))
            assert low <= at <= high


@pytest.mark.slow
def test_the_interval_of_the_median_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    # Skewed, as durations are: median of a log-normal is 1.
    covered = 0
    for _ in range(1000):
        figures = summary(rng.lognormal(0.0, 0.3, 25).tolist(), 1)
        covered += figures["p50_low_ms"] <= 1.0 <= figures["p50_high_ms"]
    assert covered >= 930


def test_fewer_than_two_samples_a_block_say_nothing_about_noise() -> None:
    assert half_width([1.0] * 19) == float("inf")
    assert half_width([1.0] * 20) == 0.0


def test_half_width_is_that_of_a_t_interval_of_block_medians() -> None:
    samples = [10.0 + block for block in range(10) for _ in range(3)]
    mean, deviation = 14.5, np.std(range(10), ddof=1)
    assert half_width(samples) == pytest.approx(2.262157 * deviation / math.sqrt(10) / mean, rel=1e-6)
