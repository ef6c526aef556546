"""Fused Triton kernels for convolutional networks, and `fuse`, which puts them into anyone's.

    fused = kernels.fuse(model)           # the same inputs, outputs and state_dict
    print(kernels.fusion_report(fused))   # what runs fused, what does not and why

Importing needs no GPU; running does, or TRITON_INTERPRET=1.
"""

from kernels.account import Account, account_for
from kernels.conv_bn_relu import KERNEL as CONV_BN_RELU
from kernels.conv_bn_relu_pool import KERNEL as CONV_BN_RELU_POOL
from kernels.conv_bn_relu_up import KERNEL as CONV_BN_RELU_UP
from kernels.conv_gradient import KERNEL as CONV_GRADIENT
from kernels.conv_moments import KERNEL as CONV_MOMENTS
from kernels.conv_transpose import KERNEL as CONV_TRANSPOSE
from kernels.conv_weight_gradient import KERNEL as CONV_WEIGHT_GRADIENT
from kernels.fuse import FusionReport, fuse, fusion_report, renew
from kernels.graph import Graphed
from kernels.norm_relu import KERNEL as NORM_RELU
from kernels.norm_relu_gradient import KERNEL as NORM_RELU_GRADIENT
from kernels.norm_relu_sums import KERNEL as NORM_RELU_SUMS
from kernels.spec import Kernel

KERNELS: tuple[Kernel, ...] = (
    *(CONV_BN_RELU, CONV_BN_RELU_POOL, CONV_BN_RELU_UP, CONV_TRANSPOSE),
    *(CONV_MOMENTS, NORM_RELU, NORM_RELU_SUMS, NORM_RELU_GRADIENT, CONV_GRADIENT, CONV_WEIGHT_GRADIENT),
)

__all__ = [
    "KERNELS",
    "Account",
    "FusionReport",
    "Graphed",
    "Kernel",
    "account_for",
    "fuse",
    "fusion_report",
    "renew",
]
