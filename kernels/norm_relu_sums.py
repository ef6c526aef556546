"""Sums over a channel that BatchNorm's gradient needs, `torch.ops.unet_kernels.norm_relu_sums`.

The gradient g behind the ReLU, that of the features and of the maxima where a max-pool follows, is never stored: this
pass and the next one (`kernels.norm_relu_gradient`) each compute it from the raw convolution.
"""
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
from kernels.windows import block_of, gradient_at, largest_of, table_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.problem import Problem, Settings
    from kernels.spec import Compilation

NAME = "norm_relu_sums"


@triton.jit(do_not_specialize=["height", "width", "windows"])
def sums_of_windows(  # noqa: ANN201
    dy_ptr, pooled_ptr, z_ptr, table_ptr, partial_ptr, windows, height, width, channels,  # noqa: ANN001
    dy_n, dy_c, dy_h, dy_w, pooled_n, pooled_c, pooled_h, pooled_w,  # noqa: ANN001
    WINDOWS: tl.constexpr, OUT_BLOCK: tl.constexpr, RELU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: Σ g ẑ and Σ g over WINDOWS windows, of OUT_BLOCK channels.

    Args:
        dy_ptr: (N, C, H, W) with strides.
        pooled_ptr: (N, C, H // 2, W // 2) with strides, or None.
        z_ptr: (N, H, W, C) contiguous.
        table_ptr: (4, C) fp32.
        partial_ptr: (programs, 2, C) fp32.
        windows: of all images.
        height: H.
        width: W.
        channels: C.
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
    with_z = tl.zeros((OUT_BLOCK,), tl.float32)
    alone = tl.zeros((OUT_BLOCK,), tl.float32)
    for k in tl.static_range(4):
        _, _, centred, gradient, taken = gradient_at(
            dy_ptr, pooled_ptr, z_ptr, block, table, sizes, (dy_n, dy_c, dy_h, dy_w),
            (pooled_n, pooled_c, pooled_h, pooled_w), largest, taken, k, RELU, UPCAST,
        )  # fmt: skip
        with_z += tl.sum(gradient * centred, 0)
        alone += tl.sum(gradient, 0)
    _, _, _, _, channel, present = block
    place = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(place, with_z, mask=present)
    tl.store(place + channels, alone, mask=present)


@torch.library.custom_op("unet_kernels::norm_relu_sums", mutates_args=())
def norm_relu_sums(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, relu: bool) -> Tensor:
    """Compute Σ g ẑ and Σ g over images and pixels: the gradients of BatchNorm's γ and β.

    ẑ = (z - μ) / σ; g = dy, and d of the maximum at the first largest pixel of a window, where the ReLU lets it pass.

    Args:
        dy: (N, C, H, W) in z's dtype, any strides.
        pooled: (N, C, H // 2, W // 2), or without elements where no max-pool follows.
        z: (N, C, H, W) in fp16, bf16 or fp32, channels_last.
        table: (4, C) fp32: μ, 1 / σ, γ, β.
        relu: whether a ReLU follows.

    Returns:
        (2, C) fp32, the same at every call: tiles are summed in a fixed order.

    Raises:
        NotImplementedError: z is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes, layouts or devices that do not belong together.
    """
    passes.check_gradients(NAME, dy, pooled, z, table)
    if z.numel() == 0:
        return table.new_zeros(2, z.shape[1])
    problem, settings = passes.shipped(z, pool=passes.pools(pooled))
    return _run(dy, pooled, z, table, relu=relu, settings=settings, problem=problem)


@norm_relu_sums.register_fake
def _(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, relu: bool) -> Tensor:  # noqa: ARG001 - the schema's
    passes.check_gradients(NAME, dy, pooled, z, table)
    return table.new_empty(2, z.shape[1])


def reference(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, relu: bool) -> Tensor:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    gradient = passes.gradient_of(dy, pooled, z, table, relu=relu)
    centred = (z - table[0][:, None, None]) * table[1][:, None, None]
    return torch.stack([(gradient * centred).sum((0, 2, 3)), gradient.sum((0, 2, 3))])


def _run(
    dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, *, relu: bool, settings: Settings, problem: Problem
) -> Tensor:
    programs, _ = passes.blocks(problem, settings)
    partial = table.new_empty(programs, 2, z.shape[1])
    passes.run(sums_of_windows, _arguments(dy, pooled, z, table, partial), {"RELU": relu}, problem, settings)
    return partial.sum(0)


def _arguments(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, partial: Tensor) -> dict[str, Any]:
    given = passes.gradient_arguments(dy, pooled)
    return given | {"z_ptr": z, "table_ptr": table, "partial_ptr": partial}


def _compilation(problem: Problem, settings: Settings) -> Compilation:
    dy, pooled, z, table = passes.like_inputs(problem)
    arguments = _arguments(dy, pooled, z, table, table)
    return passes.compilation(sums_of_windows, arguments, {"RELU": True}, problem, settings)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    *tensors, relu = arguments
    return lambda: _run(*tensors, relu=relu, settings=settings, problem=problem)


def _inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    z, table = passes.inputs(problem, device, generator)
    return (*passes.gradients(problem, device, generator), z, table, True)


KERNEL = passes.Pass(
    name=NAME,
    op=norm_relu_sums,
    reference=reference,
    inputs=_inputs,
    problem=passes.problem_of_gradients,
    bytes=functools.partial(passes.bytes_moved, tensors=2, maxima=1, rows=6),
    compilation=_compilation,
    launcher=_launcher,
    constants=frozenset({"dy", "pooled", "z", "table"}),
)
