"""The convolution of a training step with its channels' moments: `torch.ops.unet_kernels.conv_moments`.

The Triton code is that of `kernels.conv_bn_relu` with the sums themselves as output, and of each tile its number of
pixels, sum and squared distances from its own mean, which Chan's formula merges.

Of its sources the op keeps nothing that can be made again: features that come from `norm_relu` are kept as the raw
convolution they came from, which is kept anyway.
"""
# ruff: noqa: PLR0913, PLR0917 - one argument for each parameter of the layers
# ruff: noqa: FBT001, FBT002 - an op's schema has positional arguments

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import candidates as shared_candidates
from kernels import convolution, two_sources
from kernels import settings as shared_settings
from kernels.conv_gradient import conv_gradient
from kernels.conv_weight_gradient import by_pytorch, conv_weight_gradient, measured_faster
from kernels.convolve import Operands, compilation, nhwc, run
from kernels.defaults import default
from kernels.launch import place
from kernels.norm_relu import norm_relu
from kernels.packing import Packed, copied, vector
from kernels.problem import Family, Problem, Settings
from kernels.spec import Kernel, tried
from kernels.unet_layers import extremes, unet_layers

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "conv_moments"
_SECOND = 3  # position of the second source among the op's arguments


@torch.library.custom_op("unet_kernels::conv_moments", mutates_args=())
def conv_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
    moments: bool = True,
    raw: Tensor | None = None,  # noqa: ARG001 - for the backward pass, and so the rest
    table: Tensor | None = None,  # noqa: ARG001
    pooled: bool = False,  # noqa: ARG001
    second_raw: Tensor | None = None,  # noqa: ARG001
    second_table: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z = conv3×3([x, second]) + bias with padding 1, and mean and variance of each channel of z as stored.

    Mean and variance are constants to autograd: `norm_relu`, which reads them, has them in its own gradient.

    Args:
        x: (N, I, H, W) in fp16, bf16 or fp32, any strides, N ≥ 0, H and W ≥ 1; channels_last is the fast layout.
        weight: (O, I + I₂, 3, 3), any floating dtype: it is rounded to x's.
        bias: (O,) or None.
        second: (N, I₂, h, w) or None: further channels, in x's dtype, any strides.
        placement: where `second` lies in x's H×W, as `kernels.two_sources` says.
        upsample: read `second` as interpolated bilinearly to twice its size, corners aligned.
        moments: whether mean and variance are wanted.
        raw: the z that x was made of by `norm_relu` with a ReLU, and will be again in the backward pass; None keeps x.
        table: the table it was made with.
        pooled: whether x are its maxima instead of its features.
        second_raw: the same of `second`, always its features.
        second_table: the table of that.

    Returns:
        z (N, O, H, W) in x's dtype, channels_last; mean and biased variance (O,) fp32, or (0,) without `moments`.

    Raises:
        NotImplementedError: x is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    convolution.check(NAME, x, weight, weight, second, placement, upsample=upsample)
    z, mean, var = _outputs(x, weight, moments=moments)
    if x.shape[0] == 0:
        return z, mean.zero_(), var.zero_()
    capability, gpu = place(x.device)
    problem = convolution.problem_of(x, weight, second, upsample=upsample, pool=False)
    operands = _operands(x, z, second, placement, upsample=upsample)
    settings = settings_for(problem, capability, gpu, family=operands.family)
    found = _run(operands, _raw(weight, bias, x.dtype), moments=moments, settings=settings, problem=problem)
    return z, *(found or (mean, var))


