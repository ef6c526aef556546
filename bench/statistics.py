"""What raw samples say, and what they are too few to say."""

import functools
from collections.abc import Sequence

CONFIDENCE = 0.95
SETTLED = 20
ALIKE = 0.1
DRIFT = 0.01
TREND = 0.01
# A percentile is given only with this many samples behind it: p99 of 50 samples would be their maximum.
ENOUGH = {10: 20, 50: 1, 90: 20, 99: 200}


def summary(samples_ms: Sequence[float], images: int) -> dict[str, float | int | str | bool | None]:
    """Percentiles of step durations with 95 % intervals, and throughput from the same samples.

    Args:
        samples_ms: durations of steps, in the order they ran.
        images: images a step.

    Returns:
        `samples`, `images_per_s` = images · samples / total time, and for each percentile with enough samples `pNN_ms`;
        `pNN_low_ms` and `pNN_high_ms` where the samples suffice for an interval too: that of order statistics (exact
        binomial, no assumption on the distribution; it does assume that steps are independent of each other).
    """
    import numpy as np
    from scipy.stats import quantile_test

    figures: dict[str, float | int | str | bool | None] = {
        "samples": len(samples_ms),
        "images_per_s": images * len(samples_ms) / (sum(samples_ms) / 1000),
    }
    for percentile, enough in ENOUGH.items():
        if len(samples_ms) < enough:
            continue
        figures[f"p{percentile}_ms"] = float(np.percentile(samples_ms, percentile))
        interval = quantile_test(samples_ms, p=percentile / 100).confidence_interval(CONFIDENCE)
        if np.isfinite(interval.low) and np.isfinite(interval.high):
            figures[f"p{percentile}_low_ms"] = float(interval.low)
            figures[f"p{percentile}_high_ms"] = float(interval.high)
    return figures


def half_width(samples_ms: Sequence[float], blocks: int = 10) -> float:
    """Half the 95 % interval of the mean of block medians, as a share of it; infinite with fewer than two a block.

    Blocks, since neighbouring steps resemble each other and would pretend to know more than they do.
    """
    import numpy as np

    if len(samples_ms) < 2 * blocks:
        return float("inf")
    medians = _block_medians(samples_ms, blocks)
    error = float(np.std(medians, ddof=1)) / blocks**0.5
    return float(_critical(blocks) * error / np.mean(medians))


def settled(samples_ms: Sequence[float]) -> bool:
    """Whether the noise is known: the spread of either half of at least 40 samples is within 10 % of the other's.

    The spread is the distance of the quartiles, which a few disturbed steps do not move.
    """
    import numpy as np

    if len(samples_ms) < 2 * SETTLED:
        return False
    first, second = (float(np.subtract(*np.percentile(half, [75, 25]))) for half in np.array_split(samples_ms, 2))
    return max(first, second) <= (1 + ALIKE) * min(first, second)


def drift(samples_ms: Sequence[float], blocks: int = 10) -> tuple[float, bool]:
    """How far durations moved from the first to the last sample, as a share of their median; whether that is a trend.

    The line through the medians of blocks (Theil-Sen: the median of all slopes), which single disturbed blocks do not
    tilt. A trend is more than 1 % whose ranks Kendall's test calls ordered at p < 0.01. (0, False) with fewer than two
    samples a block.
    """
    import numpy as np
    from scipy.stats import kendalltau, theilslopes

    if len(samples_ms) < 2 * blocks:
        return 0.0, False
    medians = _block_medians(samples_ms, blocks)
    moved = float(theilslopes(medians).slope * (blocks - 1) / np.median(medians))
    return moved, abs(moved) > DRIFT and float(kendalltau(range(blocks), medians).pvalue) < TREND


def _block_medians(samples_ms: Sequence[float], blocks: int) -> list[float]:
    import numpy as np

    return [float(np.median(block)) for block in np.array_split(np.asarray(samples_ms), blocks)]


@functools.cache
def _critical(blocks: int) -> float:
    """Student's t for the mean of so many blocks."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, blocks - 1))
