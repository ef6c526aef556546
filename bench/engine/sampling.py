"""When a process is warm, and when it has been timed enough. No clock and no device of their own: both are given.

So the rules are tested against a simulated device whose distribution is known, and no state of a clock or device makes
them run for ever.
"""

import math
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

from bench.results import Settings
from bench.statistics import half_width, settled

WARMUP_STEPS = 3
AGREEMENT = 0.02
# Steps queued between two looks at the clock: long enough to keep a GPU's queue full, short enough to stop in time.
BLOCK_S = 0.25
# Order statistics give a 95 % interval of a median from 6 samples on; slow steps may take up to PATIENCE times longer.
FEWEST = 6
PATIENCE = 2.0
TARGET = 0.005
# More would tell nothing further. It also ends what a clock that stands still never would.
MOST = 100_000
# What a duration counts as at least where the number of steps is reckoned from it, ms.
SHORTEST_MS = 1e-3

Take = Callable[[int], list[float]]
T = TypeVar("T")


class Agree(Protocol):
    """Makes of this process's decision that of all ranks: they must take the same number of steps."""

    def __call__(self, decision: T, /) -> T:
        """Give what rank 0 was called with."""


class WarmUp(NamedTuple):
    """How a process became warm: steps taken, `agreed` or `time`, and ms a step from one to the next."""

    steps: int
    ended: str
    step_ms: float


def warm_up(take: Take, settings: Settings, now: Callable[[], float], agree: Agree) -> WarmUp:
    """Step until a number of steps and a time have passed and three windows agree within 2 %, or the extra time is up.

    Args:
        take: takes a number of steps and gives their durations, ms.
        settings: `warmup_s` and `warmup_extra_s`.
        now: seconds, from any start.
        agree: makes of this process's decision that of all ranks; each has a clock of its own.
    """
    begin = now()
    windows = [median(take(1))]
    start = now()
    # By the wall too: what goes on between steps, such as clearing a cache, is not in their durations.
    first_ms = agree(max(windows[0], (start - begin) * 1000))
    window = min(_steps_in(settings.warmup_s / 3, first_ms), 1000)
    steps = 1
    while True:
        windows.append(median(take(window)))
        steps += window
        elapsed = now() - start
        last = windows[-3:]
        agreed = len(windows) > 3 and max(last) <= min(last) * (1 + AGREEMENT)  # noqa: PLR2004 (three windows)
        enough = steps >= WARMUP_STEPS and elapsed >= settings.warmup_s
        over = elapsed >= settings.warmup_s + settings.warmup_extra_s
        if agree((enough and (agreed or over)) or steps >= MOST):
            step_ms = agree(max(last[-1], elapsed * 1000 / (steps - 1)))
            return WarmUp(steps, "agreed" if agreed else "time", step_ms)


def sample(
    take: Take,
    step_ms: float,
    settings: Settings,
    now: Callable[[], float],
    agree: Agree,
    after_block: Callable[[int], None] = lambda _steps: None,
    *,
    early: bool = True,
) -> tuple[list[float], str]:
    """Time steps block by block until enough is known or the time is up.

    Args:
        take: takes a number of steps and gives their durations, ms.
        step_ms: from one step to the next, about.
        settings: `measure_s`.
        now: seconds, from any start.
        agree: makes of this process's decision that of all ranks.
        after_block: is told the steps of each block when it has ended.
        early: whether to stop before the time is up once enough is known.

    Returns:
        Every duration in the order they ran, ms, and why it ended: `interval`, `noise`, `time` or `samples`.
    """
    block = _steps_in(BLOCK_S, step_ms)
    samples: list[float] = []
    stopped = ""
    start = now()
    while not stopped:
        samples += take(block)
        after_block(block)
        stopped = agree(_stopped(samples, now() - start, settings.measure_s, early=early))
    return samples, stopped


def _steps_in(seconds: float, step_ms: float) -> int:
    """How many steps of `step_ms` so many seconds hold: at least one, however long or senseless that number is."""
    steps = seconds * 1000 / max(step_ms, SHORTEST_MS)
    return max(1, min(int(steps), MOST)) if math.isfinite(steps) else 1


def _stopped(samples_ms: list[float], elapsed_s: float, measure_s: float, *, early: bool) -> str:
    if elapsed_s >= measure_s and (len(samples_ms) >= FEWEST or elapsed_s >= PATIENCE * measure_s):
        return "time"
    if len(samples_ms) >= MOST:
        return "samples"
    if not early:
        return ""
    width = half_width(samples_ms)
    if width < TARGET:
        return "interval"
    # The interval narrows as 1 / √time at best. Where even that would miss the target and the noise is known, the
    # rest of the time buys nothing.
    hopeless = elapsed_s >= measure_s / 2 and width * (max(elapsed_s, 0.0) / measure_s) ** 0.5 > TARGET
    return "noise" if hopeless and settled(samples_ms) else ""
