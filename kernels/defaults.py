"""The settings an architecture gets where nothing was measured: chosen from what compiles without spills, not timed."""

from __future__ import annotations

import math

from kernels.problem import INTERPRETER, ITEM_BYTES, Family, Problem, Settings, common_channels

# Programs that keep every multiprocessor of a large GPU (108 to 148) nearly busy for one wave.
_ONE_WAVE = 100


def default(problem: Problem, capability: int, *, family: Family) -> Settings:
    """The architecture's default: chosen from what compiles without spills (`python -m bench resources`), not timed."""
    wide = problem.out_channels > 64  # noqa: PLR2004 - the narrow tile
    out_block = min(128 if wide else 64, _power_of_two(problem.out_channels))
    if capability == INTERPRETER:
        in_block = min(64, _power_of_two(problem.in_channels))
        # A step of the interpreter costs little more for many pixels than for few; small pictures are to cross tiles.
        larger = max(problem.height, problem.width)
        rows, columns = (8, 16) if larger <= 33 else (64, 64) if larger <= 256 else (128, 128)  # noqa: PLR2004
        return Settings(
            family=family, rows=rows, columns=columns, out_block=out_block, in_block=in_block, warps=4, stages=2
        )
    if family == "tma":
        # wgmma and tcgen05 take 64 rows at least; rows past the last channel are zeros that are not stored.
        return _descriptor_default(problem, capability, max(out_block, 64))
    return _pointer_default(problem, out_block)


def _descriptor_default(problem: Problem, capability: int, out_block: int) -> Settings:
    depth = 64 if ITEM_BYTES[problem.precision] == 2 else 32  # noqa: PLR2004 - 128 bytes, one swizzled line
    in_block = min(depth, _power_of_two(problem.in_channels))
    warps = _warps(problem, out_block)
    tiles: tuple[tuple[int, int], ...]
    if 90 <= capability < 120:  # noqa: PLR2004 - 227 KiB of shared memory
        tiles, stages = ((16, 16), (8, 16), (8, 8)), 4
    else:  # sm_120: 99 KiB, and mma.sync keeps operands in registers
        tiles, stages = ((8, 16), (8, 8)), 3
    if problem.upsample:  # four neighbours of each pixel pass through registers
        tiles = tiles[-2:]
    if problem.classes and 100 <= capability < 120:  # noqa: PLR2004 - tcgen05's sums come back to registers at once
        warps = 8
    for rows, columns in tiles:
        settings = Settings(
            family="tma", rows=rows, columns=columns, out_block=out_block, in_block=in_block, warps=warps, stages=stages
        )
        if settings.programs(problem) >= _ONE_WAVE:
            break
    return settings


def _pointer_default(problem: Problem, out_block: int) -> Settings:
    if problem.precision == "fp32":  # FMA: the accumulator and both operands sit in registers
        rows, in_block, warps, stages = 8, 16, 8, 3
        out_block = out_block if problem.classes else min(out_block, 64)
        return Settings(
            family="pointer", rows=rows, columns=8, out_block=out_block, in_block=in_block, warps=warps, stages=stages
        )
    depth = 64 if ITEM_BYTES[problem.precision] == 2 else 32  # noqa: PLR2004
    in_block = math.gcd(common_channels(problem), depth)
    if in_block < 16:  # noqa: PLR2004 - gathered: many addresses, so a smaller tile
        out_block = out_block if problem.classes else min(out_block, 64)
        return Settings(family="pointer", rows=8, columns=16, out_block=out_block, in_block=32, warps=4, stages=2)
    warps = _warps(problem, out_block)
    stages = 3 if ITEM_BYTES[problem.precision] == 2 else 2  # noqa: PLR2004
    return Settings(
        family="pointer", rows=8, columns=16, out_block=out_block, in_block=in_block, warps=warps, stages=stages
    )


def _warps(problem: Problem, out_block: int) -> int:
    return 8 if out_block == 128 or problem.upsample else 4  # noqa: PLR2004


def _power_of_two(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())
