"""The rules of warming up and stopping, on a simulated device whose durations and clock are known."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.distributed import Group
from bench.engine import sampling
from bench.engine.sampling import Agree, T, _stopped, sample, warm_up
from bench.results import Settings
from bench.statistics import drift, summary

ALONE = Group().agree
SHORT = Settings(measure_s=1.0, warmup_s=0.1, warmup_extra_s=0.2)


class Simulated:
    """A device whose steps take what it is told, on a clock that nothing else moves, and that began long ago."""

    def __init__(self, durations_ms: Iterator[float], tick: Callable[[float], float] = lambda ms: ms / 1000) -> None:
        self.durations_ms, self.tick = durations_ms, tick
        self.time_s, self.steps = 0.0, 0

    def take(self, count: int) -> list[float]:
        durations = list(itertools.islice(self.durations_ms, count))
        self.steps += count
        self.time_s += sum(map(self.tick, durations))
        return durations

    def now(self) -> float:
        return 1000 + self.time_s

    def sample(
        self, settings: Settings = SHORT, step_ms: float = 10.0, *, early: bool = True
    ) -> tuple[list[float], str]:
        return sample(self.take, step_ms, settings, self.now, ALONE, early=early)


def endless(rng: np.random.Generator, draw: Callable[[np.random.Generator, int], np.ndarray]) -> Iterator[float]:
    while True:
        yield from draw(rng, 256).tolist()


@pytest.mark.slow
def test_the_interval_covers_the_true_median_in_93_of_100_of_4000_runs() -> None:
    rng = np.random.default_rng(7)
    covered = ended = 0
    for _ in range(4000):
        # Log-normal around a median of 10 ms, as skewed as durations on a shared machine; the stop rule chooses when.
        device = Simulated(endless(rng, lambda one, count: 10 * one.lognormal(0.0, 0.1, count)))
        samples, stopped = device.sample()
        figures = summary(samples, 1)
        covered += figures["p50_low_ms"] <= 10 <= figures["p50_high_ms"]
        ended += stopped in {"interval", "noise", "time"}
    assert ended == 4000
    assert covered / 4000 >= 0.93


@pytest.mark.parametrize("per_step", [0.001, -0.001, 0.01])
def test_drift_is_flagged(per_step: float) -> None:
    rng = np.random.default_rng(1)
    durations = (10 * (1 + per_step * step) * rng.lognormal(0, 0.01) for step in itertools.count())
    samples, _ = Simulated(durations).sample(early=False)
    moved, drifting = drift(samples)
    assert drifting
    assert math.copysign(1, moved) == math.copysign(1, per_step)


def test_a_device_that_stands_still_is_seldom_said_to_drift() -> None:
    rng = np.random.default_rng(2)
    flagged = sum(drift((10 * rng.lognormal(0, 0.05, 100)).tolist())[1] for _ in range(300))
    assert flagged <= 9


@pytest.mark.slow
@given(
    durations=st.lists(
        st.one_of(st.just(0.0), st.floats(1e-9, 1e9), st.just(math.inf), st.just(math.nan)), min_size=1, max_size=20
    ),
    tick=st.sampled_from([0.0, 1e-3, 1.0, 1e6]),
    early=st.booleans(),
)
def test_the_stop_rule_never_loops_for_ever(durations: list[float], tick: float, early: bool) -> None:  # noqa: FBT001
    # A clock that stands still, durations of nothing, of hours, of nonsense: `tick` is what the clock makes of any.
    device = Simulated(itertools.cycle(durations), lambda _: tick)
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(sampling, "MOST", 1000)
        samples, stopped = device.sample(step_ms=durations[0], early=early)
    assert stopped in {"interval", "noise", "time", "samples"}
    assert len(samples) <= 2000


def test_a_clock_that_stands_still_ends_at_a_number_of_samples() -> None:
    rng = np.random.default_rng(3)
    device = Simulated(endless(rng, lambda one, count: one.lognormal(0, 3, count)), lambda _: 0.0)
    samples, stopped = device.sample(early=False)
    assert stopped == "samples"
    assert 100_000 <= len(samples) < 100_000 + 26


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_clock_that_jumps_ends_the_sampling_and_spoils_no_median(jump_s: float) -> None:
    jumped = False

    def tick(ms: float) -> float:
        nonlocal jumped
        first, jumped = not jumped, True
        return jump_s if first else ms / 1000

    samples, stopped = Simulated(itertools.repeat(10.0), tick).sample(early=False, step_ms=1.0)
    assert stopped in {"time", "samples"}
    assert summary(samples, 1)["p50_ms"] == 10.0


def test_a_narrow_interval_ends_early_and_the_reason_is_told() -> None:
    device = Simulated(itertools.repeat(10.0))
    _, stopped = device.sample()
    assert stopped == "interval"
    assert device.time_s < 0.6


def test_noise_that_is_known_and_too_large_ends_early() -> None:
    rng = np.random.default_rng(4)
    device = Simulated(endless(rng, lambda one, count: 10 * one.lognormal(0, 0.5, count)))
    samples, stopped = device.sample(Settings(measure_s=10.0))
    assert stopped == "noise"
    assert 4 < device.time_s < 8
    assert len(samples) > 300


def test_time_is_up_however_noisy_and_slow_steps_get_six_samples() -> None:
    device = Simulated(itertools.cycle([900.0, 400.0, 500.0]))
    samples, stopped = device.sample(SHORT, 600.0)
    assert stopped == "time"
    # Twice the time is the most that six samples are waited for.
    assert 1.0 <= device.time_s < 2.9
    assert len(samples) < 6


@pytest.mark.parametrize(("step_ms", "count"), [(200.0, 10), (600.0, 6), (800.0, 5), (6000.0, 1)])
def test_time_is_up_with_six_samples_or_after_twice_the_time(step_ms: float, count: int) -> None:
    samples, stopped = Simulated(itertools.repeat(step_ms)).sample(Settings(measure_s=2.0), step_ms)
    assert (len(samples), stopped) == (count, "time")


@pytest.mark.parametrize(
    ("apart", "of_the_time", "expected"),
    [
        (0.0066, 0.1, "interval"),  # half the interval is 0.754 times this: 0.498 %
        (0.0067, 0.1, ""),
        (0.01, 0.49, ""),  # too early to say
        (0.009, 0.5, ""),  # will be under 0.5 % in time, as 1 / √time
        (0.01, 0.5, "noise"),
    ],
)
def test_half_an_interval_of_half_a_percent_is_enough_and_what_cannot_come_there_is_noise(
    apart: float, of_the_time: float, expected: str
) -> None:
    samples = [10 * (1 + sign * apart) for sign in (1, -1) * 5 for _ in range(4)]
    assert _stopped(samples, of_the_time, 1.0, early=True) == expected
    assert _stopped(samples, of_the_time, 1.0, early=False) == ""


def test_after_each_block_its_steps_are_told() -> None:
    device = Simulated(itertools.repeat(10.0))
    told: list[int] = []

    def after_block(steps: int) -> None:
        told.append(steps)
        assert sum(told) == device.steps

    samples, _ = sample(device.take, 10.0, SHORT, device.now, ALONE, after_block, early=False)
    assert len(told) > 1
    assert sum(told) == len(samples)


def test_a_sustained_case_takes_all_its_time() -> None:
    device = Simulated(itertools.repeat(10.0))
    _, stopped = device.sample(Settings(measure_s=30.0), early=False)
    assert stopped == "time"
    assert device.time_s >= 30


def test_every_sample_is_kept_in_the_order_it_ran() -> None:
    durations = np.random.default_rng(5).lognormal(2, 1, 10_000).tolist()
    samples, _ = Simulated(iter(durations)).sample(early=False)
    assert samples == durations[: len(samples)]


def test_warm_up_runs_before_anything_is_timed() -> None:
    # 40 steps, each faster than the last, as while clocks rise; afterwards each takes 10 ms.
    device = Simulated(itertools.chain([50.0 - step for step in range(40)], itertools.repeat(10.0)))
    warmth = warm_up(device.take, Settings(warmup_s=0.5, warmup_extra_s=5.0), device.now, ALONE)
    assert warmth.steps == device.steps >= 40
    assert warmth.ended == "agreed"
    samples, _ = sample(device.take, warmth.step_ms, SHORT, device.now, ALONE)
    assert set(samples) == {10.0}


@pytest.mark.parametrize(("apart", "ended"), [(0.019, "agreed"), (0.021, "time")])
def test_a_process_is_warm_when_three_windows_agree_within_2_percent(apart: float, ended: str) -> None:
    levels = itertools.cycle([10.0, 10.0 * (1 + apart)])
    device = Simulated(itertools.repeat(10.0))
    warmth = warm_up(lambda count: [next(levels)] * len(device.take(count)), SHORT, device.now, ALONE)
    assert warmth.ended == ended


def test_slow_steps_are_warmed_up_by_three_of_them_and_the_first_call_is_no_window() -> None:
    slow = Settings(warmup_s=0.1, warmup_extra_s=100.0)
    for settings, expected in ((SHORT, (3, "time")), (slow, (4, "agreed"))):
        device = Simulated(itertools.repeat(1000.0))
        assert warm_up(device.take, settings, device.now, ALONE)[:2] == expected


def test_steps_that_agree_at_once_are_still_taken_for_the_time_of_the_warm_up() -> None:
    # The first call compiles, so that a window is thought to hold one step.
    device = Simulated(itertools.chain([5000.0], itertools.repeat(10.0)))
    assert warm_up(device.take, SHORT, device.now, ALONE).ended == "agreed"
    assert 5.09 <= device.time_s < 5.3


def test_a_few_disturbed_steps_keep_no_process_from_being_warm() -> None:
    outliers = itertools.cycle([20.0, 40.0])
    device = Simulated(itertools.repeat(10.0))

    def take(count: int) -> list[float]:
        durations = device.take(count)
        return durations if count == 1 else [*durations[1:], next(outliers)]

    assert warm_up(take, SHORT, device.now, ALONE).ended == "agreed"


def test_a_window_is_a_third_of_the_warm_up_by_the_wall_and_the_last_three_count() -> None:
    # As where a cache is cleared: of 125 ms from step to step, what is timed is 1 ms, once the clocks have risen.
    levels, counts = itertools.chain([9.0, 3.0, 2.0], itertools.repeat(1.0)), []
    device = Simulated(itertools.repeat(1.0), lambda _: 0.125)

    def take(count: int) -> list[float]:
        counts.append(len(device.take(count)))
        return [next(levels)] * count

    warmth = warm_up(take, Settings(warmup_s=3.75, warmup_extra_s=9.0), device.now, ALONE)
    assert counts == [1, 10, 10, 10, 10, 10]
    assert (warmth.steps, warmth.ended, warmth.step_ms) == (51, "agreed", pytest.approx(125))


def test_a_device_that_never_settles_is_warmed_up_for_a_bounded_time() -> None:
    growing = (10 * 1.05**step for step in itertools.count())
    device = Simulated(growing)
    warmth = warm_up(device.take, Settings(warmup_s=0.5, warmup_extra_s=1.0), device.now, ALONE)
    assert warmth.ended == "time"
    assert device.time_s < 10


@pytest.mark.parametrize("durations", [[0.0], [math.inf], [math.nan], [1e-9]])
def test_warm_up_never_loops_for_ever(durations: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST", 5000)
    device = Simulated(itertools.cycle(durations), lambda _: 0.0)
    assert warm_up(device.take, SHORT, device.now, ALONE).steps <= 10_001


def test_ranks_stop_when_rank_0_does() -> None:
    device = Simulated(itertools.repeat(10.0))
    decisions = iter([False, False, True])
    samples, _ = sample(device.take, 10.0, SHORT, device.now, lambda _: next(decisions))
    assert len(samples) == 75


def test_ranks_take_the_same_steps_though_their_clocks_differ() -> None:
    """What rank 0 decides is replayed to rank 1, whose steps are as long and whose clock runs three times as fast."""
    told: list[object] = []

    def counted(tick: Callable[[float], float], agree: Agree) -> list[int]:
        noise = np.random.default_rng(1)
        device, counts = Simulated(endless(noise, lambda one, count: one.uniform(5, 15, count)), tick), []

        def take(count: int) -> list[float]:
            counts.append(count)
            return device.take(count)

        warmth = warm_up(take, SHORT, device.now, agree)
        sample(take, warmth.step_ms, SHORT, device.now, agree, early=False)
        return counts

    def first(decision: T) -> T:
        told.append(decision)
        return decision

    expected = counted(lambda ms: ms / 1000, first)
    heard = iter(told)
    assert counted(lambda ms: 3 * ms / 1000, lambda _: next(heard)) == expected
