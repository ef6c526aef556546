"""What follows from the figures of a run, where all that it follows from is in it: nothing is measured here.

Shares of a ceiling are told against ceilings of the very run alone (`--ceilings`). Where there are none, nothing is
said: a peak from a data sheet would be that of sparse matrices, or of a clock that this device does not reach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bench.case import Case
    from bench.readings import Ceiling, Stage
    from bench.results import Record, Run

COLUMNS = {
    "mfu": "model FLOPs utilization: gflop / p50_ms, as a share of the product's rate in the run's ceilings",
    "bandwidth_share": "gbyte / p50_ms, as a share of the copy's rate in the run's ceilings (infer, layer)",
    "break_even_images": "images after which a costlier first call has paid for itself against eager: "
    "(first_call_ms − eager's) / (eager's ms an image − ms an image); absent where it never does",
    "compile_cold_ms": "first_call_ms − p50_ms: what the first call costs beyond a step, with an empty compiler cache",
    "compile_warm_ms": "first_call_warm_ms − p50_ms: the same with full compiler caches (`--cold-start`)",
}


class Place(NamedTuple):
    """Where a stage stands on the roofline.

    Args:
        stage: the stage.
        flop_per_byte: its arithmetic intensity.
        bound: `arithmetic` or `bandwidth`: which ceiling it meets first.
        share: its speed as a share of that ceiling.
    """

    stage: Stage
    flop_per_byte: float
    bound: str
    share: float


def derived(run: Run) -> Iterator[dict[str, float]]:
    """The figures of `COLUMNS` of each record of a run, in its order."""
    eager = {_counterpart(record): record for record in run.records if record.case.implementation == "eager"}
    for record in run.records:
        yield dict(_of(run, record, eager)) if record.status == "ok" else {}


def _of(run: Run, record: Record, eager: Mapping[object, Record]) -> Iterator[tuple[str, float]]:
    median_ms = record.figures.get("p50_ms")
    if not isinstance(median_ms, float) or not median_ms:
        return
    ceiling = ceiling_of(run, record)
    for figure, share, most in (
        ("gflop", "mfu", ceiling and ceiling.tflop_per_s * 1e3),
        ("gbyte", "bandwidth_share", ceiling and ceiling.gb_per_s),
    ):
        done = record.figures.get(figure)
        if most and isinstance(done, float):
            yield share, done / (median_ms / 1e3) / most
    for figure, name in {"first_call_ms": "compile_cold_ms", "first_call_warm_ms": "compile_warm_ms"}.items():
        first = record.figures.get(figure)
        if isinstance(first, float):
            yield name, max(0.0, first - median_ms)
    baseline = eager.get(_counterpart(record))
    if baseline is not None and baseline is not record and baseline.status == "ok":
        yield from _break_even(record, baseline)


def _break_even(record: Record, baseline: Record) -> Iterator[tuple[str, float]]:
    ours, theirs = ([one.figures.get(name) for name in ("first_call_ms", "images_per_s")] for one in (record, baseline))
    if not all(isinstance(number, float) and number > 0 for number in (*ours, *theirs)):
        return
    dearer = ours[0] - theirs[0]  # type: ignore[operator]  # floats, as was seen
    gained = 1000 / theirs[1] - 1000 / ours[1]  # type: ignore[operator]
    if gained > 0:
        yield "break_even_images", max(0.0, dearer / gained)


def _counterpart(record: Record) -> object:
    return msgspec.structs.replace(record.case, implementation="eager")


def ceiling_of(run: Run, record: Record) -> Ceiling | None:
    """The ceiling that a case runs under, if the run has measured it."""
    wanted = place_of(record.case, run.header.environment.machine.cores)
    return next((one for one in run.header.ceilings if (one.device, one.threads, one.precision) == wanted), None)


def place_of(case: Case, cores: int) -> tuple[str, int, str]:
    """Which ceiling counts for a case: its device, its CPU threads (0 on a GPU), and its arithmetic.

    Of autocast that is the dtype that it casts to.
    """
    threads = 0 if case.on_gpu else case.threads or max(1, cores // case.processes)
    return "gpu" if case.on_gpu else "cpu", threads, case.precision.removeprefix("amp_")


def roofline(stages: Sequence[Stage], ceiling: Ceiling) -> Iterator[Place]:
    """Each stage's intensity, the ceiling above it, and how near it comes."""
    for stage in stages:
        if not stage.gbyte or not stage.ms:
            continue
        intensity = stage.gflop / stage.gbyte
        by_bandwidth = ceiling.gb_per_s * intensity
        most = min(ceiling.tflop_per_s * 1e3, by_bandwidth)
        yield Place(
            stage=stage,
            flop_per_byte=intensity,
            bound="bandwidth" if by_bandwidth <= ceiling.tflop_per_s * 1e3 else "arithmetic",
            share=stage.gflop / (stage.ms / 1e3) / most if most else 0.0,
        )
