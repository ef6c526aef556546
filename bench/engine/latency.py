"""How long a step takes: every duration in order, what else the machine did meanwhile, and how the clocks stood."""

import itertools
import time
from collections.abc import Callable
from statistics import median
from typing import ClassVar

import msgspec
import psutil
import torch

from bench.engine.metric import Found, Metric
from bench.engine.sampling import Take, sample, warm_up
from bench.nvml import watch
from bench.readings import Block
from bench.results import Settings
from bench.statistics import drift, summary
from bench.subject import Subject

# A process with one thread that had less of its core than this was disturbed by others.
DISTURBED = 1.1
# Cores: what a system that idles keeps busy.
OTHERS = 0.1
# Written before each step of a cold case: more than any last-level cache holds.
FLUSHED_MIB = 256


class Latency(Metric):
    """Durations of steps in order, from the caller's side of an asynchronous device: nothing is dropped or sorted."""

    order = 10
    columns: ClassVar = {
        "p10_ms": "10th percentile, ms (from 20 samples)",
        "p50_ms": "median duration of a step, ms; `_low_ms`, `_high_ms`: its 95 % interval",
        "rank_p50_ms": "of several ranks: median of a rank's own steps, ms; in `ranks` that of each",
        "p90_ms": "90th percentile, ms (from 20 samples)",
        "p99_ms": "99th percentile, ms (from 200 samples)",
        "images_per_s": "images a second: images · samples / total time of the same samples, over all devices",
        "samples": "number of timed steps",
        "warmup_steps": "steps before the first timed one, the first call not counted",
        "warmup_ended": "`agreed`: three windows within 2 %; `time`: they never did",
        "stopped": "`interval`: half of the 95 % interval of block medians under 0.5 %; `noise`: the noise is "
        "known, and too large to come there in time; `time`: time was up; `samples`: 100,000 of them",
        "wall_step_ms": "wall time a step, ms, launching and waiting included",
        "wall_per_cpu": "wall time over CPU time of the process, where it has one thread; 1.0 is undisturbed",
        "others_cores": "CPU cores that other processes of the machine kept busy meanwhile, on average",
        "disturbed": "on a CPU: wall_per_cpu above 1.1, or threads and others_cores together more than there are cores",
        "drift": "how far durations moved from the first sample to the last, as a share of the median",
        "drifting": "whether that is a trend: over 1 %, ordered by Kendall's test at p < 0.01",
        "sm_mhz": "clock of the multiprocessors, MHz, median over blocks (GPU)",
        "temperature_c": "highest temperature of the chip over blocks, °C (GPU)",
        "throttled": "what held the clock down in any block, parted by commas; empty if nothing did (GPU)",
        "throttled_share": "share of the timed steps in blocks that were held down; none of them is left out (GPU)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:
        """Warm up, then time steps until the interval is narrow, or never will be, or the time is up."""
        case, agree = subject.case, subject.group.agree
        gpu = watch(subject.device)
        blocks: list[Block] = []

        def note(steps: int) -> None:
            blocks.append(
                Block(
                    samples=steps,
                    sm_mhz=gpu.sm_mhz(),
                    temperature_c=gpu.temperature_c(),
                    throttled=gpu.throttled_by(),
                )
            )

        clock = timer_of(subject)
        own: list[float] = []

        def take(count: int) -> list[float]:
            durations = clock(count)
            own.extend(durations)
            return subject.group.slowest(durations)

        warmth = warm_up(take, settings, time.perf_counter, agree)
        sustained = case.regime == "sustained"
        if sustained:
            settings = msgspec.structs.replace(settings, measure_s=max(settings.measure_s, settings.sustained_s))
        start, cpu_start, others_start = time.perf_counter(), time.process_time(), _others_cpu_s()
        samples, stopped = sample(take, warmth.step_ms, settings, time.perf_counter, agree, note, early=not sustained)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        others = max(0.0, _others_cpu_s() - others_start) / wall

        found = Found(summary(samples, case.images))
        found |= {"warmup_steps": warmth.steps, "warmup_ended": warmth.ended, "stopped": stopped}
        found["wall_step_ms"] = wall * 1000 / len(samples)
        found["drift"], found["drifting"] = drift(samples)
        if subject.group.size == 1:  # ranks are each other's others, and wait for each other without using a core
            found["others_cores"] = others
            if subject.device.type == "cpu" and torch.get_num_threads() == 1:
                found["wall_per_cpu"] = wall / cpu
            found["disturbed"] = _disturbed(subject, others, wall / cpu)
        if subject.group.size > 1:
            own = own[-len(samples) :]
            found["rank_p50_ms"] = median(own)
            found.own_samples_ms = tuple(own)
        found.samples_ms = tuple(samples)
        if subject.device.type == "cuda":
            found.blocks = tuple(blocks)
            found |= clocks(blocks)
        return found


def clocks(blocks: list[Block]) -> Found:
    """What the blocks say together. A block that was throttled counts as every other: it is marked, not left out."""
    found = Found()
    if known := sorted(block.sm_mhz for block in blocks if block.sm_mhz is not None):
        found["sm_mhz"] = known[len(known) // 2]
    if heat := [block.temperature_c for block in blocks if block.temperature_c is not None]:
        found["temperature_c"] = max(heat)
    found["throttled"] = ",".join(sorted({reason for block in blocks for reason in block.throttled}))
    held = sum(block.samples for block in blocks if block.throttled)
    found["throttled_share"] = held / sum(block.samples for block in blocks)
    return found


def _others_cpu_s() -> float:
    """CPU seconds that everything on this machine but this process has used so far."""
    total = psutil.cpu_times()
    busy: float = sum(total) - total.idle - getattr(total, "iowait", 0.0) - getattr(total, "guest", 0.0)
    return busy - time.process_time()


def _disturbed(subject: Subject, others: float, wall_per_cpu: float) -> bool:
    if subject.device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    crowded = others > OTHERS and threads + others > (psutil.cpu_count() or threads) + OTHERS
    return crowded or (threads == 1 and wall_per_cpu > DISTURBED)


def timer_of(subject: Subject) -> Take:
    """Takes n steps and gives their durations in ms, on this rank."""
    flush = _flush(subject) if subject.case.cache == "cold" else None
    return _cuda_clock(subject, flush) if subject.device.type == "cuda" else _cpu_clock(subject, flush)


def _flush(subject: Subject) -> Callable[[], object]:
    """A function that fills the last-level cache with something else; it does not wait for the device."""
    filler = torch.empty(FLUSHED_MIB * 2**20, dtype=torch.int8, device=subject.device)
    return filler.zero_


def _cpu_clock(subject: Subject, flush: Callable[[], object] | None) -> Take:
    def take(count: int) -> list[float]:
        durations = []
        for _ in range(count):
            if flush is not None:
                flush()
            start = time.perf_counter()
            subject.step()
            durations.append((time.perf_counter() - start) * 1000)
        return durations

    return take


def _cuda_clock(subject: Subject, flush: Callable[[], object] | None) -> Take:
    return _cold_cuda_clock(subject, flush) if flush is not None else _warm_cuda_clock(subject)


def _warm_cuda_clock(subject: Subject) -> Take:
    def take(count: int) -> list[float]:
        # All steps are queued before the first wait, so that the device never idles for the sake of the clock.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        # The first of them meets an idle device and is not timed: its launch would count as its duration.
        subject.step()
        events[0].record()
        for event in events[1:]:
            subject.step()
            event.record()
        events[-1].synchronize()
        return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]

    return take


def _cold_cuda_clock(subject: Subject, flush: Callable[[], object]) -> Take:
    def take(count: int) -> list[float]:
        # Two events a step, and the clearing before the first of them; it also gives the host time to queue the step.
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for before, after in pairs:
            flush()
            before.record()
            subject.step()
            after.record()
        pairs[-1][1].synchronize()
        return [before.elapsed_time(after) for before, after in pairs]

    return take
