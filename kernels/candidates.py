"""Settings worth measuring for a problem: every tile that can run, less those the compiler already speaks against."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from kernels import convolve
from kernels.inspection import inspect, shared_limit
from kernels.problem import ITEM_BYTES, Family, Problem, Settings, common_channels
from kernels.settings import descriptors_serve, serves, settings_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.spec import Compilation

_TILES = ((8, 8), (4, 32), (8, 16), (16, 16), (8, 32))
# fp32 sums that one thread holds: more than 128 leave no registers for operands, fewer than 32 too little reuse.
_SUMS_PER_THREAD = range(32, 129)
_DESCRIPTOR_ROWS = 64  # of wgmma and tcgen05


def candidates(
    problem: Problem,
    capability: int,
    *,
    compiled: bool = True,
    kernel: str = "conv_bn_relu",
    compilation: Callable[[Problem, Settings], Compilation] = convolve.compilation,
) -> list[Settings]:
    """Settings to measure, the shipped ones first; of the two families the one that a launch would use.

    Args:
        problem: sizes and precision.
        capability: of the GPU, as 80, 89, 90.
        compiled: also compile each and drop what spills, passes the GPU's shared memory, or misses its tensor cores.
        kernel: the registry's name of what runs.
        compilation: (problem, settings) → what Triton compiles for it.
    """
    shipped = settings_for(problem, capability, kernel=kernel)
    family: Family = "tma" if descriptors_serve(problem, capability) else "pointer"
    found = dict.fromkeys([shipped, *_grid(problem, family)])
    limit = shared_limit(capability)
    fitting = [cut for cut in found if serves(cut, problem) and _operand_bytes(cut, problem) <= limit]
    if not compiled:
        return fitting
    return [cut for cut in fitting if compiles_well(problem, cut, capability, compilation)]


def compiles_well(
    problem: Problem,
    settings: Settings,
    capability: int,
    compilation: Callable[[Problem, Settings], Compilation] = convolve.compilation,
) -> bool:
    """Whether the compiler makes code without spills, within shared memory, on tensor cores (unless IEEE fp32)."""
    try:
        made = inspect(compilation(problem, settings), capability)
    except Exception:  # noqa: BLE001 - triton raises whatever its passes raise; such settings are no candidates
        return False
    on_tensor_cores = made.tensor_core > 0 or problem.precision == "fp32"
    return on_tensor_cores and made.spill_bytes == 0 and made.shared_bytes <= shared_limit(capability)


def _grid(problem: Problem, family: Family) -> list[Settings]:
    blocks = [block for block in (16, 32, 64, 128, 256) if block < 2 * problem.out_channels or block == 16]  # noqa: PLR2004
    if family == "tma":
        blocks = [block for block in blocks if block >= _DESCRIPTOR_ROWS] or [_DESCRIPTOR_ROWS]
    depths = [16, 32] if ITEM_BYTES[problem.precision] == 4 else [32, 64]  # noqa: PLR2004
    if family == "pointer":
        depths = [depth for depth in depths if common_channels(problem) % depth == 0] or [32]
    depths = [depth for depth in depths if depth < 2 * problem.in_channels] or [16 if family == "tma" else 32]
    return [
        Settings(family=family, rows=r, columns=c, out_block=o, in_block=depth, warps=warps, stages=stages)
        for (r, c), o, depth, warps, stages in itertools.product(
            _TILES, blocks, depths, (4, 8), (2, 3) if family == "pointer" else (3, 4)
        )
        if r * c * o // (32 * warps) in _SUMS_PER_THREAD and r < 2 * problem.height and c < 2 * problem.width
    ]


def _operand_bytes(settings: Settings, problem: Problem) -> int:
    # Every stage but the one in use holds both operands at least.
    per_stage = (settings.rows * settings.columns + settings.out_block) * settings.in_block
    return (settings.stages - 1) * per_stage * ITEM_BYTES[problem.precision]
