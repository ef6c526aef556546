"""Gradient of BatchNorm, ReLU and max-pool by the raw convolution: `torch.ops.unet_kernels.norm_relu_gradient`."""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: FBT001 - an op's schema has positional arguments
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# ruff: noqa: D417 - strides are as in kernels.implicit_gemm
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import passes
from kernels.around import rounded
from kernels.convolve import nhwc
from kernels.windows import block_of, gradient_at, largest_of, table_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.problem import Problem, Settings
    from kernels.spec import Compilation

NAME = "norm_relu_gradient"


@triton.jit(do_not_specialize=["height", "width", "windows"])
def gradient_of_windows(  # noqa: ANN201
    dy_ptr, pooled_ptr, z_ptr, table_ptr, sums_ptr, dz_ptr, windows, height, width, channels, share,  # noqa: ANN001
    dy_n, dy_c, dy_h, dy_w, pooled_n, pooled_c, pooled_h, pooled_w,  # noqa: ANN001
    WINDOWS: tl.constexpr, OUT_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: dz of WINDOWS windows of OUT_BLOCK channels.

    Args:
        dy_ptr: (N, C, H, W) with strides.
        pooled_ptr: (N, C, H // 2, W // 2) with strides, or None.
        z_ptr: (N, H, W, C) contiguous.
        table_ptr: (4, C) fp32.
        sums_ptr: (2, C) fp32, or None where μ and σ are constants.
        dz_ptr: (N, H, W, C) contiguous.
        windows: of all images.
        height: H.
        width: W.
        channels: C.
        share: 1 / (N · H · W).
        WINDOWS: of a program.
        OUT_BLOCK: channels of a program.
        RELU: a gradient passes where the feature is not zero or less.
        UPCAST: round by hand, for the interpreter's bf16.
    """
    sizes = (windows, height, width, channels)
    block = block_of(sizes, WINDOWS, OUT_BLOCK)
    table = table_of(table_ptr, block, channels)
    largest = largest_of(pooled_ptr, z_ptr, block, table, sizes, WINDOWS, OUT_BLOCK, RELU, UPCAST)
    taken = tl.zeros((WINDOWS, OUT_BLOCK), tl.int32)
    _, _, _, _, channel, present = block
    _, _, scale, _ = table
    if sums_ptr is not None:
        along = tl.load(sums_ptr + channel, mask=present, other=0.0) * share
        level = tl.load(sums_ptr + channels + channel, mask=present, other=0.0) * share
    for k in tl.static_range(4):
        place, mask, centred, gradient, taken = gradient_at(
            dy_ptr, pooled_ptr, z_ptr, block, table, sizes, (dy_n, dy_c, dy_h, dy_w),
            (pooled_n, pooled_c, pooled_h, pooled_w), largest, taken, k, RELU, UPCAST,
        )  # fmt: skip
        if sums_ptr is not None:
            gradient -= level[None, :] + centred * along[None, :]
        tl.store(dz_ptr + place, rounded(gradient * scale[None, :], dz_ptr.dtype.element_ty, UPCAST), mask=mask)


@torch.library.custom_op("unet_kernels::norm_relu_gradient", mutates_args=())
def norm_relu_gradient(
    dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, sums: Tensor, relu: bool, frozen: bool
) -> Tensor:
    """Compute dz = γ / σ · (g - (Σ g + ẑ Σ g ẑ) / (N·H·W)), or γ / σ · g where μ and σ are constants.

    Args:
        dy: (N, C, H, W) in z's dtype, any strides.
        pooled: (N, C, H // 2, W // 2), or without elements where no max-pool follows.
        z: (N, C, H, W) in fp16, bf16 or fp32, channels_last.
        table: (4, C) fp32: μ, 1 / σ, γ, β.
        sums: (2, C) fp32: Σ g ẑ and Σ g, of `norm_relu_sums`, which says what g is.
        relu: whether a ReLU follows.
        frozen: whether μ and σ are constants.

    Returns:
        (N, C, H, W) in z's dtype, channels_last.

    Raises:
        NotImplementedError: z is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes, layouts or devices that do not belong together.
    """
    _check(dy, pooled, z, table, sums)
    dz = _output(z)
    if z.numel() > 0:
        problem, settings = passes.shipped(z, pool=passes.pools(pooled))
        along = None if frozen else sums
        _run(dy, pooled, z, table, along, dz, relu=relu, settings=settings, problem=problem)
    return dz


@norm_relu_gradient.register_fake
def _(
    dy: Tensor,
    pooled: Tensor,
    z: Tensor,
    table: Tensor,
    sums: Tensor,
    relu: bool,  # noqa: ARG001 - the schema's arguments
    frozen: bool,  # noqa: ARG001
) -> Tensor:
    _check(dy, pooled, z, table, sums)
    return _output(z)


def _check(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, sums: Tensor) -> None:
    passes.check_gradients(NAME, dy, pooled, z, table)
    torch._check(  # noqa: SLF001 - the way to check in a fake kernel
        tuple(sums.shape) == (2, z.shape[1]) and sums.dtype == torch.float32 and sums.is_contiguous(),
        lambda: (
            f"{NAME} takes contiguous sums (2, {z.shape[1]}) in fp32; "
            f"given {tuple(sums.shape)} {sums.dtype}, strides {sums.stride()}"
        ),
    )


def reference(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, sums: Tensor, relu: bool, frozen: bool) -> Tensor:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    mean, inverse, gamma, _ = (row[:, None, None] for row in table)
    gradient = passes.gradient_of(dy, pooled, z, table, relu=relu)
    if not frozen:
        along, level = (row[:, None, None] / (z.shape[0] * z.shape[2] * z.shape[3]) for row in sums)
        gradient = gradient - level - (z - mean) * inverse * along
    dz: Tensor = gradient * gamma * inverse
    return dz


def _output(z: Tensor) -> Tensor:
    n, c, h, w = z.shape
    return nhwc(z.new_empty_strided, n, h, w, c)


def _run(
    dy: Tensor,
    pooled: Tensor,
    z: Tensor,
    table: Tensor,
    sums: Tensor | None,
    dz: Tensor,
    *,
    relu: bool,
    settings: Settings,
    problem: Problem,
) -> None:
    arguments = _arguments(dy, pooled, z, table, sums, dz, problem)
    passes.run(gradient_of_windows, arguments, {"RELU": relu}, problem, settings)


def _arguments(
    dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, sums: Tensor | None, dz: Tensor, problem: Problem
) -> dict[str, Any]:
    given = passes.gradient_arguments(dy, pooled) | {"z_ptr": z, "table_ptr": table, "sums_ptr": sums, "dz_ptr": dz}
    return given | {"share": 1.0 / (problem.batch * problem.height * problem.width)}


def _compilation(problem: Problem, settings: Settings) -> Compilation:
    dy, pooled, z, table = passes.like_inputs(problem)
    arguments = _arguments(dy, pooled, z, table, table, z, problem)
    return passes.compilation(gradient_of_windows, arguments, {"RELU": True}, problem, settings)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    dy, pooled, z, table, sums, relu, _ = arguments
    dz = _output(arguments[2])

    def launch_once() -> Tensor:
        _run(dy, pooled, z, table, sums, dz, relu=relu, settings=settings, problem=problem)
        return dz

    return launch_once


def _inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    z, table = passes.inputs(problem, device, generator)
    given = (*passes.gradients(problem, device, generator), z, table)
    sums = torch.randn(2, problem.out_channels, generator=generator) * problem.batch
    return (*given, sums.to(device), True, False)


KERNEL = passes.Pass(
    name=NAME,
    op=norm_relu_gradient,
    reference=reference,
    inputs=_inputs,
    problem=passes.problem_of_gradients,
    bytes=functools.partial(passes.bytes_moved, tensors=3, maxima=1, rows=6),
    compilation=_compilation,
    launcher=_launcher,
    constants=frozenset({"dy", "pooled", "z", "table", "sums"}),
)
