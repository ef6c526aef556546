"""relu(BatchNorm(conv3×3([x, up(low)]))) as one kernel, up() a transposed 2×2 convolution that is folded into the next.

The op is `torch.ops.unet_kernels.conv_bn_relu_up`. Nothing stands between the two convolutions, so they are one linear
map. Of the pixels whose row and column have the same parities, each sees 2×2 pixels of `low`, through weights that are
sums of products of the two layers' own: four small convolutions of 4 taps instead of a map of four times the pixels
that is written, and read through 9. At 64 channels a pixel takes 8 · 64 products instead of 11 · 64.

The sums are rounded to the arithmetic's dtype where eager rounds both weights and the map between: no more, but other
roundings. So it is a choice (`kernels.fuse(model, fold_transposed=True)`).
"""
# ruff: noqa: PLR0913, PLR0917 - one argument for each parameter of the layers
# ruff: noqa: FBT001 - an op's schema has positional arguments

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import candidates as shared_candidates
from kernels import conv_transpose, convolution, folded_gemm, gradient, two_sources
from kernels import settings as shared_settings
from kernels.convolve import boxes, family_of, nhwc, passes_32_bits, strides
from kernels.folded_packing import Packed, Sources
from kernels.launch import ahead, interpreting, launch, place
from kernels.packing import packed
from kernels.problem import DTYPES, ITEM_BYTES, Family, Problem, Settings
from kernels.spec import Compilation, Kernel
from kernels.unet_layers import FOLDED_LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "conv_bn_relu_up"


