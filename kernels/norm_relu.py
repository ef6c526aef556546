"""BatchNorm, ReLU and max-pool of a raw convolution in one pass: `torch.ops.unet_kernels.norm_relu`.

What follows a convolution in training once its channels' moments are known. Of the forward pass it keeps the raw
convolution alone; features and maxima are what `norm_relu` makes of it again where the backward pass wants them.
"""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: FBT001 - an op's schema has positional arguments
# ruff: noqa: PLR0913, PLR0917 - it takes pointers and sizes one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
import triton
import triton.language as tl
from torch import Tensor

from kernels import passes
from kernels.convolve import nhwc
from kernels.norm_relu_gradient import norm_relu_gradient
from kernels.norm_relu_sums import norm_relu_sums
from kernels.windows import block_of, normalized, places, table_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.problem import Problem, Settings
    from kernels.spec import Compilation

NAME = "norm_relu"


@triton.jit(do_not_specialize=["height", "width", "windows"])
def normalize(  # noqa: ANN201
    z_ptr, table_ptr, y_ptr, pooled_ptr, windows, height, width, channels,  # noqa: ANN001
    WINDOWS: tl.constexpr, OUT_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: WINDOWS windows of OUT_BLOCK channels.

    Args:
        z_ptr: (N, H, W, C) contiguous.
        table_ptr: (4, C) fp32.
        y_ptr: (N, H, W, C) contiguous.
        pooled_ptr: (N, H // 2, W // 2, C) contiguous, or None.
        windows: of all images.
        height: H.
        width: W.
        channels: C.
        WINDOWS: of a program.
        OUT_BLOCK: channels of a program.
        RELU: negative results become zero.
        UPCAST: round by hand, for the interpreter's bf16.
    """
    sizes = (windows, height, width, channels)
    block = block_of(sizes, WINDOWS, OUT_BLOCK)
    table = table_of(table_ptr, block, channels)
    largest = tl.full((WINDOWS, OUT_BLOCK), float("-inf"), tl.float32)
    for k in tl.static_range(4):
        place, mask, _, y = normalized(z_ptr, places(block, sizes, k), block, table, sizes, RELU, UPCAST)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)
        if pooled_ptr is not None:
            largest = tl.maximum(largest, y, propagate_nan=tl.PropagateNan.ALL)
    if pooled_ptr is not None:
        n, h, w, whole = places(block, sizes, 3)  # the last pixel is there: so are the others
        _, _, _, _, channel, present = block
        pixel = ((n * (height // 2) + h // 2) * (width // 2) + w // 2)[:, None] * channels + channel[None, :]
        tl.store(pooled_ptr + pixel, largest.to(pooled_ptr.dtype.element_ty), mask=whole[:, None] & present[None, :])


@torch.library.custom_op("unet_kernels::norm_relu", mutates_args=())
def norm_relu(z: Tensor, table: Tensor, relu: bool, pool: bool, frozen: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - `frozen` is for the gradient
    """Compute y = relu((z - μ) / σ · γ + β) and, where asked for, max_pool2(y).

    Its gradient is that of BatchNorm: unless `frozen`, μ and σ are moments of z itself, and dz says so; the table's
    first two rows have none. Rows γ and β have theirs.

    Args:
        z: (N, C, H, W) in fp16, bf16 or fp32, channels_last.
        table: (4, C) fp32: μ, 1 / σ, γ, β.
        relu: whether negative results become zero.
        pool: whether the maxima of 2×2 pixels are wanted as well.
        frozen: whether μ and σ are constants.

    Returns:
        (N, C, H, W) and (N, C, H // 2, W // 2), or (N, C, 0, 0) without `pool`, in z's dtype, channels_last.

    Raises:
        NotImplementedError: z is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes, layouts or devices that do not belong together.
    """
    passes.check(NAME, z, table)
    y, pooled = _outputs(z, pool=pool)
    if z.numel() > 0:
        problem, settings = passes.shipped(z, pool=pool)
        _run(z, table, y, pooled, relu=relu, settings=settings, problem=problem)
    return y, pooled


@norm_relu.register_fake
def _(z: Tensor, table: Tensor, relu: bool, pool: bool, frozen: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - the schema's
    passes.check(NAME, z, table)
    return _outputs(z, pool=pool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401, ARG001 - autograd's
    z, table, ctx.relu, _, ctx.frozen = inputs
    ctx.save_for_backward(z, table)


def _backward(ctx: Any, dy: Tensor, pooled: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    z, table = ctx.saved_tensors
    sums = norm_relu_sums(dy, pooled, z, table, ctx.relu)
    dz = norm_relu_gradient(dy, pooled, z, table, sums, ctx.relu, ctx.frozen)
    return dz, torch.cat([torch.zeros_like(sums), sums]), None, None, None


norm_relu.register_autograd(_backward, setup_context=_save)


def reference(z: Tensor, table: Tensor, relu: bool, pool: bool, frozen: bool) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    mean, inverse, gamma, beta = table
    if not frozen and len(z):  # the values are the table's, the gradients those of z's own moments
        var, own = torch.var_mean(z, (0, 2, 3), correction=0)
        mean = own + (mean - own).detach()
        inverse = (var + (inverse**-2 - var).detach()).rsqrt()
    else:
        mean, inverse = mean.detach(), inverse.detach()
    y = (z - mean[:, None, None]) * (gamma * inverse)[:, None, None] + beta[:, None, None]
    y = F.relu(y) if relu else y
    return y, passes.pooled_of(y) if pool else y[:, :, :0, :0]


def _outputs(z: Tensor, *, pool: bool) -> tuple[Tensor, Tensor]:
    n, c, h, w = z.shape
    return nhwc(z.new_empty_strided, n, h, w, c), nhwc(
        z.new_empty_strided, n, h // 2 if pool else 0, w // 2 if pool else 0, c
    )


def _run(
    z: Tensor, table: Tensor, y: Tensor, pooled: Tensor, *, relu: bool, settings: Settings, problem: Problem
) -> None:
    passes.run(normalize, _arguments(z, table, y, pooled), {"RELU": relu}, problem, settings)


def _arguments(z: Tensor, table: Tensor, y: Tensor, pooled: Tensor) -> dict[str, Any]:
    return {"z_ptr": z, "table_ptr": table, "y_ptr": y, "pooled_ptr": pooled if pooled.numel() else None}


def _compilation(problem: Problem, settings: Settings) -> Compilation:
    y, pooled, z, table = passes.like_inputs(problem)
    arguments = _arguments(z, table, y, pooled)
    return passes.compilation(normalize, arguments, {"RELU": True}, problem, settings)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], tuple[Tensor, Tensor]]:
    z, table, relu, pool, _ = arguments
    outputs = _outputs(z, pool=pool)

    def launch_once() -> tuple[Tensor, Tensor]:
        _run(z, table, *outputs, relu=relu, settings=settings, problem=problem)
        return outputs

    return launch_once


def _inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    return (*passes.inputs(problem, device, generator), True, problem.pool, False)


KERNEL = passes.Pass(
    name=NAME,
    op=norm_relu,
    reference=reference,
    inputs=_inputs,
    problem=lambda arguments: passes.problem_of(arguments[0], pool=arguments[3]),
    bytes=functools.partial(passes.bytes_moved, tensors=2, maxima=1, rows=4),
    compilation=_compilation,
    launcher=_launcher,
)
