"""A case from its first byte of weights to its figures."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.case import Case
from bench.distributed import Group
from bench.engine.metric import Found, metrics
from bench.engine.protocol import Outcome
from bench.results import Rank, Settings, Value
from bench.subject import Subject, build

COLUMNS = {
    "load_ms": "building the network, loading its weights and preparing the inputs, ms",
    "first_call_ms": "the first step, ms; compiles where the implementation does, with an empty compiler cache",
    "first_call_warm_ms": "the same in another process that finds the compiler caches of the first (`--cold-start`)",
    "cpu_threads": "CPU threads that a process of the case had after all",
    "pinned_cores": "cores that the process kept to, where those are fewer than the machine has (CPU)",
    "cpu_capability": "instruction set that PyTorch's CPU kernels use",
    "cudnn": "version of cuDNN (GPU)",
}

# Of several processes the largest counts: the one that runs out first. Other figures are rank 0's.
MOST = ("peak_memory_mib", "peak_reserved_mib", "resident_peak_mib", "first_call_ms", "load_ms")

Announce = Callable[[str], None]


class _Clock:
    """What each phase took."""

    def __init__(self, announce: Announce) -> None:
        self.spent_s: dict[str, float] = {}
        self._announce = announce

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._announce(name)
        start = time.perf_counter()
        yield
        self.spent_s[name] = time.perf_counter() - start


def begin(case: Case, settings: Settings, group: Group, announce: Announce) -> Outcome:
    """Build the subject and take two steps, measuring nothing but the first: by the second, all memory is in use."""
    clock = _Clock(announce)
    subject, figures = _begun(case, settings, group, clock)
    with clock.phase("second call"):
        subject.step()
        subject.synchronize()
    return Outcome(status="ok", figures=figures, spent_s=clock.spent_s)


def measure(case: Case, settings: Settings, group: Group, announce: Announce) -> Outcome:
    """Build the subject, call it for the first time, and run every metric.

    Args:
        case: the case; this process is prepared for it.
        settings: how long to measure.
        group: the case's processes.
        announce: is told the phase that begins.
    """
    clock = _Clock(announce)
    subject, figures = _begun(case, settings, group, clock)
    beside = Found()
    faults: list[str] = []
    for metric in metrics():
        with clock.phase(type(metric).__name__.lower()):
            found = metric.measure(subject, settings)
        figures |= found
        beside.samples_ms = beside.samples_ms or found.samples_ms
        beside.own_samples_ms = beside.own_samples_ms or found.own_samples_ms
        beside.blocks, beside.stages = beside.blocks or found.blocks, beside.stages or found.stages
        faults += [found.fault] if found.fault else []
    figures["cpu_threads"] = torch.get_num_threads()  # an implementation may have changed it
    ranks: tuple[Rank, ...] = ()
    if group.size > 1:
        mine = Rank(rank=group.rank, node=platform.node(), figures=figures, samples_ms=beside.own_samples_ms)
        told = group.gather((mine, "; ".join(faults)))
        ranks = tuple(rank for rank, _ in told)
        faults = [f"rank {rank.rank}: {fault}" for rank, fault in told if fault]
        figures = figures | {name: most(ranks, name) for name in MOST if name in figures}
    return Outcome(
        status="inaccurate" if faults else "ok",
        reason="; ".join(faults),
        figures=figures,
        samples_ms=beside.samples_ms,
        blocks=beside.blocks,
        stages=beside.stages,
        spent_s=clock.spent_s,
        ranks=ranks,
    )


def most(ranks: Sequence[Rank], figure: str) -> float:
    """The largest value of a figure on any rank."""
    return max(float(rank.figures[figure] or 0) for rank in ranks)


def _begun(case: Case, settings: Settings, group: Group, clock: _Clock) -> tuple[Subject, dict[str, Value]]:
    figures: dict[str, Value] = {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if case.on_gpu:
        figures["cudnn"] = torch.backends.cudnn.version()
    elif len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        figures["pinned_cores"] = len(os.sched_getaffinity(0))
    with clock.phase("load"):
        subject = build(case, group, settings.weights)
        subject.synchronize()
    # Fits differ in hardly anything but this, and in this almost surely.
    if len(set(group.gather(subject.fitted_dice))) > 1:
        raise RuntimeError("machines have weights of different fits: share one $UNET_BENCH_CACHE, or copy it")
    with clock.phase("first call"):
        subject.step()
        subject.synchronize()
    figures |= {"load_ms": clock.spent_s["load"] * 1000, "first_call_ms": clock.spent_s["first call"] * 1000}
    return subject, figures