@torch.library.custom_op("unet_kernels::conv_bn_relu_up", mutates_args=())
def conv_bn_relu_up(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    low: Tensor,
    placement: str,
    up_weight: Tensor,
    up_bias: Tensor | None,
) -> Tensor:
    """Compute relu(γ · (conv3×3([x, up]) + bias - mean) / √(var + eps) + β), up = conv_transpose2d(low, stride=2).

    Args:
        x: (N, C, H, W) in fp16, bf16 or fp32, any strides, N ≥ 0, H and W ≥ 1; channels_last is the fast layout.
        weight: (O, C + U, 3, 3), any floating dtype.
        bias: (O,) or None, the convolution's.
        mean: (O,), BatchNorm's running mean.
        var: (O,), BatchNorm's running variance.
        gamma: (O,) or None, BatchNorm's weight.
        beta: (O,) or None, BatchNorm's bias.
        eps: added to the variance.
        relu: whether negative results become zero.
        low: (N, L, h, w) in x's dtype, any strides.
        placement: where the upsampled map lies in x's H×W, as for `conv_bn_relu`. Where it is larger than that and
            would be cropped, it is made by itself.
        up_weight: (L, U, 2, 2), any floating dtype.
        up_bias: (U,) or None.

    Returns:
        (N, O, H, W) in x's dtype, channels_last.

    Raises:
        NotImplementedError: x is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    _check(x, weight, mean, low, placement, up_weight)
    layers = (weight, bias, mean, var, gamma, beta, eps)
    if min(_missing(x, low)) < 0:
        up = torch.ops.unet_kernels.conv_transpose(low, up_weight, up_bias)
        joined: Tensor = torch.ops.unet_kernels.conv_bn_relu(x, *layers, relu, up, placement)
        return joined
    y = _output(x, weight)
    if x.shape[0] > 0:
        capability, gpu = place(x.device)
        problem = problem_of(x, weight, low)
        settings = settings_for(problem, capability, gpu, family=_family(x, low))
        ready = packed(Sources(*layers, up_weight, up_bias), x.dtype)
        run(x, low, ready, y, placement=placement, relu=relu, settings=settings, problem=problem)
    return y


@conv_bn_relu_up.register_fake
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
    low: Tensor,
    placement: str,
    up_weight: Tensor,
    up_bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    _check(x, weight, mean, low, placement, up_weight)
    return _output(x, weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - autograd's
    *layers, ctx.eps, ctx.relu = inputs[:9]
    low, ctx.placement, *up = inputs[9:]
    ctx.save_for_backward(*layers, low, *up)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    *layers, low, up_weight, up_bias = ctx.saved_tensors
    kernel, bias = (None if tensor is None else tensor.to(low.dtype) for tensor in (up_weight, up_bias))
    up = F.conv_transpose2d(low, kernel, bias, stride=2)  # type: ignore[arg-type] # there is a weight
    saved = (*layers, up, None, None)
    apart = {"eps": ctx.eps, "relu": ctx.relu, "placement": ctx.placement, "upsample": False, "arguments": 10}
    found = gradient.backward(SimpleNamespace(saved_tensors=saved, **apart), upstream)
    below = conv_transpose.backward(SimpleNamespace(saved_tensors=(low, up_weight, up_bias)), found[9])  # type: ignore[arg-type] # of a map that is there
    return (*found[:9], below[0], None, *below[1:])


conv_bn_relu_up.register_autograd(_backward, setup_context=_save)
convolution.cast_activations(NAME)


@register_flop_formula(torch.ops.unet_kernels.conv_bn_relu_up)
def _flop_formula(x: torch.Size, weight: torch.Size, *others: Any, out_shape: object = None, **_: object) -> int:  # noqa: ANN401, ARG001
    low = others[7]
    return _flops((x[0], x[2], x[3]), tuple(low), (weight[0], x[1]))


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    relu: bool,
    low: Tensor,
    placement: str,
    up_weight: Tensor,
    up_bias: Tensor | None,
) -> Tensor:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    up = F.conv_transpose2d(low, up_weight, up_bias, stride=2)
    source = two_sources.joined(x, up, placement, upsample=False)
    y = F.batch_norm(F.conv2d(source, weight, bias, padding=1), mean, var, gamma, beta, training=False, eps=eps)
    return F.relu(y) if relu else y


def run(
    x: Tensor,
    low: Tensor,
    parameters: Packed,
    y: Tensor,
    *,
    placement: str,
    relu: bool,
    settings: Settings,
    problem: Problem,
) -> None:
    """Launch with exactly these settings, family "tma" only where both tensors and the problem allow it."""
    kernel, arguments = _arguments(x, low, parameters, y, placement, settings, problem)
    options = _constants(problem, settings) | {"RELU": relu, "num_warps": settings.warps, "num_stages": settings.stages}
    options["UPCAST"] = problem.precision == "bf16" and interpreting()
    if settings.family == "pointer":
        options["WIDE"] = passes_32_bits(x, low, y)
    grid = (settings.tiles(_as_gemm(problem)), -(-problem.out_channels // settings.out_block))
    launch(kernel, grid, x.device, *arguments.values(), **options)


def compilation(problem: Problem, settings: Settings) -> Compilation:
    """What Triton would compile for a launch on dense channels_last tensors, 16-byte aligned, of `problem`."""
    n, h, w, o = problem.batch, problem.height, problem.width, problem.out_channels
    first, below = problem.first_channels, problem.second_channels
    options: dict[str, Any] = {"dtype": DTYPES[problem.precision], "device": "meta"}
    x, y = (nhwc(torch.empty_strided, n, h, w, channels, **options) for channels in (first, o))
    low = nhwc(torch.empty_strided, n, h // 2, w // 2, below, **options)
    weights = (torch.empty(3, 3, o, first, **options), torch.empty(2, 2, 2, 2, o, below, **options))
    vectors = (torch.empty(*shape, device="meta") for shape in ((o,), (o,), (9, o)))
    kernel, arguments = _arguments(x, low, Packed(*weights, *vectors), y, "exact", settings, problem)
    return ahead(kernel, arguments, _constants(problem, settings), warps=settings.warps, stages=settings.stages)


def _constants(problem: Problem, settings: Settings) -> dict[str, Any]:
    shared = {"FIRST": problem.first_channels, "LOW": problem.second_channels, "RELU": True, "UPCAST": False}
    shared |= {"ROWS": settings.rows, "COLUMNS": settings.columns}
    shared |= {"OUT_BLOCK": settings.out_block, "IN_BLOCK": settings.in_block}
    if settings.family == "tma":
        return shared
    return shared | {"WIDE": False, "MULTIPLY": "ieee" if problem.precision == "fp32" else "tf32"}


def _arguments(
    x: Tensor, low: Tensor, parameters: Packed, y: Tensor, placement: str, settings: Settings, problem: Problem
) -> tuple[Any, dict[str, Any]]:
    rows, columns = _missing(x, low)
    top, left = two_sources.padding(rows, placement)[0], two_sources.padding(columns, placement)[0]
    sizes = {"height": problem.height, "width": problem.width, "out_channels": problem.out_channels}
    sizes |= {"low_height": low.shape[2], "low_width": low.shape[3], "top": top, "left": left}
    vectors = {"scale_ptr": parameters.scale, "shift_ptr": parameters.shift, "border_ptr": parameters.border}
    if settings.family == "pointer":
        tensors = {"x_ptr": x, "low_ptr": low, "weight_ptr": parameters.weight, "folded_ptr": parameters.folded}
        return folded_gemm.pointers, tensors | vectors | {"y_ptr": y} | sizes | strides("stride", x) | strides(
            "low", low
        )
    tile, block = [settings.rows, 1, settings.columns], [1, settings.out_block, settings.in_block]
    return folded_gemm.descriptors, {
        "x_boxes": boxes(_by_parity(x), [1, *tile, settings.in_block]),
        "low_boxes": boxes(low.permute(0, 2, 3, 1), [1, settings.rows, settings.columns, settings.in_block]),
        "weight_boxes": boxes(parameters.weight.flatten(0, 1), block),
        "folded_boxes": boxes(parameters.folded.flatten(0, 3), block),
        **vectors,
        "y_boxes": boxes(_by_parity(y), [1, *tile, settings.out_block]),
        **sizes,
    }


def _by_parity(x: Tensor) -> Tensor:
    """(N, C, H, W) with channels side by side as (N, H / 2, 2, W / 2, 2 · C)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2 * c)


