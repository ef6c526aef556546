"""Launch settings: what the GPU measured for this problem, else for the nearest, else the architecture's default."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re

from kernels.defaults import default
from kernels.problem import INTERPRETER, ITEM_BYTES, Family, Problem, Settings, common_channels

TUNED = pathlib.Path(__file__).parent / "tuned"


@functools.lru_cache(maxsize=4096)
def settings_for(
    problem: Problem,
    capability: int,
    gpu: str | None = None,
    *,
    family: Family = "tma",
    kernel: str = "conv_bn_relu",
) -> Settings:
    """Settings for `problem`: measured exactly, measured nearest, or the architecture's default.

    Args:
        problem: sizes and precision.
        capability: compute capability as 80, 89, 90, 100, 120; `INTERPRETER` without a GPU.
        gpu: the device's name, which names its file under `tuned/`; None looks at defaults only.
        family: "pointer" where the tensors at hand can't be read by descriptors.
        kernel: the registry's name of what runs; each is measured by itself.
    """
    if family == "tma" and not descriptors_serve(problem, capability):
        family = "pointer"
    usable = {
        known: settings
        for known, settings in measured(gpu, kernel).items()
        if (known.precision, known.fused) == (problem.precision, problem.fused)
        and settings.family == family
        and _fits(settings, problem)
    }
    if problem in usable:
        return usable[problem]
    near = min(usable, key=lambda known: distance(known, problem), default=None)
    # Beyond a factor of two in each of three sizes together, another problem's answer says little about this one.
    if near is not None and distance(near, problem) <= 3.0:  # noqa: PLR2004
        return usable[near]
    return default(problem, capability, family=family)


def descriptors_serve(problem: Problem, capability: int) -> bool:
    """Whether TMA descriptors can read and write such tensors: 16-byte strides, sm_90 or newer, not IEEE fp32.

    IEEE fp32 has no tensor cores, so its operands pass through registers and descriptors bring nothing.
    """
    per_row = 16 // ITEM_BYTES[problem.precision]
    channels = (problem.first_channels, problem.second_channels, problem.out_channels)
    aligned = all(number % per_row == 0 for number in channels)
    return aligned and problem.precision != "fp32" and (capability >= 90 or capability == INTERPRETER)  # noqa: PLR2004


def distance(one: Problem, other: Problem) -> float:
    """Sum of |log2| ratios of pixels, input channels and output channels."""

    def octaves(a: int, b: int) -> float:
        return abs(math.log2(max(a, 1) / max(b, 1)))

    pixels = octaves(one.batch * one.height * one.width, other.batch * other.height * other.width)
    channels = octaves(one.in_channels, other.in_channels) + octaves(one.out_channels, other.out_channels)
    return pixels + channels


def serves(settings: Settings, problem: Problem) -> bool:
    """Whether a program of these settings holds what the epilogues need: whole windows, every channel of a pixel."""
    whole_windows = settings.rows % 2 == 0 and settings.columns % 2 == 0
    return (whole_windows or not problem.pool) and (settings.out_block >= problem.out_channels or not problem.classes)


def _fits(settings: Settings, problem: Problem) -> bool:
    # Where in_block does not divide the channels the pointer family gathers: another loop, with settings of its own.
    stepped = common_channels(problem) % settings.in_block == 0 or problem.in_channels < 16  # noqa: PLR2004
    return serves(settings, problem) and (settings.family == "tma" or stepped)


@functools.cache
def measured(gpu: str | None, kernel: str) -> dict[Problem, Settings]:
    """Settings measured on a GPU of this name for the kernel; none where there is no GPU or no file.

    Raises:
        ValueError: the file is not what `kernels.tune` writes.
    """
    return {} if gpu is None else load(file_for(gpu), kernel)


def file_for(gpu: str) -> pathlib.Path:
    """Where the settings measured on a GPU of this name are: `NVIDIA H200` → `tuned/nvidia_h200.json`."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json")


def forget() -> None:
    """Read the files under `tuned/` again at the next launch (after tuning)."""
    settings_for.cache_clear()
    measured.cache_clear()


def load(path: pathlib.Path, kernel: str = "conv_bn_relu") -> dict[Problem, Settings]:
    """Measured settings of one kernel from one file; none where there is no file.

    Raises:
        ValueError: the file is not what `kernels.tune` writes.
    """
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["rows"]
        mine = [row for row in rows if row["kernel"] == kernel and row["settings"] is not None]
        return {Problem(**row["problem"]): Settings(**row["settings"]) for row in mine}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} holds no launch settings ({error}); delete it and tune again") from error
