"""The transposed 2×2 convolution of stride 2 as a GEMM whose store shuffles pixels.

The op is `torch.ops.unet_kernels.conv_transpose`. Each input pixel makes 2×2 output pixels that no other one touches:
y[2h + a, 2w + b] = W[a, b]ᵀ x[h, w] + bias: a GEMM (4·O, I) by (I, pixels). Row a, then (b, o) side by side: an output
row of channels_last memory holds both b of a pixel in 2·O consecutive elements, so each program writes whole rows.
"""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: D417 - sizes, strides and tiles are as in kernels.implicit_gemm
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import candidates as shared_candidates
from kernels import settings as shared_settings
from kernels.around import rounded
from kernels.convolution import cast_activations
from kernels.convolve import boxes, family_of, nhwc
from kernels.launch import ahead, interpreting, launch, place
from kernels.packing import copied, packed, vector
from kernels.problem import DTYPES, ITEM_BYTES, Family, Problem, Settings, precision_of
from kernels.spec import Compilation, Kernel
from kernels.unet_layers import TRANSPOSED_LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "conv_transpose"
_NOT_32_BIT = 2**31


@triton.jit(do_not_specialize=["height", "width"])
def descriptors(  # noqa: ANN201
    x_boxes, weight_boxes, bias_ptr, y_boxes, height, width, out_channels,  # noqa: ANN001
    IN_CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: OUT_BLOCK of the 2·O channels (b, o) of one output row a of ROWS×COLUMNS input pixels.

    Args:
        x_boxes: (N, H, W, I) in boxes [1, ROWS, COLUMNS, IN_BLOCK].
        weight_boxes: (2, 2·O, I) in boxes [1, OUT_BLOCK, IN_BLOCK].
        bias_ptr: (O,) fp32.
        y_boxes: (N, H, 2, W, 2·O), which is (N, 2·H, 2·W, O), in boxes [1, ROWS, 1, COLUMNS, OUT_BLOCK].
        UPCAST: multiply in fp32 and round by hand, for the interpreter's bf16.
    """
    tile = tl.program_id(0)
    across = tl.cdiv(width, COLUMNS)
    per_image = tl.cdiv(height, ROWS) * across
    n = tile // per_image
    h = tile % per_image // across * ROWS
    w = tile % per_image % across * COLUMNS
    blocks = tl.cdiv(2 * out_channels, OUT_BLOCK)
    a = tl.program_id(1) // blocks
    first = tl.program_id(1) % blocks * OUT_BLOCK
    total = tl.zeros((OUT_BLOCK, ROWS * COLUMNS), tl.float32)
    for step in tl.range((IN_CHANNELS + IN_BLOCK - 1) // IN_BLOCK):
        c = step * IN_BLOCK
        pixels = x_boxes.load([n, h, w, c]).reshape(ROWS * COLUMNS, IN_BLOCK)
        weight = weight_boxes.load([a, first, c]).reshape(OUT_BLOCK, IN_BLOCK)
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(weight, pixels.T, total)
    channel = first + tl.arange(0, OUT_BLOCK)
    bias = tl.load(bias_ptr + channel % out_channels)
    total += bias[:, None]
    total = rounded(total, y_boxes.dtype, UPCAST)
    y_boxes.store([n, h, a, w, first], total.T.reshape(1, ROWS, 1, COLUMNS, OUT_BLOCK))


@triton.jit(do_not_specialize=["height", "width"])
def pointers(  # noqa: ANN201
    x_ptr, weight_ptr, bias_ptr, y_ptr, height, width, out_channels, stride_n, stride_c, stride_h, stride_w,  # noqa: ANN001
    IN_CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, MULTIPLY: tl.constexpr,
):  # fmt: skip
    """The same through masked pointers.

    Args:
        x_ptr: (N, H, W, I) with the four strides given, in elements.
        weight_ptr: (2, 2·O, I) contiguous.
        bias_ptr: (O,) fp32.
        y_ptr: (N, 2·H, 2·W, O) contiguous.
        WIDE: offsets within one image pass 2^31 elements.
        MULTIPLY: tl.dot's input_precision.
    """
    tile = tl.program_id(0)
    across = tl.cdiv(width, COLUMNS)
    per_image = tl.cdiv(height, ROWS) * across
    n = (tile // per_image).to(tl.int64)
    pixel = tl.arange(0, ROWS * COLUMNS)
    h = tile % per_image // across * ROWS + pixel // COLUMNS
    w = tile % per_image % across * COLUMNS + pixel % COLUMNS
    inside = (h < height) & (w < width)
    blocks = tl.cdiv(2 * out_channels, OUT_BLOCK)
    a = tl.program_id(1) // blocks
    channel = tl.program_id(1) % blocks * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    present = channel < 2 * out_channels
    c = tl.arange(0, IN_BLOCK)
    far_h = h.to(tl.int64) if WIDE else h
    far_w = w.to(tl.int64) if WIDE else w
    x_tile = x_ptr + n * stride_n + (far_h * stride_h + far_w * stride_w)[:, None]
    x_tile += (c.to(tl.int64) * stride_c if WIDE else c * stride_c)[None, :]
    weight_tile = weight_ptr + ((a * 2 * out_channels + channel) * IN_CHANNELS)[None, :] + c[:, None]
    total = tl.zeros((ROWS * COLUMNS, OUT_BLOCK), tl.float32)
    for step in tl.range((IN_CHANNELS + IN_BLOCK - 1) // IN_BLOCK):
        block = step * IN_BLOCK
        far_block = block.to(tl.int64) if WIDE else block
        if IN_CHANNELS % IN_BLOCK == 0:
            pixels = tl.load(x_tile + far_block * stride_c, mask=inside[:, None], other=0.0)
            weight = tl.load(weight_tile + block, mask=present[None, :], other=0.0)
        else:
            there = block + c < IN_CHANNELS
            pixels = tl.load(x_tile + far_block * stride_c, mask=inside[:, None] & there[None, :], other=0.0)
            weight = tl.load(weight_tile + block, mask=present[None, :] & there[:, None], other=0.0)
        if UPCAST:
            pixels = pixels.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(pixels, weight, total, input_precision=MULTIPLY)
    total += tl.load(bias_ptr + channel % out_channels)[None, :]
    row = (n * height + h) * 2 + a  # 64 bits: n is
    y_tile = y_ptr + ((row * width + w) * 2 * out_channels)[:, None] + channel[None, :]
    tl.store(y_tile, rounded(total, y_ptr.dtype.element_ty, UPCAST), mask=inside[:, None] & present[None, :])


class Packed(NamedTuple):
    """`weight` (2, 2·O, I) contiguous in the arithmetic's dtype: row, then column and channel; `bias` (O,) fp32."""

    weight: Tensor
    bias: Tensor


class Sources(NamedTuple):
    """What a transposed convolution is made of: weight (I, O, 2, 2), bias (O,) or None."""

    weight: Tensor
    bias: Tensor | None

    def owners(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self.weight,)

    def pack(self, dtype: torch.dtype) -> Packed:
        """The weight in the order the kernel reads it, rounded to `dtype` once; the bias in fp32."""
        i, o, _, _ = self.weight.shape
        weight = copied(self.weight.permute(2, 3, 1, 0), dtype).reshape(2, 2 * o, i)
        bias = weight.new_zeros(o).float() if self.bias is None else copied(vector(self.bias, o), torch.float32)
        return Packed(weight, bias)


@torch.library.custom_op("unet_kernels::conv_transpose", mutates_args=())
def conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute conv_transpose2d(x, weight, bias, stride=2) of 2×2 taps, without padding.

    Args:
        x: (N, I, H, W) in fp16, bf16 or fp32, any strides, H and W ≥ 1; channels_last is the fast layout.
        weight: (I, O, 2, 2), any floating dtype: it is rounded to x's once.
        bias: (O,) or None, added in fp32.

    Returns:
        (N, O, 2H, 2W) in x's dtype, channels_last.

    Raises:
        NotImplementedError: x is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    _check(x, weight)
    y = _output(x, weight)
    if x.shape[0] > 0:
        capability, gpu = place(x.device)
        problem = problem_of(x, weight.shape[1])
        settings = settings_for(problem, capability, gpu, family=family_of(x))
        run(x, packed(Sources(weight, bias), x.dtype), y, settings=settings, problem=problem)
    return y


@conv_transpose.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001 - the schema's arguments
    _check(x, weight)
    return _output(x, weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - autograd's
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's
    """Turn dy into the gradients of x, weight and bias, by PyTorch's own operation."""
    x, weight, bias = ctx.saved_tensors
    transposed = True
    geometry = ([2, 2], [0, 0], [1, 1], transposed, [0, 0], 1)
    gradient_x, gradient_weight, gradient_bias = torch.ops.aten.convolution_backward(
        gradient, x, weight.to(x.dtype), [weight.shape[1]], *geometry, [True, True, bias is not None]
    )
    return gradient_x, gradient_weight.to(weight.dtype), None if bias is None else gradient_bias.to(bias.dtype)


conv_transpose.register_autograd(backward, setup_context=_save)
cast_activations(NAME, activations=(0,))


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    return F.conv_transpose2d(x, weight, bias, stride=2)


@register_flop_formula(torch.ops.unet_kernels.conv_transpose)
def _flop_formula(x: torch.Size, weight: torch.Size, *_: object, out_shape: object = None, **__: object) -> int:  # noqa: ARG001
    n, i, h, w = x
    return 8 * n * h * w * i * weight[1]


def run(x: Tensor, parameters: Packed, y: Tensor, *, settings: Settings, problem: Problem) -> None:
    """Launch with exactly these settings, family "tma" only where `family_of(x)` says so."""
    kernel, arguments = _arguments(x, parameters, y, settings, problem)
    options = _constants(problem, settings) | {"num_warps": settings.warps, "num_stages": settings.stages}
    options["UPCAST"] = problem.precision == "bf16" and interpreting()
    if settings.family == "pointer":
        reach = ((size + 256) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
        options["WIDE"] = sum(reach) >= _NOT_32_BIT
    tiles = problem.batch * -(-problem.height // settings.rows) * -(-problem.width // settings.columns)
    grid = (tiles, 2 * -(-2 * problem.out_channels // settings.out_block))
    launch(kernel, grid, x.device, *arguments.values(), **options)


def compilation(problem: Problem, settings: Settings) -> Compilation:
    """What Triton would compile for a launch on dense channels_last tensors, 16-byte aligned, of `problem`."""
    i, o, dtype = problem.in_channels, problem.out_channels, DTYPES[problem.precision]
    options = {"dtype": dtype, "device": "meta"}
    x = nhwc(torch.empty_strided, problem.batch, problem.height, problem.width, i, **options)
    y = nhwc(torch.empty_strided, problem.batch, 2 * problem.height, 2 * problem.width, o, **options)
    parameters = Packed(torch.empty(2, 2 * o, i, **options), torch.empty(o, device="meta"))  # type: ignore[call-overload]
    kernel, arguments = _arguments(x, parameters, y, settings, problem)
    return ahead(kernel, arguments, _constants(problem, settings), warps=settings.warps, stages=settings.stages)


def _constants(problem: Problem, settings: Settings) -> dict[str, Any]:
    shared = {"IN_CHANNELS": problem.in_channels, "ROWS": settings.rows, "COLUMNS": settings.columns}
    shared |= {"OUT_BLOCK": settings.out_block, "IN_BLOCK": settings.in_block, "UPCAST": False}
    if settings.family == "tma":
        return shared
    return shared | {"WIDE": False, "MULTIPLY": "ieee" if problem.precision == "fp32" else "tf32"}


def _arguments(
    x: Tensor, parameters: Packed, y: Tensor, settings: Settings, problem: Problem
) -> tuple[Any, dict[str, Any]]:
    n, h, w, o = problem.batch, problem.height, problem.width, problem.out_channels
    sizes = {"height": h, "width": w, "out_channels": o}
    if settings.family == "pointer":
        strides = dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True))
        tensors = {"x_ptr": x, "weight_ptr": parameters.weight, "bias_ptr": parameters.bias, "y_ptr": y}
        return pointers, tensors | sizes | strides
    tile, channels = [1, settings.rows, settings.columns, settings.in_block], [settings.out_block]
    rows = y.permute(0, 2, 3, 1).view(n, h, 2, w, 2 * o)
    return descriptors, {
        "x_boxes": boxes(x.permute(0, 2, 3, 1), tile),
        "weight_boxes": boxes(parameters.weight, [1, *channels, settings.in_block]),
        "bias_ptr": parameters.bias,
        "y_boxes": boxes(rows, [1, settings.rows, 1, settings.columns, *channels]),
        **sizes,
    }


def settings_for(problem: Problem, capability: int, gpu: str | None = None, *, family: Family = "tma") -> Settings:
    """As `kernels.settings.settings_for`: one GEMM to 2·O channels, two such for each tile."""
    return shared_settings.settings_for(_as_gemm(problem), capability, gpu, family=family, kernel=NAME)


def candidates(problem: Problem, capability: int, *, compiled: bool = True) -> list[Settings]:
    """As `kernels.candidates.candidates`."""
    return shared_candidates.candidates(
        _as_gemm(problem),
        capability,
        compiled=compiled,
        kernel=NAME,
        compilation=lambda _, cut: compilation(problem, cut),
    )


def problem_of(x: Tensor, out_channels: int) -> Problem:
    """The problem of taking `x` to `out_channels`; sizes are the input's."""
    n, i, h, w = x.shape
    return Problem(
        batch=n, height=h, width=w, in_channels=i, out_channels=out_channels, precision=precision_of(x.dtype)
    )


def _as_gemm(problem: Problem) -> Problem:
    return dataclasses.replace(problem, out_channels=2 * problem.out_channels)


def _check(x: Tensor, weight: Tensor) -> None:
    torch._check(x.dim() == 4, lambda: f"{NAME} takes (N, I, H, W); given {tuple(x.shape)}")  # noqa: PLR2004, SLF001
    torch._check(  # noqa: SLF001
        x.dtype in DTYPES.values(), lambda: f"{NAME} takes fp16, bf16 or fp32; given {x.dtype}: use the unfused model"
    )
    torch._check(  # noqa: SLF001
        weight.dim() == 4 and tuple(weight.shape[2:]) == (2, 2) and weight.shape[0] == x.shape[1],  # noqa: PLR2004
        lambda: f"{NAME} takes a weight ({x.shape[1]}, O, 2, 2) for x {tuple(x.shape)}; given {tuple(weight.shape)}",
    )
    torch._check(  # noqa: SLF001
        x.shape[2] > 0 and x.shape[3] > 0, lambda: f"{NAME} needs at least one pixel; given {tuple(x.shape)}"
    )
    torch._check(  # noqa: SLF001
        x.device == weight.device, lambda: f"x is on {x.device}, the weight on {weight.device}: put them on one device"
    )


def _output(x: Tensor, weight: Tensor) -> Tensor:
    n, _, h, w = x.shape
    return nhwc(x.new_empty_strided, n, 2 * h, 2 * w, weight.shape[1])


def inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Arguments of the op, in the problem's dtype: random, so scaled that results are near one."""
    i, o = problem.in_channels, problem.out_channels
    draw = functools.partial(torch.randn, generator=generator, device=generator.device)
    x = draw(problem.batch, i, problem.height, problem.width)
    weight, bias = draw(i, o, 2, 2) / i**0.5, draw(o)
    tensors = (x.contiguous(memory_format=torch.channels_last), weight, bias)
    return tuple(tensor.to(device, DTYPES[problem.precision]) for tensor in tensors)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    x, weight, bias = arguments
    y = _output(x, weight)
    ready = packed(Sources(weight, bias), x.dtype)

    def launch_once() -> Tensor:
        run(x, ready, y, settings=settings, problem=problem)
        return y

    return launch_once


def _flops(problem: Problem) -> int:
    return 8 * problem.batch * problem.height * problem.width * problem.in_channels * problem.out_channels


def _bytes(problem: Problem) -> int:
    """Read x and the weight once, write y once, read the bias in fp32."""
    pixels, i, o = problem.batch * problem.height * problem.width, problem.in_channels, problem.out_channels
    return (pixels * (i + 4 * o) + 4 * i * o) * ITEM_BYTES[problem.precision] + 4 * o


_SIZES = (
    (2, 7, 9, 3, 33),
    (1, 1, 1, 1, 1),
    (2, 8, 16, 16, 8),
    (1, 9, 17, 24, 40),
    (3, 1, 33, 8, 72),
    (0, 8, 16, 16, 16),
)

KERNEL = Kernel(
    name=NAME,
    op=conv_transpose,
    reference=reference,
    inputs=inputs,
    problem=lambda arguments: problem_of(arguments[0], arguments[1].shape[1]),
    flops=_flops,
    bytes=_bytes,
    depth=lambda problem: problem.in_channels,
    edges=tuple(
        Problem(batch=n, height=h, width=w, in_channels=i, out_channels=o, precision=precision)
        for precision in ITEM_BYTES
        for n, h, w, i, o in _SIZES
    ),
    layers=TRANSPOSED_LAYERS,
    settings=settings_for,
    candidates=candidates,
    compilation=compilation,
    launcher=_launcher,
)
