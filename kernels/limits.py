"""How far a kernel's result may be from the exact one, from the precision and the number of products summed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.problem import Precision

_UNIT_FP32 = 2.0**-24
# Unit roundoff of the result's dtype, and of what tensor cores keep of an fp32 operand (TF32: 10 bits, truncated).
_RESULT = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": _UNIT_FP32, "fp32": _UNIT_FP32}
_OPERAND = {"bf16": 0.0, "fp16": 0.0, "tf32": 2.0**-10, "fp32": 0.0}


def relative_l2(result: Tensor, exact: Tensor) -> float:
    """‖result - exact‖ / ‖exact‖ in fp64; where exact is zero everywhere, 0 if the result is, infinity if not."""
    difference = torch.linalg.vector_norm(result.double() - exact.double())
    size = torch.linalg.vector_norm(exact.double())
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return float(difference / size)


def relative_l2_limit(precision: Precision, depth: int) -> float:
    """Largest `relative_l2` of sums of `depth` products, accumulated in fp32 and rounded to the precision's dtype once.

    Rounding errors of a sum grow like √depth when they are independent; the factor 2 covers what is not.
    """
    return 2 * (_RESULT[precision] + 2 * _OPERAND[precision] + math.sqrt(depth) * _UNIT_FP32)


def elementwise_limit(precision: Precision, depth: int, exact: Tensor, magnitude: Tensor) -> Tensor:
    """Largest |result - exact| of each element, in any order of summation: Higham's γ bound.

    Args:
        precision: of the arithmetic.
        depth: products summed for one element.
        exact: the result in fp64.
        magnitude: Σ |aᵢ bᵢ| in fp64: the same sum of absolute values.
    """
    summation = (depth + 8) * _UNIT_FP32 + 2.1 * _OPERAND[precision]
    return 2 * _RESULT[precision] * exact.abs() + summation * magnitude + torch.finfo(torch.float16).tiny