@conv_moments.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001 - the schema's arguments
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
    moments: bool = True,
    raw: Tensor | None = None,  # noqa: ARG001
    table: Tensor | None = None,  # noqa: ARG001
    pooled: bool = False,  # noqa: ARG001
    second_raw: Tensor | None = None,  # noqa: ARG001
    second_table: Tensor | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    convolution.check(NAME, x, weight, weight, second, placement, upsample=upsample)
    return _outputs(x, weight, moments=moments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401 - autograd's
    x, weight, bias, second, ctx.placement, ctx.upsample, _, raw, table, ctx.pooled, second_raw, second_table = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.x, ctx.second = x.shape, None if second is None else second.shape
    ctx.bias = None if bias is None else bias.dtype
    kept, second_kept = (x if raw is None else None), (second if second_raw is None else None)
    ctx.save_for_backward(kept, second_kept, weight, raw, table, second_raw, second_table)


def _backward(ctx: Any, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, second, weight, raw, table, second_raw, second_table = ctx.saved_tensors
    # The dispatcher drops arguments that are their defaults: of those there is no word.
    wanted_x, wanted_weight, wanted_bias, wanted_second = (*ctx.needs_input_grad, False)[:4]
    dx = d_second = d_weight = d_bias = None
    if wanted_x or wanted_second:
        whole = conv_gradient(dz, weight)
        dx, d_second = two_sources.split_gradient(whole, ctx.x, ctx.second, ctx.placement, upsample=ctx.upsample)
    if wanted_weight:
        x = _again(x, raw, table, dz.dtype, pooled=ctx.pooled)
        parts = [_weight_gradient(dz, x)]
        if ctx.second is not None:
            second = _again(second, second_raw, second_table, dz.dtype)
            below = two_sources.placed(ctx.x, second, ctx.placement, upsample=ctx.upsample)
            parts.append(_weight_gradient(dz, below))
        d_weight = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(weight.dtype)
    if wanted_bias:
        d_bias = dz.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias)
    return (dx, d_weight, d_bias, d_second, *[None] * 8)


conv_moments.register_autograd(_backward, setup_context=_save)
convolution.cast_activations(NAME, activations=(0, _SECOND))


@register_flop_formula(torch.ops.unet_kernels.conv_moments)
def _flop_formula(x: torch.Size, weight: torch.Size, *_: object, out_shape: object = None, **__: object) -> int:  # noqa: ARG001
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
    moments: bool = True,
    *_: Any,  # noqa: ANN401 - what the sources were made of changes nothing
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    z: Tensor = F.conv2d(two_sources.joined(x, second, placement, upsample=upsample), weight, bias, padding=1)
    if not moments or not len(z):
        nothing = z.new_zeros(z.shape[1] if moments else 0)
        return z, nothing, nothing
    var, mean = torch.var_mean(z.detach(), (0, 2, 3), correction=0)
    return z, mean, var


def _raw(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Packed:
    # Not remembered: a training step uses it once, and the next one has other weights.
    shift = None if bias is None else vector(bias, weight.shape[0]).contiguous()
    return Packed(copied(weight.permute(2, 3, 0, 1), dtype), None, shift)


def _again(
    kept: Tensor | None, raw: Tensor | None, table: Tensor | None, dtype: torch.dtype, *, pooled: bool = False
) -> Tensor:
    """What was given: kept, or made once more."""
    if raw is None or table is None:
        assert kept is not None  # noqa: S101 - for the type checker: one of the two was saved
        return kept
    features, maxima = norm_relu(raw, table, True, pooled, True)  # noqa: FBT003 - an op's arguments
    again: Tensor = maxima if pooled else features
    return again.to(dtype)


def _weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    found: Tensor = conv_weight_gradient(dz, x) if measured_faster(dz, x) else by_pytorch(dz, x)
    return found


def settings_for(problem: Problem, capability: int, gpu: str | None = None, *, family: Family = "tma") -> Settings:
    """As `kernels.settings.settings_for`, with steps of 32 channels where 64 leave no registers for moments."""
    chosen = shared_settings.settings_for(problem, capability, gpu, family=family, kernel=NAME)
    # Compiled for sm_120, whose 8 warps get 128 registers for 64 outputs: in bf16 8 bytes would spill. In fp16, which
    # does not need it, as many would with steps of 32.
    tight = capability >= 120 and problem.upsample and problem.precision == "bf16"  # noqa: PLR2004
    narrow = chosen.out_block == chosen.in_block == 64  # noqa: PLR2004
    shipped = chosen == default(problem, capability, family=chosen.family)
    return dataclasses.replace(chosen, in_block=32) if tight and narrow and shipped else chosen


def candidates(problem: Problem, capability: int, *, compiled: bool = True) -> list[Settings]:
    """As `kernels.candidates.candidates`, this kernel's shipped ones first."""
    found = shared_candidates.candidates(problem, capability, compiled=compiled, kernel=NAME, compilation=_compilation)
    return list(dict.fromkeys([settings_for(problem, capability), *found]))


def _outputs(x: Tensor, weight: Tensor, *, moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, _, h, w = x.shape
    o = weight.shape[0]
    mean, var = (x.new_empty(o if moments else 0, dtype=torch.float32) for _ in range(2))
    return nhwc(x.new_empty_strided, n, h, w, o), mean, var


def _operands(x: Tensor, z: Tensor, second: Tensor | None, placement: str, *, upsample: bool) -> Operands:
    if second is None:
        return Operands(x=x, y=z)
    second, top, left = two_sources.laid(x, second, placement, upsample=upsample)
    return Operands(x=x, y=z, second=second, top=top, left=left)


def _run(
    operands: Operands, parameters: Packed, *, moments: bool, settings: Settings, problem: Problem
) -> tuple[Tensor, Tensor] | None:
    """Launch, and merge the moments of the tiles: mean and biased variance."""
    if not moments:
        run(operands, parameters, relu=False, settings=settings, problem=problem)
        return None
    of_tiles = parameters.weight.new_empty((settings.tiles(problem), 3, problem.out_channels), dtype=torch.float32)
    operands = dataclasses.replace(operands, moments=of_tiles)
    run(operands, parameters, relu=False, settings=settings, problem=problem)
    pixels, sums, squares = of_tiles.unbind(1)
    number = problem.batch * problem.height * problem.width
    mean = sums.sum(0) / number
    # Chan, Golub, LeVeque (1979): what lies within the tiles, and the distances of their means from the whole's.
    between = torch.addcmul(sums, pixels, mean, value=-1).square_().div_(pixels)
    return mean, between.add_(squares).sum(0) / number


def _launcher(
    arguments: tuple[Any, ...], problem: Problem, settings: Settings
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    given = convolution.named(torch.ops.unet_kernels.conv_moments, arguments)
    x, weight, second = given["x"], given["weight"], given["second"]
    z, _, _ = _outputs(x, weight, moments=True)
    operands = _operands(x, z, second, given["placement"], upsample=given["upsample"])
    ready = _raw(weight, given["bias"], x.dtype)

    def launch_once() -> tuple[Tensor, Tensor, Tensor]:
        found = _run(operands, ready, moments=True, settings=settings, problem=problem)
        return z, *(found or ())

    return launch_once


def _problem(arguments: tuple[Any, ...]) -> Problem:
    given = convolution.named(torch.ops.unet_kernels.conv_moments, arguments)
    return convolution.problem_of(given["x"], given["weight"], given["second"], upsample=given["upsample"], pool=False)


def _inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    given = convolution.inputs(problem, device, generator)
    return (*given[:2], None, *given[9:12])  # without BatchNorm's parameters, and no bias before one


_compilation = functools.partial(compilation, raw=True, moments=True)
# Gathered and by descriptors, several tiles that end outside the picture, one pixel, two sources; small ones last.
_SIZES: tuple[dict[str, Any], ...] = (
    {"batch": 2, "height": 9, "width": 17, "in_channels": 16, "out_channels": 24},
    {"batch": 0, "height": 8, "width": 16, "in_channels": 16, "out_channels": 16},
    {"batch": 1, "height": 1, "width": 1, "in_channels": 1, "out_channels": 1},
    {"batch": 2, "height": 3, "width": 5, "in_channels": 3, "out_channels": 8},
    {"batch": 1, "height": 4, "width": 5, "in_channels": 16, "out_channels": 8, "second_channels": 8},
    {"batch": 1, "height": 5, "width": 4, "in_channels": 7, "out_channels": 3, "second_channels": 3, "upsample": True},
)
# A pool and a head are not this kernel's.
LAYERS = tuple(dict.fromkeys(dataclasses.replace(layer, pool=False, classes=0) for layer in unet_layers(batch=16)))

KERNEL = Kernel(
    name=NAME,
    op=conv_moments,
    reference=reference,
    inputs=_inputs,
    problem=_problem,
    flops=convolution.flops,
    bytes=convolution.bytes_moved,  # two numbers in fp32 for each channel, as there: moments
    depth=convolution.depth,
    edges=tuple(Problem(**sizes, precision=precision) for precision, sizes in tried(_SIZES)),
    layers=LAYERS,
    compiled=extremes(LAYERS),
    settings=settings_for,
    candidates=candidates,
    compilation=_compilation,
    launcher=_launcher,
)
