"""What one launch computes, and how it is cut: the two things every other file here speaks of."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

INTERPRETER = 0  # in place of a compute capability

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
Family = Literal["tma", "pointer"]
ITEM_BYTES: dict[Precision, int] = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One convolution: sizes of its input in pixels and channels, what is fused with it, the arithmetic's precision.

    Of the `in_channels`, the last `second_channels` are read from a second tensor; with `upsample` that one has half
    the size and is interpolated as it is read. With `pool` the maxima of 2×2 pixels are written as well; with `classes`
    not the features are written but the logits that a 1×1 convolution makes of them.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    precision: Precision
    second_channels: int = 0
    upsample: bool = False
    pool: bool = False
    classes: int = 0

    def __str__(self) -> str:
        """For people: `16x512x512 64→128 bf16`, `1x64x64 512+512/up→512 bf16`, `1x512x512 64→64→2 bf16`."""
        size = f"{self.batch}x{self.height}x{self.width}"
        second = f"+{self.second_channels}{'/up' if self.upsample else ''}" if self.second_channels else ""
        behind = ("+pool" if self.pool else "") + (f"→{self.classes}" if self.classes else "")
        return f"{size} {self.first_channels}{second}→{self.out_channels}{behind} {self.precision}"

    @property
    def first_channels(self) -> int:
        """Channels read from the first tensor."""
        return self.in_channels - self.second_channels

    @property
    def fused(self) -> tuple[bool, bool, bool, bool]:
        """Which prologues and epilogues it has: settings of one kind say nothing about another."""
        return self.second_channels > 0, self.upsample, self.pool, self.classes > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How one launch is cut: a program computes `rows × columns` pixels of `out_block` channels, `in_block` at a time.

    `family` is how operands are read: "tma" by tensor descriptors (sm_90 and newer), "pointer" by masked pointers.
    """

    family: Family
    rows: int
    columns: int
    out_block: int
    in_block: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        """Refuse what Triton or a descriptor can't do: block sides are powers of two, a descriptor's at most 256."""
        blocks = (self.rows, self.columns, self.out_block, self.in_block, self.warps)
        if any(side < 1 or side & (side - 1) for side in blocks):
            raise ValueError(f"rows, columns, out_block, in_block and warps must be powers of two; given {self}")
        if max(blocks) > 256:  # noqa: PLR2004 - the hardware's largest box side
            raise ValueError(f"a block side may be at most 256; given {self}")
        if min(self.rows * self.columns, self.out_block, self.in_block) < 16:  # noqa: PLR2004 - the smallest tl.dot
            raise ValueError(f"tl.dot needs at least 16 pixels, 16 output and 16 input channels; given {self}")

    def __str__(self) -> str:
        """For tables: `tma 16x16 n128 k64 w8 s4`."""
        tile = f"{self.rows}x{self.columns} n{self.out_block} k{self.in_block}"
        return f"{self.family} {tile} w{self.warps} s{self.stages}"

    def programs(self, problem: Problem) -> int:
        """Number of programs of the launch."""
        return self.tiles(problem) * math.ceil(problem.out_channels / self.out_block)

    def tiles(self, problem: Problem) -> int:
        """Number of tiles of `rows × columns` pixels in all images."""
        return problem.batch * math.ceil(problem.height / self.rows) * math.ceil(problem.width / self.columns)


def precision_of(dtype: torch.dtype) -> Precision:
    """How the kernels multiply tensors of `dtype`; whether fp32 means TF32 says PyTorch's own setting.

    Raises:
        KeyError: neither fp16, bf16 nor fp32.
    """
    asked = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    if dtype is torch.float32 and asked == "tf32":
        return "tf32"
    return {DTYPES["bf16"]: "bf16", DTYPES["fp16"]: "fp16", DTYPES["fp32"]: "fp32"}[dtype]  # type: ignore[return-value]


def common_channels(problem: Problem) -> int:
    """The largest block that divides the channels of both sources."""
    return math.gcd(problem.first_channels, problem.second_channels)
