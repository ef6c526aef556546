"""The fused convolution with the maxima of 2×2 pixels as a second result, `torch.ops.unet_kernels.conv_bn_relu_pool`.

What an encoder's level gives to the skip and to the level below, in one pass: the pooling reads nothing. The Triton
code is that of `kernels.conv_bn_relu` with an epilogue more.
"""
# ruff: noqa: PLR0913, PLR0917 - one argument for each parameter of the layers
# ruff: noqa: FBT001, FBT002 - an op's schema has positional arguments

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels import conv_bn_relu as plain
from kernels import gradient, two_sources
from kernels.candidates import candidates
from kernels.convolution import (
    bytes_moved,
    cast_activations,
    check,
    count_flops,
    depth,
    flops,
    inputs,
    named,
    problem_of,
)
from kernels.convolve import Operands, compilation, nhwc, run
from kernels.launch import place
from kernels.packing import Sources, packed
from kernels.passes import pooled_of
from kernels.problem import ITEM_BYTES, Problem, Settings
from kernels.settings import settings_for
from kernels.spec import Kernel
from kernels.unet_layers import LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "conv_bn_relu_pool"


@torch.library.custom_op("unet_kernels::conv_bn_relu_pool", mutates_args=())
def conv_bn_relu_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute y = conv_bn_relu(…) and max_pool2(y): windows of 2×2, an odd last row or column dropped.

    Args:
        x: as for `conv_bn_relu`, and so the others.
        weight: (O, I + I₂, 3, 3).
        bias: (O,) or None.
        mean: (O,).
        var: (O,).
        gamma: (O,) or None.
        beta: (O,) or None.
        eps: added to the variance.
        relu: whether negative results become zero.
        second: (N, I₂, h, w) or None.
        placement: where `second` lies.
        upsample: whether it is interpolated as it is read.

    Returns:
        (N, O, H, W) and (N, O, H // 2, W // 2) in x's dtype, channels_last.

    Raises:
        NotImplementedError: x is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    check(NAME, x, weight, mean, second, placement, upsample=upsample)
    y, pooled = _outputs(x, weight)
    if x.shape[0] > 0:
        sources = Sources(weight, bias, mean, var, gamma, beta, eps)
        operands = _operands(x, y, pooled, second, placement, upsample=upsample)
        capability, gpu = place(x.device)
        problem = problem_of(x, weight, second, upsample=upsample, pool=True)
        settings = settings_for(problem, capability, gpu, family=operands.family, kernel=NAME)
        run(operands, packed(sources, x.dtype), relu=relu, settings=settings, problem=problem)
    return y, pooled


@conv_bn_relu_pool.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,  # noqa: ARG001 - the schema's arguments
    mean: Tensor,
    var: Tensor,  # noqa: ARG001
    gamma: Tensor | None,  # noqa: ARG001
    beta: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    relu: bool,  # noqa: ARG001
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
) -> tuple[Tensor, Tensor]:
    check(NAME, x, weight, mean, second, placement, upsample=upsample)
    return _outputs(x, weight)


conv_bn_relu_pool.register_autograd(gradient.backward, setup_context=gradient.save)
cast_activations(NAME)
count_flops(torch.ops.unet_kernels.conv_bn_relu_pool)


def reference(*arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the op's
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    y = plain.reference(*arguments)
    return y, pooled_of(y)


def _outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    n, _, h, w = x.shape
    o = weight.shape[0]
    return nhwc(x.new_empty_strided, n, h, w, o), nhwc(x.new_empty_strided, n, h // 2, w // 2, o)


def _operands(
    x: Tensor, y: Tensor, pooled: Tensor, second: Tensor | None, placement: str, *, upsample: bool
) -> Operands:
    if second is None:
        return Operands(x=x, y=y, pooled=pooled)
    second, top, left = two_sources.laid(x, second, placement, upsample=upsample)
    return Operands(x=x, y=y, pooled=pooled, second=second, top=top, left=left)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], tuple[Tensor, Tensor]]:
    x, relu = arguments[0], arguments[8]
    sources = Sources(*arguments[1:8])
    outputs = _outputs(x, sources.weight)
    given = named(torch.ops.unet_kernels.conv_bn_relu_pool, arguments)
    operands = _operands(x, *outputs, given["second"], given["placement"], upsample=given["upsample"])
    ready = packed(sources, x.dtype)

    def launch_once() -> tuple[Tensor, Tensor]:
        run(operands, ready, relu=relu, settings=settings, problem=problem)
        return outputs

    return launch_once


def _problem(arguments: tuple[Any, ...]) -> Problem:
    given = named(torch.ops.unet_kernels.conv_bn_relu_pool, arguments)
    return problem_of(given["x"], given["weight"], given["second"], upsample=given["upsample"], pool=True)


# Even and odd pictures, tiles that end inside a window's row, one without any window, a second source before it.
_EDGES: tuple[dict[str, Any], ...] = (
    {"batch": 2, "height": 9, "width": 18, "in_channels": 16, "out_channels": 40},
    {"batch": 1, "height": 16, "width": 33, "in_channels": 3, "out_channels": 16},
    {"batch": 2, "height": 1, "width": 4, "in_channels": 8, "out_channels": 8},
    {"batch": 1, "height": 7, "width": 5, "in_channels": 32, "out_channels": 72, "second_channels": 16},
    {"batch": 0, "height": 8, "width": 16, "in_channels": 16, "out_channels": 16},
)

KERNEL = Kernel(
    name=NAME,
    op=conv_bn_relu_pool,
    reference=reference,
    inputs=inputs,
    problem=_problem,
    flops=flops,
    bytes=bytes_moved,
    depth=depth,
    edges=tuple(Problem(**sizes, precision=precision, pool=True) for precision in ITEM_BYTES for sizes in _EDGES),
    layers=tuple(layer for layer in LAYERS if layer.pool),
    settings=functools.partial(settings_for, kernel=NAME),
    candidates=functools.partial(candidates, kernel=NAME),
    compilation=compilation,
    launcher=_launcher,
    constants=frozenset({"mean", "var"}),
)
