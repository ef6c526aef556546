"""Runs that nobody measured, for what a page must show of machines that are not here. Made up, and never results."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.case import Case
from bench.readings import Block, Ceiling, Stage
from bench.results import Header, Record, Run

MakeRecord = Callable[..., Record]


def record(make: MakeRecord, case: Case, speed: float, *, samples: int = 30, **figures: float | str | bool) -> Record:
    """A record that is `ok`, at so many images a second."""
    step = 1000 * case.images / speed
    known = {"p50_ms": step, "images_per_s": speed, "peak_memory_mib": 500.0 + speed, "rel_l2": 1e-3}
    known |= {"rel_l2_limit": 2e-3, "class_agreement": 0.99996, "agreement_meaningful": True, "first_call_ms": step * 9}
    made = make(case, **{**known, **figures})
    times = tuple(step * (1 + 0.01 * (number % 7)) for number in range(samples))
    return msgspec.structs.replace(made, samples_ms=times, repeat=f"python -m pytest bench --case {case.id}")


def run(header: Header, *records: Record, path: str = "") -> Run:
    env = header.environment
    name = f"results/made-up/{env.time:%Y%m%dT%H%M%SZ}_{env.commit[:7]}.jsonl"
    return Run(path=Path(path or name), header=header, records=records)


def gpus(header: Header, make: MakeRecord) -> Run:
    """Four implementations, two upsamplings, one to four devices, energy, clocks, stages, and every kind of failure."""
    records = [
        record(
            make,
            Case(implementation=name, precision=precision, upsampling=upsampling, devices="1gpu"),
            speed,
            energy_j_per_image=100 / speed,
        )
        for name, speed in (("eager", 100.0), ("compile", 160.0), ("triton", 200.0), ("triton_graph", 220.0))
        for precision in ("fp32", "amp_fp16")
        for upsampling in ("bilinear", "transposed")
    ]
    records += [record(make, Case(task="train", devices=f"{count}gpu"), 30.0 * count**0.9) for count in (1, 2, 4)]
    blocks = (Block(samples=10, sm_mhz=1700), Block(samples=20, sm_mhz=1400, throttled=("sw_power_cap",)))
    held = {"throttled": "sw_power_cap", "throttled_share": 2 / 3, "drifting": True, "drift": 0.05}
    stages = tuple(Stage(name=name, ms=1.0, gflop=20.0, gbyte=byte) for name, byte in (("inc", 0.5), ("down4", 0.01)))
    figures = {**records[0].figures, **held}
    records[0] = msgspec.structs.replace(records[0], figures=figures, blocks=blocks, stages=stages)
    records += [
        make(Case(implementation=f"failed_{status}", devices="1gpu"), status, f"made up to be {status}", rel_l2=0.5)
        for status in ("oom", "timeout", "crash", "inaccurate", "unsupported")
    ]
    ceiling = Ceiling(device="gpu", threads=0, precision="fp32", tflop_per_s=50.0, gb_per_s=1000.0)
    return run(msgspec.structs.replace(header, ceilings=(ceiling,)), *records)
