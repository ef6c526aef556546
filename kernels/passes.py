"""What the passes over a raw convolution share beside it: how they are cut, launched, checked, counted and tried.

In `Settings` a program has `rows × columns` windows of 2×2 pixels (`kernels.windows`); `in_block` has no meaning.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name

from kernels.convolve import nhwc, strides
from kernels.launch import ahead, interpreting, launch, place
from kernels.problem import DTYPES, INTERPRETER, ITEM_BYTES, Problem, Settings, precision_of
from kernels.spec import Kernel, tried
from kernels.unet_layers import alone, extremes, unet_layers

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.spec import Compilation

EPS = 1e-5  # of the tables that the kernels are tried with

# Of whole and cut windows more than a program's, a picture without one, two blocks of channels, none.
_SIZES = (
    *((2, 7, 9, 3, True), (1, 1, 6, 8, True), (1, 3, 2, 72, False), (0, 8, 8, 16, True)),
    *((1, 3, 4, 4, True), (1, 2, 3, 4, False)),
)
EDGES = tuple(
    Problem(batch=n, height=h, width=w, in_channels=c, out_channels=c, precision=precision, pool=pool)
    for precision, (n, h, w, c, pool) in tried(_SIZES)
)
# Behind every convolution of the U-Net; their code is the same for all widths of a block.
LAYERS = tuple(
    dict.fromkeys(
        alone(layer, in_channels=layer.out_channels, out_channels=layer.out_channels, pool=layer.pool)
        for layer in unet_layers(batch=16)
    )
)


def count(problem: Problem) -> int:
    """Windows of all images, those cut at an odd edge among them."""
    return problem.batch * -(-problem.height // 2) * -(-problem.width // 2)


def problem_of(z: Tensor, *, pool: bool) -> Problem:
    """The problem of a pass over `z` (N, C, H, W)."""
    n, c, h, w = z.shape
    precision = precision_of(z.dtype)
    return Problem(batch=n, height=h, width=w, in_channels=c, out_channels=c, precision=precision, pool=pool)


def problem_of_gradients(arguments: tuple[Any, ...]) -> Problem:
    """The problem of a pass whose arguments begin with `dy`, `pooled` and `z`."""
    _, pooled, z, *_ = arguments
    return problem_of(z, pool=pools(pooled))


def shipped(z: Tensor, *, pool: bool) -> tuple[Problem, Settings]:
    """The problem of a pass over `z`, and the settings it has where `z` is.

    Raises:
        NotImplementedError: neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
    """
    problem = problem_of(z, pool=pool)
    capability, _ = place(z.device)
    return problem, settings_for(problem, capability)


def blocks(problem: Problem, settings: Settings) -> tuple[int, int]:
    """Programs along windows and along channels."""
    return -(-count(problem) // (settings.rows * settings.columns)), -(-problem.out_channels // settings.out_block)


def run(kernel: Any, arguments: dict[str, Any], options: dict[str, Any], problem: Problem, settings: Settings) -> None:  # noqa: ANN401
    """Launch `kernel` over every window and channel.

    Args:
        kernel: a function under `@triton.jit`.
        arguments: tensors and strides by name; sizes are added.
        options: its own constants.
        problem: sizes and precision.
        settings: how it is cut.
    """
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    given = _with_sizes(kernel, arguments, problem)
    options = constants(options, settings) | {"num_warps": settings.warps, "num_stages": settings.stages}
    options["UPCAST"] = problem.precision == "bf16" and interpreting()
    launch(kernel, blocks(problem, settings), device, *given.values(), **options)


def compilation(
    kernel: Any,  # noqa: ANN401
    arguments: dict[str, Any],
    options: dict[str, Any],
    problem: Problem,
    settings: Settings,
) -> Compilation:
    """What Triton would compile for `run` with these arguments, whose tensors may be on "meta"."""
    given = _with_sizes(kernel, arguments, problem)
    return ahead(kernel, given, constants(options, settings), warps=settings.warps, stages=settings.stages)


def constants(options: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A pass's compile-time constants on a GPU."""
    windows = settings.rows * settings.columns
    return {"WINDOWS": windows, "OUT_BLOCK": settings.out_block, "UPCAST": False} | options


