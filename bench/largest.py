"""The largest batch or image that fits: by doubling, then bisection, each try in a process of its own."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from bench.case import Case
from bench.engine.protocol import Outcome

MOST_BATCH = 65_536
MOST_SIDE = 65_536


class Try(NamedTuple):
    """One try: the batch or the side of the square image, and how it ended."""

    number: int
    outcome: Outcome


class Largest(NamedTuple):
    """What was found.

    Args:
        number: the largest that fits; 0 if not even the smallest does.
        bounded: whether the next one up was seen to run out of memory; if not, `why` says what ended the search.
        why: empty where `bounded`.
        tries: in the order they were made.
    """

    number: int
    bounded: bool
    why: str
    tries: tuple[Try, ...]


def largest(
    case: Case,
    what: Literal["batch", "size"],
    fits: Callable[[Case], Outcome],
    tell: Callable[[Try], None] = lambda _: None,
) -> Largest:
    """Search the largest batch of a case, or its largest square image in steps of 2^depth pixels.

    More is taken to need more memory. Images for training begin at 2 · 2^depth pixels. A try that ends in anything but
    `ok` or `oom` (too slow, not supported) bounds the search from above as well, and is told.

    Args:
        case: all but the axis that is varied.
        what: that axis.
        fits: runs a case and says how it ended.
        tell: is told each try as it ends.
    """
    step = 2**case.depth if what == "size" else 1
    # BatchNorm cannot train on the one value a channel that the smallest image leaves at the bottleneck.
    start = max(2 if case.task == "train" else 1, -(-16 // step)) if what == "size" else 1
    most = (MOST_SIDE if what == "size" else MOST_BATCH) // step
    tries: list[Try] = []

    def ok(units: int) -> bool:
        number = units * step
        axes = {"size": f"{number}x{number}"} if what == "size" else {"batch": number}
        tries.append(Try(number, fits(msgspec.structs.replace(case, **axes))))
        tell(tries[-1])
        return tries[-1].outcome.status == "ok"

    good, bad = 0, start
    while bad <= most and ok(bad):
        good, bad = bad, min(bad * 2, most + 1)
    while bad - good > 1 and good:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if ok(middle) else (good, middle)
    number = good * step
    over = min((one for one in tries if one.number > number), key=lambda one: one.number, default=None)
    if over is not None and over.outcome.status == "oom":
        return Largest(number, bounded=True, why="", tries=tuple(tries))
    if over is None:
        why = f"no more than {most * step} is tried"
    else:
        why = f"{over.number}: {over.outcome.status}: {over.outcome.reason}"
    return Largest(number, bounded=False, why=why, tries=tuple(tries))
