"""What the fused convolution's ops share: checks, autocast, costs, and inputs to try them with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import two_sources
from kernels.problem import DTYPES, ITEM_BYTES, Problem, precision_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SECOND = 9  # position of the second source among the ops' arguments
_LIBRARY = torch.library.Library("unet_kernels", "FRAGMENT")


def check(
    name: str, x: Tensor, weight: Tensor, mean: Tensor, second: Tensor | None, placement: str, *, upsample: bool
) -> None:
    """Refuse tensors that do not belong together.

    Raises:
        RuntimeError: naming what was given and what is taken.
    """
    torch._check(x.dim() == 4, lambda: f"{name} takes (N, I, H, W); given {tuple(x.shape)}")  # noqa: PLR2004, SLF001
    torch._check(  # noqa: SLF001 - the way to check in a fake kernel
        x.dtype in DTYPES.values(), lambda: f"{name} takes fp16, bf16 or fp32; given {x.dtype}: use the unfused model"
    )
    if second is not None:
        two_sources.check(x, second, placement, upsample=upsample)
    channels = x.shape[1] + (0 if second is None else second.shape[1])
    torch._check(  # noqa: SLF001
        weight.dim() == 4 and tuple(weight.shape[2:]) == (3, 3) and weight.shape[1] == channels,  # noqa: PLR2004
        lambda: f"{name} takes a weight (O, {channels}, 3, 3) for x {tuple(x.shape)}; given {tuple(weight.shape)}",
    )
    torch._check(  # noqa: SLF001
        x.shape[2] > 0 and x.shape[3] > 0, lambda: f"{name} needs at least one pixel; given {tuple(x.shape)}"
    )
    torch._check(  # noqa: SLF001
        x.device == weight.device == mean.device,
        lambda: (
            f"x is on {x.device}, the weight on {weight.device}, BatchNorm on {mean.device}: put them on one device"
        ),
    )


def cast_activations(name: str, activations: Sequence[int] = (0, _SECOND)) -> None:
    """Register what autocast does to the op `name`: it casts the arguments at these positions and no others.

    custom_op's register_autocast would cast weights and statistics too, at every call, and so miss the memo.
    """
    op = getattr(torch.ops.unet_kernels, name)
    for device in ("cpu", "cuda"):
        key = torch._C.DispatchKey.__members__[f"Autocast{device.upper()}"]  # noqa: SLF001 - no public name
        _LIBRARY.impl(name, _caster(op, device, key, activations), f"Autocast{device.upper()}")


def _caster(op: Any, device: str, key: Any, activations: Sequence[int]) -> Callable[..., Any]:  # noqa: ANN401
    def cast(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        given = list(arguments)
        for index in activations:
            x = given[index] if index < len(given) else None
            if x is not None and x.is_floating_point() and x.dtype != torch.float64:
                given[index] = x.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):  # noqa: SLF001
            return op(*given, **named)

    return cast


def count_flops(op: Any) -> None:  # noqa: ANN401 - an op packet
    """Register the op's FLOP formula: that of its convolutions alone, as PyTorch counts them."""

    @register_flop_formula(op)
    def formula(x: torch.Size, weight: torch.Size, *others: Any, out_shape: object = None, **_: object) -> int:  # noqa: ANN401, ARG001
        n, _channels, h, w = x
        head = others[10] if len(others) > 10 and others[10] is not None else (0,)  # noqa: PLR2004 - head_weight
        return 2 * n * h * w * (math.prod(weight) + math.prod(head))


def named(op: Any, arguments: Sequence[Any]) -> dict[str, Any]:  # noqa: ANN401 - an op packet
    """An op's positional arguments by name, with its defaults for those not given."""
    schema = op.default._schema.arguments  # noqa: SLF001 - no public name
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in schema), arguments, strict=False))


def problem_of(
    x: Tensor, weight: Tensor, second: Tensor | None, head_weight: Tensor | None = None, *, upsample: bool, pool: bool
) -> Problem:
    """The problem that an op's arguments are; whether fp32 means TF32 says PyTorch's own setting."""
    n, _, h, w = x.shape
    return Problem(
        batch=n,
        height=h,
        width=w,
        in_channels=weight.shape[1],
        out_channels=weight.shape[0],
        precision=precision_of(x.dtype),
        second_channels=0 if second is None else second.shape[1],
        upsample=upsample,
        pool=pool,
        classes=0 if head_weight is None else head_weight.shape[0],
    )


def inputs(problem: Problem, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    """Arguments of the problem's op, in its dtype: random, so scaled that results are near one.

    They are drawn on the generator's device: a core of the host takes seconds for what a large problem wants.
    """
    i, o, classes = problem.in_channels, problem.out_channels, problem.classes
    dtype = DTYPES[problem.precision]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    def moved(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 and tensor.shape[0] else torch.preserve_format  # noqa: PLR2004
        return tensor.to(device, dtype, memory_format=layout)

    x = moved(normal(problem.batch, problem.first_channels, problem.height, problem.width))
    weight = normal(o, i, 3, 3) / (9 * i) ** 0.5
    mean, var = normal(o) / 4, normal(o).abs() + 0.5
    layers = (x, *(tensor.to(device, dtype) for tensor in (weight, normal(o), mean, var, normal(o), normal(o))))
    plain = (*layers, 1e-5, True)
    if not (problem.second_channels or classes):
        return plain
    second = None
    if problem.second_channels:
        times = 2 if problem.upsample else 1
        height, width = (max(1, size // times) for size in (problem.height, problem.width))
        second = moved(normal(problem.batch, problem.second_channels, height, width))
    behind: tuple[Tensor | None, ...] = ()
    if classes:
        behind = tuple(tensor.to(device, dtype) for tensor in (normal(classes, o, 1, 1) / o**0.5, normal(classes)))
        behind += (x,)  # a channels_last image: logits are, too
    return (*plain, second, "end", problem.upsample, *behind)


def depth(problem: Problem) -> int:
    """Products summed for one result, the head's among them."""
    return 9 * problem.in_channels + (problem.out_channels if problem.classes else 0)


def flops(problem: Problem) -> int:
    """Of the convolutions, as PyTorch counts them."""
    pixels = problem.batch * problem.height * problem.width
    return 2 * pixels * problem.out_channels * (9 * problem.in_channels + problem.classes)


def bytes_moved(problem: Problem) -> int:
    """Read every source and the weight once, write every output once; scale, shift and the head are in fp32."""
    n, h, w, o = problem.batch, problem.height, problem.width, problem.out_channels
    low = max(1, h // 2) * max(1, w // 2) if problem.upsample else h * w
    read = n * h * w * problem.first_channels + n * low * problem.second_channels + 9 * problem.in_channels * o
    written = n * h * w * (problem.classes or o) + (n * (h // 2) * (w // 2) * o if problem.pool else 0)
    return (read + written) * ITEM_BYTES[problem.precision] + 4 * (2 * o + problem.classes * (o + 1))
