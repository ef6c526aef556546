"""What a kernel of this room declares, so that tests, resources, tuning and the roofline run over all of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from kernels.problem import Precision, Problem, Settings

    Result = Tensor | tuple[Tensor, ...]

Size = TypeVar("Size")


def tried(sizes: Sequence[Size]) -> list[tuple[Precision, Size]]:
    """Sizes for `Kernel.edges`: each in bf16 and fp32, the first in fp16 too, which only rounds differently."""
    return [("fp16", sizes[0]), *(("bf16", size) for size in sizes), *(("fp32", size) for size in sizes)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """One function as Triton would compile it: what a launch with tensors at hand would have told the compiler.

    `types` names each run-time argument's type ("*bf16", "i32", "tensordesc<bf16[1, 8, 16]>"), `constants` the rest,
    None for the arguments that are not there; `aligned` are those known to be multiples of 16 (bytes for pointers).
    """

    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of the registry.

    Attributes:
        name: the op's name without its namespace.
        op: the registered op, which returns a tensor or a tuple of tensors.
        reference: the same arguments → the same result in plain PyTorch; in fp64 it is the truth.
        inputs: (problem, device, generator) → the op's arguments, in the problem's dtype and the fast layout, drawn
            where the generator is.
        problem: the op's arguments → the problem they are; whether fp32 means TF32 says PyTorch's own setting.
        flops: floating-point operations of a problem.
        bytes: bytes that must move for a problem.
        depth: products summed for one result, which sets the tolerance.
        edges: small problems that cross every edge of a tile; tests run them in each precision.
        layers: problems as the U-Net has them; resources and tuning run over them.
        compiled: those of them that resources compile, where one stands for others; all where empty.
        rival: the op's arguments → the same by PyTorch, where that is used unless tuning finds the kernel faster.
        settings: (problem, capability) → the settings shipped for it.
        candidates: (problem, capability, compiled=True) → settings worth measuring, the shipped ones first.
        compilation: (problem, settings) → what Triton compiles.
        launcher: (arguments, problem, settings) → a function that launches with these and returns what it wrote.
        constants: names of the op's tensors that no gradient goes to.
    """

    name: str
    op: Callable[..., Result]
    reference: Callable[..., Result]
    inputs: Callable[[Problem, torch.device, torch.Generator], tuple[Any, ...]]
    problem: Callable[[tuple[Any, ...]], Problem]
    flops: Callable[[Problem], int]
    bytes: Callable[[Problem], int]
    depth: Callable[[Problem], int]
    edges: tuple[Problem, ...]
    layers: tuple[Problem, ...]
    settings: Callable[[Problem, int], Settings]
    candidates: Callable[..., list[Settings]]
    compilation: Callable[[Problem, Settings], Compilation]
    launcher: Callable[[tuple[Any, ...], Problem, Settings], Callable[[], Result]]
    constants: frozenset[str] = frozenset()
    compiled: tuple[Problem, ...] = ()
    rival: Callable[..., object] | None = None