def _family(x: Tensor, low: Tensor) -> Family:
    dense = x.stride(3) == x.shape[1]  # two columns are one row of a box
    return "tma" if dense and family_of(x) == family_of(low) == "tma" else "pointer"


def settings_for(problem: Problem, capability: int, gpu: str | None = None, *, family: Family = "tma") -> Settings:
    """As `kernels.settings.settings_for`: four problems of half the height and width."""
    found = shared_settings.settings_for(_as_gemm(problem), capability, gpu, family=family, kernel=NAME)
    if _divides(found, problem):
        return found
    return shared_settings.settings_for(_as_gemm(problem), capability, gpu, family="pointer", kernel=NAME)


def candidates(problem: Problem, capability: int, *, compiled: bool = True) -> list[Settings]:
    """As `kernels.candidates.candidates`."""
    found = shared_candidates.candidates(
        _as_gemm(problem),
        capability,
        compiled=compiled,
        kernel=NAME,
        compilation=lambda _, cut: compilation(problem, cut),
    )
    return [cut for cut in found if _divides(cut, problem)]


def _divides(settings: Settings, problem: Problem) -> bool:
    """Whether pixels pair up and no box reaches into a neighbouring pixel's channels; pointers need neither."""
    even = problem.height % 2 == problem.width % 2 == 0
    whole = problem.first_channels % settings.in_block == problem.out_channels % settings.out_block == 0
    return settings.family == "pointer" or (even and whole)


