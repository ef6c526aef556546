"""Launch the implicit GEMM, and say what a launch compiles to: tensors and settings in, arguments out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import implicit_gemm
from kernels.launch import ahead, interpreting, launch
from kernels.packing import Packed
from kernels.problem import DTYPES, Family, Problem, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.spec import Compilation

_ALIGNMENT = 16  # bytes, of a descriptor's base and strides
_LARGEST_32_BIT = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """What a launch reads and writes beside its parameters, logical NCHW.

    Attributes:
        x: (N, I - second channels, H, W), any strides.
        y: (N, O, H, W) channels_last; None where only logits are written.
        second: (N, second channels, h, w), any strides; with `Problem.upsample` before it is interpolated.
        top: row of x at which `second`, interpolated if it is to be, begins.
        left: column of x at which it begins.
        pooled: (N, O, H // 2, W // 2) channels_last.
        logits: (N, classes, H, W), any strides.
        moments: (tiles, 3, O) fp32: pixels, sum and squared distances from its mean of each tile of y.
    """

    x: Tensor
    y: Tensor | None = None
    second: Tensor | None = None
    top: int = 0
    left: int = 0
    pooled: Tensor | None = None
    logits: Tensor | None = None
    moments: Tensor | None = None

    @property
    def family(self) -> Family:
        """How both sources can be read."""
        sources = (self.x,) if self.second is None else (self.x, self.second)
        return "tma" if all(family_of(source) == "tma" for source in sources) else "pointer"


def family_of(x: Tensor) -> Family:
    """Say "tma" where descriptors can read x (N, I, H, W), else "pointer".

    They need channels side by side, then columns, rows and images in this order without overlap, and the base and every
    stride at multiples of 16 bytes.
    """
    reach = x.shape[1]
    for axis in (3, 2, 0):
        if x.shape[axis] > 1:
            if x.stride(axis) < reach or x.stride(axis) * x.element_size() % _ALIGNMENT:
                return "pointer"
            reach = x.stride(axis) * x.shape[axis]
    return "tma" if x.stride(1) == 1 and x.data_ptr() % _ALIGNMENT == 0 else "pointer"


def run(operands: Operands, parameters: Packed, *, relu: bool, settings: Settings, problem: Problem) -> None:
    """Launch the kernel with exactly these settings: what the op, the tuner and tests of one family call.

    Args:
        operands: N, H and W ≥ 1.
        parameters: packed in x's dtype, on x's device.
        relu: whether negative results become zero.
        settings: family "tma" only where `operands.family` says so.
        problem: the sizes of these tensors; its precision says how fp32 is multiplied.
    """
    kernel, arguments = _arguments(operands, parameters, settings, problem)
    options = constants(problem, settings) | {"RELU": relu, "num_warps": settings.warps, "num_stages": settings.stages}
    options["POOL"] = arguments["pooled_boxes" if settings.family == "tma" else "pooled_ptr"] is not None
    options["UPCAST"] = problem.precision == "bf16" and interpreting()
    if settings.family == "pointer":
        options["WIDE"] = passes_32_bits(operands.x, operands.second, operands.y)
    grid = (settings.tiles(problem), -(-problem.out_channels // settings.out_block))
    launch(kernel, grid, operands.x.device, *arguments.values(), **options)


def constants(problem: Problem, settings: Settings) -> dict[str, Any]:
    """The loops' compile-time constants for a problem of usual size, with ReLU, on a GPU."""
    shared = {
        "IN_CHANNELS": problem.in_channels,
        "SECOND": problem.second_channels,
        "UPSAMPLE": problem.upsample,
        "ROWS": settings.rows,
        "COLUMNS": settings.columns,
        "OUT_BLOCK": settings.out_block,
        "IN_BLOCK": settings.in_block,
        "RELU": True,
        "UPCAST": False,
        "POOL": problem.pool,
        "CLASSES": problem.classes,
    }
    if settings.family == "tma":
        return shared
    return shared | {"WIDE": False, "MULTIPLY": "ieee" if problem.precision == "fp32" else "tf32"}


def compilation(problem: Problem, settings: Settings, *, raw: bool = False, moments: bool = False) -> Compilation:
    """What Triton would compile for a launch on dense channels_last tensors, 16-byte aligned, of `problem`.

    Args:
        problem: its sizes.
        settings: how it is cut.
        raw: the sums themselves, without BatchNorm, bias or ReLU.
        moments: their moments as well.
    """
    dtype = DTYPES[problem.precision]

    def pixels(channels: int, *, halved: bool = False) -> Tensor:
        height, width = (size // 2 if halved else size for size in (problem.height, problem.width))
        return nhwc(torch.empty_strided, problem.batch, height, width, channels, dtype=dtype, device="meta")

    o, i, classes = problem.out_channels, problem.in_channels, problem.classes
    operands = Operands(
        x=pixels(problem.first_channels),
        second=pixels(problem.second_channels, halved=problem.upsample) if problem.second_channels else None,
        y=None if classes else pixels(o),
        pooled=pixels(o, halved=True) if problem.pool else None,
        logits=pixels(classes) if classes else None,
        moments=torch.empty(settings.tiles(problem), 3, o, device="meta") if moments else None,
    )
    vector = torch.empty(o, device="meta")
    parameters = Packed(
        torch.empty(3, 3, o, i, dtype=dtype, device="meta"),
        *((None, None) if raw else (vector, vector)),
        *((torch.empty(classes, o, device="meta"), torch.empty(classes, device="meta")) if classes else ()),
    )
    kernel, arguments = _arguments(operands, parameters, settings, problem)
    fixed = constants(problem, settings) | {"RELU": not raw}
    return ahead(kernel, arguments, fixed, warps=settings.warps, stages=settings.stages)


def nhwc(make: Any, n: int, h: int, w: int, c: int, **options: Any) -> Tensor:  # noqa: ANN401
    """A tensor (N, C, H, W), channels_last whatever its sizes, from `make(shape, strides, **options)`.

    Not a permuted one: autograd lets nobody write into a view that an op hands out.
    """
    made: Tensor = make((n, c, h, w), (h * w * c, 1, w * c, c), **options)
    return made


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """`name_n`, `name_c`, `name_h`, `name_w` of a tensor (N, C, H, W)."""
    return {f"{name}_{axis}": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}


def boxes(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of `tensor`, whose last dimension is dense, in boxes of `block`."""
    # PyTorch gives a dimension of size 1 any stride; a descriptor takes multiples of 16 bytes alone.
    strides: list[int] = []
    dense = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        strides.append(stride if size > 1 else dense)
        dense = size * strides[-1]
    return TensorDescriptor(tensor, list(tensor.shape), strides[::-1], block)


def _arguments(
    operands: Operands, parameters: Packed, settings: Settings, problem: Problem
) -> tuple[Any, dict[str, Any]]:
    """The function to launch and its run-time arguments in order; None for what this problem does not have."""
    x, second, y, pooled, logits = operands.x, operands.second, operands.y, operands.pooled, operands.logits
    if pooled is not None and pooled.numel() == 0:
        pooled = None  # a picture of one row has no window
    sizes = {"height": problem.height, "width": problem.width, "out_channels": problem.out_channels}
    given: dict[str, Any] = {"scale_ptr": parameters.scale, "shift_ptr": parameters.shift}
    given |= {"head_weight_ptr": parameters.head_weight, "head_bias_ptr": parameters.head_bias, "logits_ptr": logits}
    given["moments_ptr"] = operands.moments
    if logits is not None:
        given |= strides("logits", logits)
    if settings.family == "tma":
        kernel: Any = implicit_gemm.descriptors
        tile = [1, settings.rows, settings.columns]
        given["x_boxes"] = boxes(x.permute(0, 2, 3, 1), [*tile, settings.in_block])
        weight = parameters.weight.reshape(9, problem.out_channels, problem.in_channels)
        given["weight_boxes"] = boxes(weight, [1, settings.out_block, settings.in_block])
        given["y_boxes"] = None if y is None else boxes(y.permute(0, 2, 3, 1), [*tile, settings.out_block])
        if pooled is not None:
            window = [1, settings.rows // 2, settings.columns // 2, settings.out_block]
            given["pooled_boxes"] = boxes(pooled.permute(0, 2, 3, 1), window)
    else:
        kernel = implicit_gemm.pointers
        given |= {"x_ptr": x, "weight_ptr": parameters.weight, "y_ptr": y, "pooled_ptr": pooled}
        given |= strides("stride", x)
    if second is not None:
        given |= {"second": second, "top": operands.top, "left": operands.left}
        if problem.upsample or settings.family == "pointer":
            given |= strides("second", second)
            given |= {"second_height": second.shape[2], "second_width": second.shape[3]}
        else:
            given["second"] = boxes(second.permute(0, 2, 3, 1), [*tile, settings.in_block])
        if problem.upsample:
            given |= {"scale_h": _scale(second.shape[2]), "scale_w": _scale(second.shape[3])}
    given |= sizes
    return kernel, {name: given.get(name) for name in kernel.arg_names if not name.isupper()}


def _scale(size: int) -> float:
    # Of a picture of `size` in one of twice the size whose corners are the same.
    return (size - 1) / (2 * size - 1)


def passes_32_bits(*tensors: Tensor | None) -> bool:
    """Whether offsets within one image of any of these pass 2^31 elements.

    A tile computes addresses up to its own size past the last element, masked: they must not wrap either.
    """
    within = (zip(tensor.shape[1:], tensor.stride()[1:], strict=True) for tensor in tensors if tensor is not None)
    return any(sum((size + 512) * stride for size, stride in sides) > _LARGEST_32_BIT for sides in within)
