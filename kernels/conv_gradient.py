"""Gradient of a 3×3 convolution with respect to its input, by the same loops: `torch.ops.unet_kernels.conv_gradient`.

dx[i] = Σₒ conv3×3(dz[o], W[o, i] turned by 180°): a convolution again, of O channels to I.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import candidates as shared_candidates
from kernels import convolution
from kernels.convolve import Operands, compilation, nhwc, run
from kernels.launch import place
from kernels.packing import Packed, copied
from kernels.problem import DTYPES, ITEM_BYTES, Problem, Settings
from kernels.settings import settings_for
from kernels.spec import Kernel, tried
from kernels.unet_layers import alone, extremes, unet_layers

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "conv_gradient"


@torch.library.custom_op("unet_kernels::conv_gradient", mutates_args=())
def conv_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """Compute dx where z = conv3×3(x) with padding 1: the transposed convolution of dz.

    Args:
        dz: (N, O, H, W) in fp16, bf16 or fp32, any strides, H and W ≥ 1; channels_last is the fast layout.
        weight: (O, I, 3, 3), any floating dtype: it is rounded to dz's.

    Returns:
        (N, I, H, W) in dz's dtype, channels_last.

    Raises:
        NotImplementedError: dz is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    _check(dz, weight)
    dx = _output(dz, weight)
    if dz.shape[0] > 0:
        operands = Operands(x=dz, y=dx)
        capability, gpu = place(dz.device)
        problem = _problem((dz, weight))
        settings = settings_for(problem, capability, gpu, family=operands.family, kernel=NAME)
        run(operands, _turned(weight, dz.dtype), relu=False, settings=settings, problem=problem)
    return dx


@conv_gradient.register_fake
def _(dz: Tensor, weight: Tensor) -> Tensor:
    _check(dz, weight)
    return _output(dz, weight)


@register_flop_formula(torch.ops.unet_kernels.conv_gradient)
def _flop_formula(dz: torch.Size, weight: torch.Size, *_: object, out_shape: object = None, **__: object) -> int:  # noqa: ARG001
    return 2 * dz[0] * dz[2] * dz[3] * math.prod(weight)


def reference(dz: Tensor, weight: Tensor) -> Tensor:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    return torch.nn.functional.conv_transpose2d(dz, weight, padding=1)


def _turned(weight: Tensor, dtype: torch.dtype) -> Packed:
    # Not remembered: a training step uses it once, and the next one has other weights.
    return Packed(copied(weight.flip(2, 3).permute(2, 3, 1, 0), dtype), None, None)


def _check(dz: Tensor, weight: Tensor) -> None:
    torch._check(  # noqa: SLF001 - the way to check in a fake kernel
        dz.dim() == 4 and dz.dtype in DTYPES.values() and dz.shape[2] > 0 and dz.shape[3] > 0,  # noqa: PLR2004
        lambda: (
            f"{NAME} takes (N, O, H, W) in fp16, bf16 or fp32, at least one pixel; given {tuple(dz.shape)} {dz.dtype}"
        ),
    )
    torch._check(  # noqa: SLF001
        weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3) and weight.shape[0] == dz.shape[1],  # noqa: PLR2004
        lambda: f"{NAME} takes a weight ({dz.shape[1]}, I, 3, 3) for {tuple(dz.shape)}; given {tuple(weight.shape)}",
    )
    torch._check(  # noqa: SLF001
        dz.device == weight.device,
        lambda: f"dz is on {dz.device}, the weight on {weight.device}: put them on one device",
    )


def _output(dz: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = dz.shape
    return nhwc(dz.new_empty_strided, n, h, w, weight.shape[1])


def _problem(arguments: tuple[Any, ...]) -> Problem:
    dz, weight = arguments
    return convolution.problem_of(dz, weight.transpose(0, 1), None, upsample=False, pool=False)


def _inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    dz, weight, *_ = convolution.inputs(problem, device, generator)
    return dz, weight.transpose(0, 1).contiguous()


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    dz, weight = arguments
    dx = _output(dz, weight)
    ready = _turned(weight, dz.dtype)

    def launch_once() -> Tensor:
        run(Operands(x=dz, y=dx), ready, relu=False, settings=settings, problem=problem)
        return dx

    return launch_once


def _bytes(problem: Problem) -> int:
    """Read dz and the weight once, write dx once."""
    pixels, i, o = problem.batch * problem.height * problem.width, problem.in_channels, problem.out_channels
    return (pixels * (i + o) + 9 * i * o) * ITEM_BYTES[problem.precision]


# Its input is the layer's output: every convolution of the U-Net but the first, whose image has no gradient.
LAYERS = tuple(
    dict.fromkeys(
        alone(layer, in_channels=layer.out_channels, out_channels=layer.in_channels)
        for layer in unet_layers(batch=16)[1:]
    )
)
_SIZES = ((1, 9, 17, 40, 24), (1, 1, 1, 1, 1), (0, 8, 16, 16, 16), (2, 3, 5, 8, 3))

KERNEL = Kernel(
    name=NAME,
    op=conv_gradient,
    reference=reference,
    inputs=_inputs,
    problem=_problem,
    flops=convolution.flops,
    bytes=_bytes,
    depth=convolution.depth,
    edges=tuple(
        Problem(batch=n, height=h, width=w, in_channels=i, out_channels=o, precision=precision)
        for precision, (n, h, w, i, o) in tried(_SIZES)
    ),
    layers=LAYERS,
    settings=functools.partial(settings_for, kernel=NAME),
    candidates=functools.partial(
        shared_candidates.candidates, kernel=NAME, compilation=functools.partial(compilation, raw=True)
    ),
    compilation=functools.partial(compilation, raw=True),
    launcher=_launcher,
    constants=frozenset({"dz", "weight"}),
    compiled=extremes(LAYERS),
)