def _as_gemm(problem: Problem) -> Problem:
    height, width = -(-problem.height // 2), -(-problem.width // 2)
    return dataclasses.replace(problem, batch=4 * problem.batch, height=height, width=width)


def problem_of(x: Tensor, weight: Tensor, low: Tensor) -> Problem:
    """The problem of these tensors: sizes are x's, `second_channels` those of `low`."""
    found = convolution.problem_of(x, weight, low, upsample=False, pool=False)
    return dataclasses.replace(found, in_channels=x.shape[1] + low.shape[1])


def _missing(x: Tensor, low: Tensor) -> tuple[int, int]:
    return two_sources.missing(x.shape, low.shape, upsample=True)


def _check(x: Tensor, weight: Tensor, mean: Tensor, low: Tensor, placement: str, up_weight: Tensor) -> None:
    torch._check(  # noqa: SLF001 - the way to check in a fake kernel
        up_weight.dim() == 4 and tuple(up_weight.shape[2:]) == (2, 2) and up_weight.shape[0] == low.shape[1],  # noqa: PLR2004
        lambda: f"{NAME} takes (L, U, 2, 2) for low (N, L, h, w); given {tuple(up_weight.shape)}, {tuple(low.shape)}",
    )
    torch._check(x.device == up_weight.device, lambda: f"x is on {x.device}, up_weight on {up_weight.device}")  # noqa: SLF001
    two_sources.check(x, low, placement, upsample=True)
    channels = x.shape[1] + up_weight.shape[1]
    torch._check(  # noqa: SLF001
        weight.dim() == 4 and weight.shape[1] == channels,  # noqa: PLR2004
        lambda: f"{NAME} takes a weight (O, {channels}, 3, 3) for x {tuple(x.shape)}; given {tuple(weight.shape)}",
    )
    convolution.check(NAME, x, weight[:, : x.shape[1]], mean, None, placement, upsample=False)


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return nhwc(x.new_empty_strided, x.shape[0], x.shape[2], x.shape[3], weight.shape[0])


def inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments of the op as `kernels.convolution.inputs` makes them; half as many channels come up as are below."""
    below = problem.second_channels
    half = max(1, below // 2)
    joined = dataclasses.replace(problem, in_channels=problem.first_channels + half, second_channels=half)
    *layers, _, placement, _ = convolution.inputs(joined, device, generator)
    alone = Problem(
        batch=problem.batch,
        height=max(1, problem.height // 2),
        width=max(1, problem.width // 2),
        in_channels=below,
        out_channels=half,
        precision=problem.precision,
    )
    low, up_weight, up_bias = conv_transpose.inputs(alone, device, generator)
    return (*layers, low, placement, up_weight, up_bias)


def _flops(pixels: tuple[int, int, int], low: tuple[int, ...], channels: tuple[int, int]) -> int:
    n, h, w = pixels
    o, first = channels
    _, below, low_h, low_w = low
    return 2 * n * o * (9 * first * h * w + 16 * below * low_h * low_w)


def flops(problem: Problem) -> int:
    """Of what is computed: 9 taps of x, 4 of `low` at each of its four pixels above; fewer than the layers alone."""
    low = (problem.batch, problem.second_channels, max(1, problem.height // 2), max(1, problem.width // 2))
    pixels = (problem.batch, problem.height, problem.width)
    return _flops(pixels, low, (problem.out_channels, problem.first_channels))


def bytes_moved(problem: Problem) -> int:
    """Read both maps and the folded weights once, write the result once; scale, shift and border are in fp32."""
    n, h, w, o = problem.batch, problem.height, problem.width, problem.out_channels
    first, below = problem.first_channels, problem.second_channels
    low = max(1, h // 2) * max(1, w // 2)
    elements = n * h * w * (first + o) + n * low * below + (9 * first + 16 * below) * o
    return elements * ITEM_BYTES[problem.precision] + 4 * 11 * o


def depth(problem: Problem) -> int:
    """Products summed for one result."""
    return 9 * problem.first_channels + 4 * problem.second_channels


def _problem(arguments: tuple[Any, ...]) -> Problem:
    return problem_of(arguments[0], arguments[1], arguments[9])


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    x, relu, low, placement = arguments[0], *arguments[8:11]
    y = _output(x, arguments[1])
    ready = packed(Sources(*arguments[1:8], *arguments[11:]), x.dtype)

    def launch_once() -> Tensor:
        run(x, low, ready, y, placement=placement, relu=relu, settings=settings, problem=problem)
        return y

    return launch_once


# Channels that boxes take, and others; even sizes, odd ones, and such where the map ends before x does.
_SIZES = (
    (1, 18, 20, 64, 72, 64),
    (1, 9, 19, 16, 32, 16),
    (2, 6, 7, 7, 5, 3),
    (1, 2, 2, 64, 16, 130),
    (1, 33, 2, 1, 1, 1),
    (0, 8, 16, 64, 128, 64),
)

KERNEL = Kernel(
    name=NAME,
    op=conv_bn_relu_up,
    reference=reference,
    inputs=inputs,
    problem=_problem,
    flops=flops,
    bytes=bytes_moved,
    depth=depth,
    edges=tuple(
        Problem(
            batch=n,
            height=h,
            width=w,
            in_channels=first + below,
            out_channels=o,
            precision=precision,
            second_channels=below,
        )
        for precision, (n, h, w, first, below, o) in itertools.product(ITEM_BYTES, _SIZES)
    ),
    layers=FOLDED_LAYERS,
    settings=settings_for,
    candidates=candidates,
    compilation=compilation,
    launcher=_launcher,
    constants=frozenset({"mean", "var"}),
)
