import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics import drift, half_width, settled, summary

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
    assert summary([1], 1)["p50_ms"] == 1
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


@pytest.mark.parametrize(
    ("samples", "wider", "known"), [(40, 1.0, True), (39, 1.0, False), (40, 1.09, True), (40, 1.11, False)]
)
def test_noise_is_known_from_40_samples_whose_halves_scatter_alike_within_10_percent(
    samples: int,
    wider: float,
    known: bool,  # noqa: FBT001
) -> None:
    first, second = np.linspace(10, 11, 20), np.linspace(10, 10 + wider, samples - 20)
    assert settled([*first, *second]) == known
    assert settled([*second, *first]) == known


def blocks(*medians: float) -> list[float]:
    return [median for median in medians for _ in range(2)]


@pytest.mark.parametrize(("share", "drifting"), [(0.0101, True), (0.0099, False), (-0.0101, True), (-0.0099, False)])
def test_a_trend_is_more_than_1_percent_from_the_first_block_to_the_last(share: float, drifting: bool) -> None:  # noqa: FBT001
    samples = blocks(*(10 * (1 + share * (block / 9 - 0.5)) for block in range(10)))
    assert drift(samples) == (pytest.approx(share), drifting)
    assert drift(samples[:19]) == (0.0, False), "too few to say"


@pytest.mark.parametrize(
    ("ranks", "drifting"),
    [
        ((4, 3, 2, 1, 6, 5, 8, 7, 9, 10), True),  # 8 of 45 pairs the wrong way round: p = 0.009
        ((4, 3, 2, 1, 6, 5, 8, 7, 10, 9), False),  # 9: p = 0.017
    ],
)
def test_a_trend_is_ordered_at_p_under_1_percent(ranks: tuple[int, ...], drifting: bool) -> None:  # noqa: FBT001
    moved, trend = drift(blocks(*(10 + rank for rank in ranks)))
    assert moved > 0.4
    assert trend == drifting
