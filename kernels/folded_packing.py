"""The parameters of a convolution with a transposed one folded in before its second source: what the kernel reads."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import packing
from kernels.packing import copied, vector


class Packed(NamedTuple):
    """`weight` (3, 3, O, C) and `folded` (2, 2, 2, 2, O, L) contiguous in the arithmetic's dtype; the rest fp32.

    `folded` has parities of row and column, then taps; `border` (9, O) is what the transposed convolution's bias gives
    through each tap, None where there is none; `scale` and `shift` are (O,).
    """

    weight: Tensor
    folded: Tensor
    scale: Tensor
    shift: Tensor
    border: Tensor | None


class Sources(NamedTuple):
    """What the two convolutions and the BatchNorm are made of.

    The first seven as in `kernels.packing.Sources`, weight (O, C + U, 3, 3); `up_weight` (L, U, 2, 2) and `up_bias`
    (U,) or None are the transposed convolution's.
    """

    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    up_weight: Tensor
    up_bias: Tensor | None

    def owners(self) -> tuple[Tensor, ...]:
        """The weights of both, and BatchNorm's running mean."""
        return self.weight, self.mean, self.up_weight

    def pack(self, dtype: torch.dtype) -> Packed:
        """Fold the layers in fp64; weights are rounded to `dtype` once.

        Row parity a, tap r of the 3×3 and row i of the 2×2 belong together where a + r - 1 ≡ i (mod 2); then the tap
        of `low` is (a + r - 1 - i) / 2 + 1 - a. Columns alike.
        """
        channels = self.weight.shape[1] - self.up_weight.shape[1]
        plain = packing.Sources(self.weight[:, :channels], *self[1:7]).pack(dtype)
        behind, up = self.weight.detach()[:, channels:].double(), self.up_weight.detach().double()
        products = torch.einsum("ocrs,lcij->rsijol", behind, up)
        folded = products.new_zeros(2, 2, 2, 2, *products.shape[4:])
        for r, s, i, j in itertools.product(range(3), range(3), range(2), range(2)):
            a, b = (i - r + 1) % 2, (j - s + 1) % 2
            folded[a, b, (a + r - 1 - i) // 2 + 1 - a, (b + s - 1 - j) // 2 + 1 - b] += products[r, s, i, j]
        border, (scale, shift) = None, plain[1:3]
        if self.up_bias is not None:
            shares = torch.einsum("ocrs,c->rso", behind, vector(self.up_bias, up.shape[1]).double())
            border = copied(shares.flatten(0, 1), torch.float32)
            shift = shift + scale * shares.sum((0, 1)).float()  # type: ignore[operator] # with BatchNorm there are both
        return Packed(plain.weight, copied(folded, dtype), scale, shift, border)  # type: ignore[arg-type] # the same