def settings_for(problem: Problem, capability: int, *_: object, **__: object) -> Settings:
    """The same for every GPU: what a thread holds is few registers, and memory sets the pace."""
    out_block = min(64, max(16, 1 << (problem.out_channels - 1).bit_length()))
    if capability == INTERPRETER:  # its time goes by programs: one, but a few where a picture has a few windows
        return _cut(16 if count(problem) <= 48 else 256, out_block, 4)  # noqa: PLR2004
    if problem.out_channels % 16:  # each element has an address of its own: twice as many would spill
        return _cut(16, 16, 4)
    return _cut(1024 // out_block, out_block, 4)


def candidates(problem: Problem, capability: int, *, compiled: bool = True) -> list[Settings]:  # noqa: ARG001 - as the registry calls it; none of them spills
    """Settings worth measuring, the shipped ones first."""
    found = {settings_for(problem, capability): None}
    for windows, out_block, warps in itertools.product((16, 32, 64), (16, 32, 64, 128), (4, 8)):
        if out_block < 2 * max(16, problem.out_channels):
            found[_cut(windows, out_block, warps)] = None
    return list(found)


def _cut(windows: int, out_block: int, warps: int) -> Settings:
    return Settings(
        family="pointer", rows=2, columns=windows // 2, out_block=out_block, in_block=16, warps=warps, stages=1
    )


def _with_sizes(kernel: Any, arguments: dict[str, Any], problem: Problem) -> dict[str, Any]:  # noqa: ANN401
    sizes = {"height": problem.height, "width": problem.width, "channels": problem.out_channels}
    given = arguments | sizes | {"windows": count(problem)}
    return {name: given.get(name) for name in kernel.arg_names if not name.isupper()}


def inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A raw convolution z and the table of its own moments, γ and β: random, means away from zero."""
    n, h, w, c = problem.batch, problem.height, problem.width, problem.out_channels
    z = torch.randn(n, c, h, w, generator=generator) + torch.randn(c, generator=generator)[:, None, None]
    z = z.to(DTYPES[problem.precision])
    gamma, beta = torch.rand(c, generator=generator) + 0.5, torch.randn(c, generator=generator) / 2
    mean, var = (z.float().mean((0, 2, 3)), z.float().var((0, 2, 3), correction=0)) if n else (0 * beta, 0 * beta + 1)
    table = torch.stack([mean, (var + EPS).rsqrt(), gamma, beta])
    return dense(z).to(device), table.to(device)


def gradients(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gradients of the features and, with `problem.pool`, of their maxima."""
    n, h, w, c = problem.batch, problem.height, problem.width, problem.out_channels
    shapes = ((n, c, h, w), (n, c, h // 2, w // 2) if problem.pool else (n, c, 0, 0))
    dtype = DTYPES[problem.precision]
    dy, pooled = (dense(torch.randn(shape, generator=generator).to(dtype)).to(device) for shape in shapes)
    return dy, pooled


def dense(tensor: Tensor) -> Tensor:
    """`tensor` (N, C, H, W) in channels_last memory, whatever its sizes."""
    n, c, h, w = tensor.shape
    return nhwc(tensor.new_empty_strided, n, h, w, c).copy_(tensor)


def check(name: str, z: Tensor, table: Tensor) -> None:
    """Refuse tensors that do not belong together.

    Raises:
        RuntimeError: naming what was given and what is taken.
    """
    torch._check(  # noqa: SLF001 - the way to check in a fake kernel
        z.dim() == 4 and z.dtype in DTYPES.values(),  # noqa: PLR2004
        lambda: f"{name} takes z (N, C, H, W) in fp16, bf16 or fp32; given {tuple(z.shape)} {z.dtype}",
    )
    torch._check(  # noqa: SLF001
        z.permute(0, 2, 3, 1).is_contiguous(),
        lambda: f"{name} takes z in channels_last memory; given strides {z.stride()} for {tuple(z.shape)}",
    )
    torch._check(  # noqa: SLF001
        tuple(table.shape) == (4, z.shape[1]) and table.dtype == torch.float32 and table.is_contiguous(),
        lambda: f"{name} takes a table (4, {z.shape[1]}) in fp32; given {tuple(table.shape)} {table.dtype}",
    )
    torch._check(  # noqa: SLF001
        z.device == table.device, lambda: f"z is on {z.device}, the table on {table.device}: put them on one device"
    )


def check_gradients(name: str, dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor) -> None:
    """Refuse what `check` does, and gradients that are not those of z's features and maxima.

    Raises:
        RuntimeError: naming what was given and what is taken.
    """
    check(name, z, table)
    n, c, h, w = z.shape
    torch._check(  # noqa: SLF001
        dy.shape == z.shape and dy.dtype == pooled.dtype == z.dtype and dy.device == pooled.device == z.device,
        lambda: (
            f"{name} takes dy like z, {tuple(z.shape)} {z.dtype} on {z.device}; "
            f"given {tuple(dy.shape)} {dy.dtype} on {dy.device}, maxima {pooled.dtype} on {pooled.device}"
        ),
    )
    torch._check(  # noqa: SLF001
        pooled.numel() == 0 or tuple(pooled.shape) == (n, c, h // 2, w // 2),
        lambda: f"{name} takes d of maxima {(n, c, h // 2, w // 2)}, or none; given {tuple(pooled.shape)}",
    )


def bytes_moved(problem: Problem, *, tensors: int, maxima: int, rows: int) -> int:
    """Of a pass over `tensors` like z, `maxima` like the pooled ones, and `rows` of fp32 for each channel."""
    n, h, w, c = problem.batch, problem.height, problem.width, problem.out_channels
    small = (h // 2) * (w // 2) if problem.pool else 0
    return n * c * (tensors * h * w + maxima * small) * ITEM_BYTES[problem.precision] + 4 * rows * c


def depth(_: Problem) -> int:
    """Products and sums one after the other in an element: what its tolerance grows with."""
    return 4


def no_flops(_: Problem) -> int:
    """PyTorch counts convolutions alone."""
    return 0


def like_inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dy`, `pooled`, `z` and `table` of a problem on "meta": what compilations are told."""
    n, h, w, c = problem.batch, problem.height, problem.width, problem.out_channels
    sides = (h // 2, w // 2) if problem.pool else (0, 0)
    dtype = DTYPES[problem.precision]
    dy, pooled, z = (
        nhwc(torch.empty_strided, n, *size, c, dtype=dtype, device="meta") for size in ((h, w), sides, (h, w))
    )
    return dy, pooled, z, torch.empty(4, c, device="meta")


def pools(pooled: Tensor) -> bool:
    """Whether these are maxima, or what stands for none: (N, C, 0, 0)."""
    return tuple(pooled.shape[2:]) != (0, 0)


def gradient_arguments(dy: Tensor, pooled: Tensor) -> dict[str, Any]:
    """What `gradient_at` reads: tensors and strides by name, nothing of maxima where there are none."""
    given = {"dy_ptr": dy, "pooled_ptr": pooled if pooled.numel() else None} | strides("dy", dy)
    return given | (strides("pooled", pooled) if pooled.numel() else {})


def gradient_of(dy: Tensor, pooled: Tensor, z: Tensor, table: Tensor, *, relu: bool) -> Tensor:
    """The gradient of (z - μ) / σ · γ + β in plain PyTorch, from those of its ReLU and of the maxima of that."""
    mean, inverse, gamma, beta = (row[:, None, None] for row in table)
    features = ((z - mean) * inverse * gamma + beta).detach()
    features = F.relu(features) if relu else features
    if pooled.numel():
        _, indices = F.max_pool2d_with_indices(features, (2, 2))
        geometry = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # kernel, stride, padding, dilation, ceil mode
        pooled = pooled.to(features.dtype)
        dy = dy + torch.ops.aten.max_pool2d_with_indices_backward(pooled, features, *geometry, indices)
    return torch.where(features <= 0, 0, dy) if relu else dy


def pooled_of(y: Tensor) -> Tensor:
    """max_pool2(y), without an error where no window fits."""
    small = y.shape[2] < 2 or y.shape[3] < 2  # noqa: PLR2004 - a window; PyTorch refuses a picture without one
    return y[:, :, : y.shape[2] // 2, : y.shape[3] // 2] if small else F.max_pool2d(y, 2)


Pass = functools.partial(
    Kernel,
    flops=no_flops,
    depth=depth,
    edges=EDGES,
    layers=LAYERS,
    compiled=extremes(LAYERS),
    settings=settings_for,
    candidates=candidates,
)
"""A pass's entry of the registry, less what is its own."""
