"""Gradient of a 3×3 convolution with respect to its weight: `torch.ops.unet_kernels.conv_weight_gradient`.

dW[o, i, r, s] = Σ dz[n, o, h, w] · x[n, i, h + r - 1, w + s - 1]: for each of nine taps a GEMM (O, pixels) by
(pixels, I), long in the sum and small in the result. The pixels of all images, one after the other, are split: each
program sums its share into a place of its own, and a second pass adds the shares in a fixed order. No atomics, so the
result is the same at every call.

In `Settings` a program sums `rows × columns` pixels of `out_block` output and `in_block` input channels.

A training step takes it only where it was measured to be faster than PyTorch's own (`measured_faster`).
"""
# ruff: noqa: N803 - constants of a Triton kernel are capitals
# ruff: noqa: PLR0913, PLR0917 - it takes pointers, sizes and strides one by one
# ruff: noqa: D417 - strides are as in kernels.implicit_gemm
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import convolution
from kernels.candidates import compiles_well
from kernels.convolve import nhwc, strides
from kernels.launch import ahead, interpreting, launch, place
from kernels.problem import DTYPES, INTERPRETER, ITEM_BYTES, Precision, Problem, Settings, precision_of
from kernels.settings import measured
from kernels.spec import Compilation, Kernel, tried
from kernels.unet_layers import alone, extremes, unet_layers

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "conv_weight_gradient"
# Pixels of one multiplication: 128 bytes of a channel, half of that where operands pass through registers.
_STEP: dict[Precision, int] = {"bf16": 64, "fp16": 64, "tf32": 32, "fp32": 16}
# Programs that keep a large GPU busy for a few waves; of a program's pixels, as many as leave so many programs.
_PROGRAMS = 512
_FEWEST, _MOST = 2**10, 2**16


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def sums_of_pixels(  # noqa: ANN201
    dz_ptr, x_ptr, partial_ptr, pixels, height, width, in_channels, out_channels,  # noqa: ANN001
    dz_n, dz_c, dz_h, dz_w, x_n, x_c, x_h, x_w,  # noqa: ANN001
    PIXELS: tl.constexpr, STEP: tl.constexpr, OUT_BLOCK: tl.constexpr, IN_BLOCK: tl.constexpr, UPCAST: tl.constexpr,
    MULTIPLY: tl.constexpr,
):  # fmt: skip
    """One program: the share of PIXELS pixels in one tap's weights, OUT_BLOCK × IN_BLOCK of them.

    Args:
        dz_ptr: (N, O, H, W) with strides.
        x_ptr: (N, I, H, W) with strides.
        partial_ptr: (shares, 9, O, I) fp32.
        pixels: of all images.
        height: H.
        width: W.
        in_channels: I.
        out_channels: O.
        PIXELS: of a share, a multiple of STEP.
        STEP: pixels of one multiplication.
        UPCAST: multiply in fp32, for the interpreter's bf16.
        MULTIPLY: tl.dot's input_precision, "ieee" or "tf32"; for 16-bit operands without effect.
    """
    tap = tl.program_id(0) % 9
    block = tl.program_id(0) // 9
    across = tl.cdiv(in_channels, IN_BLOCK)
    o = block // across * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    i = block % across * IN_BLOCK + tl.arange(0, IN_BLOCK)
    here = o < out_channels
    there = i < in_channels
    dz_channels = dz_ptr + (o.to(tl.int64) * dz_c)[None, :]
    x_channels = x_ptr + (i.to(tl.int64) * x_c)[None, :]
    total = tl.zeros((OUT_BLOCK, IN_BLOCK), tl.float32)
    for step in tl.range(0, PIXELS, STEP):
        pixel = tl.program_id(1) * PIXELS + step + tl.arange(0, STEP)
        n = (pixel // (height * width)).to(tl.int64)
        h = pixel % (height * width) // width
        w = pixel % width
        row = h + tap // 3 - 1
        column = w + tap % 3 - 1
        # As unsigned numbers, -1 is past the last row too. Past the last pixel dz is zero, and that is enough.
        inside = (row.to(tl.uint32) < height.to(tl.uint32)) & (column.to(tl.uint32) < width.to(tl.uint32))
        inside &= pixel < pixels
        dz_place = (n * dz_n + h.to(tl.int64) * dz_h + w.to(tl.int64) * dz_w)[:, None]
        x_place = (n * x_n + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w)[:, None]
        dz = tl.load(dz_channels + dz_place, mask=(pixel < pixels)[:, None] & here[None, :], other=0.0)
        x = tl.load(x_channels + x_place, mask=inside[:, None] & there[None, :], other=0.0)
        if UPCAST:
            dz = dz.to(tl.float32)
            x = x.to(tl.float32)
        total = tl.dot(dz.T, x, total, input_precision=MULTIPLY)
    share = tl.program_id(1).to(tl.int64) * 9 + tap
    weights = (share * out_channels + o)[:, None] * in_channels + i[None, :]
    tl.store(partial_ptr + weights, total, mask=here[:, None] & there[None, :])


@torch.library.custom_op("unet_kernels::conv_weight_gradient", mutates_args=())
def conv_weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    """Compute dW where z = conv3×3(x) with padding 1.

    Args:
        dz: (N, O, H, W) in fp16, bf16 or fp32, any strides; channels_last is the fast layout.
        x: (N, I, H, W) in dz's dtype, any strides.

    Returns:
        (O, I, 3, 3) fp32, the same at every call.

    Raises:
        NotImplementedError: dz is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    _check(dz, x)
    if dz.numel() == 0 or x.numel() == 0:
        return _output(dz, x).zero_()
    capability, gpu = place(dz.device)
    problem = _problem((dz, x))
    return _run(dz, x, settings=settings_for(problem, capability, gpu), problem=problem)


@conv_weight_gradient.register_fake
def _(dz: Tensor, x: Tensor) -> Tensor:
    _check(dz, x)
    return _output(dz, x)


@register_flop_formula(torch.ops.unet_kernels.conv_weight_gradient)
def _flop_formula(dz: torch.Size, x: torch.Size, *_: object, out_shape: object = None, **__: object) -> int:  # noqa: ARG001
    return 18 * math.prod(dz) * x[1]


def measured_faster(dz: Tensor, x: Tensor) -> bool:
    """Whether tuning on this GPU found this kernel faster than PyTorch's own, for just these sizes."""
    if dz.is_meta or not all(isinstance(size, int) for size in (*dz.shape, x.shape[1])):  # traced for any size
        return False
    _, gpu = place(dz.device)
    return _problem((dz, x)) in measured(gpu, NAME)


def by_pytorch(dz: Tensor, x: Tensor) -> Tensor:
    """The same by PyTorch's own operation, in the dtype of its arguments."""
    stride = padding = dilation = [1, 1]
    transposed, wanted = False, [False, True, False]
    # The weight's values are not read: without the input's gradient its shape alone counts.
    weight = x.new_empty((dz.shape[1], x.shape[1], 3, 3))
    geometry = (None, stride, padding, dilation, transposed, [0, 0], 1)
    found: Tensor = torch.ops.aten.convolution_backward(dz, x, weight, *geometry, wanted)[1]
    return found


def settings_for(problem: Problem, capability: int, gpu: str | None = None) -> Settings:
    """Settings measured for just this problem, or the default: chosen from what compiles without spills, not timed."""
    return measured(gpu, NAME).get(problem) or _default(problem, capability)


def candidates(problem: Problem, capability: int, *, compiled: bool = True) -> list[Settings]:
    """Settings worth measuring, the shipped ones first; with `compiled` less those that compile badly."""
    shipped = _default(problem, capability)
    found = {shipped: None}
    pixels = shipped.rows * shipped.columns
    blocks = [(o, i) for o, i in itertools.product((64, 128), (64, 128)) if o < 2 * problem.out_channels]
    for (o, i), warps, stages, share in itertools.product(blocks, (4, 8), (2, 3), (pixels // 4, pixels, 4 * pixels)):
        if i < 2 * max(problem.in_channels, 64) and _FEWEST <= share <= _MOST:
            found[_cut(share, o, i, warps, stages)] = None
    return [cut for cut in found if not compiled or compiles_well(problem, cut, capability, _compilation)]


def _default(problem: Problem, capability: int) -> Settings:
    o, i = (max(16, 1 << (channels - 1).bit_length()) for channels in (problem.out_channels, problem.in_channels))
    largest = 64 if problem.precision == "fp32" else 128
    o, i = min(o, largest), min(i, largest)
    if capability == INTERPRETER:  # several shares of a small picture, several steps of a share
        return _cut(min(128, max(16, 1 << (_pixels(problem) - 1).bit_length())), o, i, 4, 1)
    programs = 9 * -(-problem.out_channels // o) * -(-problem.in_channels // i)
    wanted = max(1, _pixels(problem) * programs // _PROGRAMS)
    share = min(max(1 << wanted.bit_length() - 1, _FEWEST), _MOST)
    return _cut(share, o, i, 8 if o * i > 64 * 128 or problem.precision == "fp32" else 4, 3)


def _cut(pixels: int, out_block: int, in_block: int, warps: int, stages: int) -> Settings:
    columns = min(pixels, 256)
    rows = pixels // columns
    return Settings(
        family="pointer",
        rows=rows,
        columns=columns,
        out_block=out_block,
        in_block=in_block,
        warps=warps,
        stages=stages,
    )


def _pixels(problem: Problem) -> int:
    return problem.batch * problem.height * problem.width


def _check(dz: Tensor, x: Tensor) -> None:
    torch._check(  # noqa: SLF001 - the way to check in a fake kernel
        dz.dim() == x.dim() == 4 and dz.shape[0] == x.shape[0] and dz.shape[2:] == x.shape[2:],  # noqa: PLR2004
        lambda: f"{NAME} takes dz (N, O, H, W) and x (N, I, H, W); given {tuple(dz.shape)} and {tuple(x.shape)}",
    )
    torch._check(  # noqa: SLF001
        dz.dtype == x.dtype and dz.dtype in DTYPES.values(),
        lambda: f"{NAME} takes fp16, bf16 or fp32, one of them; given {dz.dtype} and {x.dtype}",
    )
    torch._check(  # noqa: SLF001
        dz.device == x.device, lambda: f"dz is on {dz.device}, x on {x.device}: put them on one device"
    )


def _output(dz: Tensor, x: Tensor) -> Tensor:
    return dz.new_empty((dz.shape[1], x.shape[1], 3, 3), dtype=torch.float32)


def _problem(arguments: tuple[Any, ...]) -> Problem:
    dz, x = arguments
    n, o, h, w = dz.shape
    precision = precision_of(dz.dtype)
    return Problem(batch=n, height=h, width=w, in_channels=x.shape[1], out_channels=o, precision=precision)


def _run(dz: Tensor, x: Tensor, *, settings: Settings, problem: Problem) -> Tensor:
    o, i = problem.out_channels, problem.in_channels
    shares = -(-_pixels(problem) // (settings.rows * settings.columns))
    partial = dz.new_empty((shares, 9, o, i), dtype=torch.float32)
    options = _constants(problem, settings) | {"num_warps": settings.warps, "num_stages": settings.stages}
    options["UPCAST"] = problem.precision == "bf16" and interpreting()
    grid = (9 * -(-o // settings.out_block) * -(-i // settings.in_block), shares)
    launch(sums_of_pixels, grid, dz.device, *_arguments(dz, x, partial, problem).values(), **options)
    return partial.sum(0).view(3, 3, o, i).permute(2, 3, 0, 1).contiguous()


def _arguments(dz: Tensor, x: Tensor, partial: Tensor, problem: Problem) -> dict[str, Any]:
    tensors = {"dz_ptr": dz, "x_ptr": x, "partial_ptr": partial, "pixels": _pixels(problem)}
    sizes = {"height": problem.height, "width": problem.width}
    channels = {"in_channels": problem.in_channels, "out_channels": problem.out_channels}
    return tensors | sizes | channels | strides("dz", dz) | strides("x", x)


def _constants(problem: Problem, settings: Settings) -> dict[str, Any]:
    pixels = settings.rows * settings.columns
    blocks = {"PIXELS": pixels, "STEP": min(_STEP[problem.precision], pixels)}
    blocks |= {"OUT_BLOCK": settings.out_block, "IN_BLOCK": settings.in_block}
    return blocks | {"UPCAST": False, "MULTIPLY": "ieee" if problem.precision == "fp32" else "tf32"}


def _compilation(problem: Problem, settings: Settings) -> Compilation:
    def like(channels: int) -> Tensor:
        sizes = (problem.batch, problem.height, problem.width, channels)
        return nhwc(torch.empty_strided, *sizes, dtype=DTYPES[problem.precision], device="meta")

    dz, x = like(problem.out_channels), like(problem.in_channels)
    arguments = _arguments(dz, x, torch.empty(0, device="meta"), problem)
    constants = _constants(problem, settings)
    return ahead(sums_of_pixels, arguments, constants, warps=settings.warps, stages=settings.stages)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    dz, x = arguments
    return lambda: _run(dz, x, settings=settings, problem=problem)


def _inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    like_dz = dataclasses.replace(problem, in_channels=problem.out_channels, out_channels=1)
    dz, x = (convolution.inputs(one, device, generator)[0] for one in (like_dz, problem))
    return dz, x


def _bytes(problem: Problem) -> int:
    """Read dz and x once, write dW in fp32 once; the shares, which a cache may hold, are not counted."""
    o, i = problem.out_channels, problem.in_channels
    return _pixels(problem) * (o + i) * ITEM_BYTES[problem.precision] + 4 * 9 * o * i


# Every source of every convolution has a part of its weight.
LAYERS = tuple(
    dict.fromkeys(
        alone(layer, in_channels=channels, out_channels=layer.out_channels)
        for layer in unet_layers(batch=16)
        for channels in (layer.first_channels, layer.second_channels)
        if channels
    )
)
# Shares that end within a row and within an image, one pixel, none, more channels than a block.
_SIZES = ((2, 7, 11, 24, 40), (1, 1, 1, 1, 1), (0, 8, 16, 16, 16), (1, 3, 4, 140, 8), (1, 2, 3, 5, 4))

KERNEL = Kernel(
    name=NAME,
    op=conv_weight_gradient,
    reference=by_pytorch,
    inputs=_inputs,
    problem=_problem,
    flops=convolution.flops,
    bytes=_bytes,
    depth=_pixels,
    edges=tuple(
        Problem(batch=n, height=h, width=w, in_channels=i, out_channels=o, precision=precision)
        for precision, (n, h, w, i, o) in tried(_SIZES)
    ),
    layers=LAYERS,
    settings=settings_for,
    candidates=candidates,
    compilation=_compilation,
    launcher=_launcher,
    constants=frozenset({"dz", "x"}),
    compiled=extremes(LAYERS),
    rival=by_pytorch,
)
