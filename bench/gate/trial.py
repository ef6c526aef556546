"""One trial: both sides built in a drawn order, then pairs of steps whose order is drawn too.

With a fixed order of building, 16 to 22 % of gates on identical code were false alarms.
"""

import random
import time
from pathlib import Path
from typing import Literal

from bench.gate import knobs
from bench.gate.protocol import Answer, Ask
from bench.gate.sides import Clocked, Local, MissingError, Remote, Side
from bench.gate.versions import UnshareableError, Version

# More pairs than these in a trial buy nothing: the process is the sample.
PAIRS = 20
FEWEST_PAIRS = 5
LONGEST_S = 15.0
# Steps of a pair's half last as long together: some slices of a scheduler that others keep busy. On two cores with a
# load of 11, trials of a short step scattered by 11 % with 8 ms, by 6 % with 25 ms, by 7 % with 60 ms (seven each).
HALF_MS = 25.0
WARMUP_S = 0.5
WARMUP_STEPS = 3

NAMES = ("base", "head")
Pair = tuple[Clocked, Clocked]


class SideError(Exception):
    """What one side's code raised. `side` is its name, `status` that of the answer."""

    def __init__(self, side: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}" if type(error) is not RuntimeError else str(error))
        self.side = side
        self.status: Literal["missing", "unsupported", "broken"] = "broken"
        if isinstance(error, MissingError):
            self.status = "missing"
        elif type(error).__name__ == "UnsupportedError":  # the version's own class
            self.status = "unsupported"


def trial(ask: Ask) -> Answer:
    """Time base and head.

    Raises:
        SideError: one of them failed.
        UnshareableError: they cannot be in one process, and that was asked for.
    """
    draw = random.Random(ask.seed)  # noqa: S311 (no secret)
    roots = [Path(root) for root in ask.roots]
    sides: list[Side]
    if ask.together:
        # The same folder twice, in an A/A row, is imported twice like any other two.
        sides = [
            Local(Version(root, name, ask.load), ask.case, ask.cores) for root, name in zip(roots, NAMES, strict=True)
        ]
    else:
        sides = [Remote(root, ask.case, ask.cores, ask.load) for root in roots]
    try:
        _build(sides, draw, together=ask.together)
        steps = _warm_up(sides, draw)
        start, cpu_start = time.perf_counter(), time.process_time()
        pairs = _pairs(sides, steps, draw)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    finally:
        for side in sides:
            side.close()
    clocks = tuple((base[1], head[1]) for base, head in pairs)
    return Answer(
        status="ok",
        base_ms=tuple(base[0] for base, _ in pairs),
        head_ms=tuple(head[0] for _, head in pairs),
        clock_mhz=clocks if all(base and head for base, head in clocks) else (),
        wall_per_cpu=wall / cpu if ask.together and cpu else None,
    )


def _build(sides: list[Side], draw: random.Random, *, together: bool) -> None:
    before = knobs.read()
    found = []
    for number in draw.sample((0, 1), 2):
        knobs.restore(before)
        try:
            sides[number].build()
        except UnshareableError:
            raise
        except Exception as error:
            raise SideError(NAMES[number], error) from error
        found.append(knobs.read())
    if together and (names := knobs.differing(*found)):
        raise UnshareableError(f"they set {names} differently")


def _warm_up(sides: list[Side], draw: random.Random) -> int:
    """Steps of a pair's half."""
    start, number, last = time.perf_counter(), 0, HALF_MS
    while number < WARMUP_STEPS or time.perf_counter() - start < WARMUP_S:
        base, head = _both(sides, 1, draw)
        last, number = min(base[0], head[0]), number + 1
    return max(1, min(1000, round(HALF_MS / max(last, 1e-3))))


def _pairs(sides: list[Side], steps: int, draw: random.Random) -> list[Pair]:
    start = time.perf_counter()
    pairs: list[Pair] = []
    while len(pairs) < PAIRS:
        pairs.append(_both(sides, steps, draw))
        if len(pairs) >= FEWEST_PAIRS and time.perf_counter() - start > LONGEST_S:
            break
    return pairs


def _both(sides: list[Side], steps: int, draw: random.Random) -> Pair:
    found = {}
    for number in draw.sample((0, 1), 2):
        try:
            found[number] = sides[number].take(steps)
        except Exception as error:
            raise SideError(NAMES[number], error) from error
    return found[0], found[1]
