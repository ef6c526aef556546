"""What this machine is fit for, seen without measuring: findings that a person can act on."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from bench.fitted import cache_folder
from bench.machine import Machine, usable_gpus
from bench.nvml import Watch
from bench.results import RESULTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.gpus import Gpu

Level = Literal["good", "note", "bad"]

BUSY = 0.25
"""Load a core: above it, others take time away from what is measured."""
LEAST_FREE_GIB = 2
OLDEST = {"torch": "2.11", "triton": "3.6"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing seen.

    Args:
        level: `good`, `note` (results hold, with this in mind) or `bad` (what is measured here cannot be trusted).
        what: what was seen.
        advice: what to do; empty where there is nothing to do.
    """

    level: Level
    what: str
    advice: str = ""


def findings(machine: Machine, load_average: float) -> Iterator[Finding]:
    """Everything that can be seen without measuring.

    Args:
        machine: this machine.
        load_average: runnable processes over the last minute.
    """
    yield from _versions(machine)
    if usable_gpus(machine):
        for gpu in usable_gpus(machine):
            yield from _gpu(gpu)
    elif machine.gpus:
        yield Finding(
            level="bad",
            what=f"{machine.gpus[0].name} is here, but torch {machine.torch_version} is built without CUDA",
            advice="install the CUDA build of torch",
        )
    else:
        yield Finding(level="note", what="no CUDA device: cases on a GPU and the Triton kernels are `unsupported` here")
    yield from _cpu(machine, load_average)
    yield from _disks()


def _versions(machine: Machine) -> Iterator[Finding]:
    for name, oldest in OLDEST.items():
        version = machine.torch_version if name == "torch" else machine.triton_version
        if version is None:
            yield Finding(level="bad", what=f"{name} is not installed", advice=f"install {name} {oldest} or newer")
        elif _numbers(version) < _numbers(oldest):
            yield Finding(level="bad", what=f"{name} {version} was never tried", advice=f"install {oldest} or newer")
        else:
            yield Finding(level="good", what=f"{name} {version}")
    for missing, found, who in (
        (machine.cxx_missing, machine.cxx, "torch.compile on a CPU"),
        (machine.cc_missing, machine.cc, "Triton's launchers"),
    ):
        if found is None:
            yield Finding(level="note", what=missing, advice=f"install it: {who} needs it")
        else:
            yield Finding(level="good", what=f"{found}, for {who}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts[:2] if part.isdigit())


def _gpu(gpu: Gpu) -> Iterator[Finding]:
    seen = Watch(gpu.uuid)
    yield Finding(level="good", what=f"{gpu.name}, driver {gpu.driver}")
    if seen.is_part():
        yield Finding(
            level="note",
            what=f"{gpu.name} is an instance of a divided GPU (MIG): neighbours share its power and its caches",
            advice="compare with runs on the same kind of instance alone; there is no energy of its own",
        )
    in_force, default = seen.power_w()
    if in_force is not None and default is not None and in_force < default:
        yield Finding(
            level="note",
            what=f"power is capped at {in_force:.0f} W, the board came with {default:.0f} W",
            advice="tell the cap with the results, or lift it: nvidia-smi -pl",
        )
    if seen.is_persistent() is False:
        yield Finding(
            level="note",
            what="the driver is unloaded between processes",
            advice="nvidia-smi -pm 1: cold starts are longer than they need be",
        )
    if held := seen.throttled_by():
        yield Finding(
            level="bad",
            what=f"the clock is held down while nothing of ours runs: {', '.join(held)}",
            advice="look after cooling and power supply first",
        )
    elif "applications_clocks_setting" not in seen.slowed_by():
        yield Finding(
            level="note",
            what=f"clocks are free, up to {gpu.most_sm_mhz} MHz: they follow heat and load",
            advice="nvidia-smi -lgc locks them; the gate then compares times instead of cycles",
        )
    if others := seen.foreign():
        yield Finding(
            level="bad",
            what=f"other processes on the GPU: {', '.join(map(str, others))}",
            advice="end them, or choose another GPU by CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding(level="good", what="nobody else on the GPU")


def _cpu(machine: Machine, load_average: float) -> Iterator[Finding]:
    yield Finding(level="good", what=f"{machine.cpu}, {machine.cores} cores, {machine.memory_mib / 1024:.0f} GiB")
    share = load_average / (os.cpu_count() or 1)
    if share > BUSY:
        yield Finding(
            level="bad",
            what=f"the machine is busy: {load_average:.1f} processes want {os.cpu_count()} cores",
            advice="wait for an idle one; results say `disturbed` otherwise",
        )
    else:
        yield Finding(level="good", what=f"the machine is idle: load {load_average:.1f}")
    seen = os.cpu_count() or machine.cores
    if machine.cores < seen:
        yield Finding(
            level="note",
            what=f"{machine.cores} of {seen} cores are ours (affinity or a cgroup's quota)",
            advice="a quota stops all threads together for the rest of its period: prefer whole cores (cpuset)",
        )
    if machine.cpu_half is not None and "bf16" not in machine.cpu_half:
        yield Finding(
            level="note",
            what="this CPU's convolutions multiply no bf16 (no AVX-512): such cases are `unsupported` here",
            advice="on a CPU of another generation they are measured; compare no run of this one with it",
        )
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file() and (name := governor.read_text(encoding="ascii").strip()) != "performance":
        yield Finding(
            level="note",
            what=f"the CPU's clock is governed by `{name}`",
            advice="cpupower frequency-set -g performance",
        )


def _disks() -> Iterator[Finding]:
    places = {"results": RESULTS, "temporary files": Path(tempfile.gettempdir()), "fitted weights": cache_folder()}
    for name, folder in places.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**30
        if not os.access(there, os.W_OK):
            yield Finding(level="bad", what=f"no {name} can be written to {folder}", advice="make it writable")
        elif free < LEAST_FREE_GIB:
            yield Finding(level="bad", what=f"{free:.1f} GiB left for {name} in {folder}", advice="make room")
        else:
            yield Finding(level="good", what=f"{free:.0f} GiB for {name}")
