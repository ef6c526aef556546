"""relu(BatchNorm(conv3×3(x))) for inference as one op and one kernel: `torch.ops.unet_kernels.conv_bn_relu`.

The op takes the layers' own parameters, so it is a pure function that compiles and exports; packing them is a memo
behind it (`kernels.packing`). Activations are never copied or converted: channels_last input goes through TMA
descriptors where the GPU has them, every other layout through masked pointers. What stands before and behind it in a
decoder is part of the same kernel: a second source instead of a concatenation, a 1×1 convolution instead of features.
"""
# ruff: noqa: PLR0913, PLR0917 - one argument for each parameter of the layers
# ruff: noqa: FBT001, FBT002 - an op's schema has positional arguments

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor

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
from kernels.problem import ITEM_BYTES, Problem, Settings
from kernels.settings import settings_for
from kernels.spec import Kernel
from kernels.unet_layers import LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable

# More classes, or features that one program can't hold, are a GEMM of their own: left to PyTorch's 1×1 convolution.
MOST_CLASSES, MOST_HEAD_CHANNELS = 16, 128


@torch.library.custom_op("unet_kernels::conv_bn_relu", mutates_args=())
def conv_bn_relu(
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
    head_weight: Tensor | None = None,
    head_bias: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    """Compute y = relu(γ · (conv3×3([x, second]) + bias - mean) / √(var + eps) + β), or head(y); padding 1.

    Args:
        x: (N, I, H, W) in fp16, bf16 or fp32, any strides, N ≥ 0, H and W ≥ 1; channels_last is the fast layout.
        weight: (O, I + I₂, 3, 3), any floating dtype: it is rounded to x's once.
        bias: (O,) or None, the convolution's.
        mean: (O,), BatchNorm's running mean.
        var: (O,), BatchNorm's running variance.
        gamma: (O,) or None, BatchNorm's weight.
        beta: (O,) or None, BatchNorm's bias.
        eps: added to the variance.
        relu: whether negative results become zero.
        second: (N, I₂, h, w) or None: further channels, in x's dtype, any strides.
        placement: where `second` lies in x's H×W: "exact", it has that size; "end", zeros follow it; "centre", zeros
            around it, fewer before (`kernels.two_sources`).
        upsample: read `second` as interpolated bilinearly to twice its size, corners aligned.
        head_weight: (K, O, 1, 1) of a 1×1 convolution behind, K at most 16 and O at most 128, or None.
        head_bias: (K,) or None.
        image: the network's own input: logits are channels_last where it or the weight is, and NCHW otherwise, as they
            are where every layer runs by itself.

    Returns:
        (N, O, H, W) in x's dtype, channels_last; with a head (N, K, H, W). fp32 multiplies in TF32 exactly where
        PyTorch's own convolution would (`torch.backends.cudnn.conv.fp32_precision`).

    Raises:
        NotImplementedError: x is neither on a CUDA device of capability 8.0 or newer nor in the interpreter.
        RuntimeError: shapes, dtypes or devices that do not belong together.
    """
    _check(x, weight, mean, second, placement, upsample=upsample, head_weight=head_weight)
    y = _output(x, weight, head_weight, image)
    if x.shape[0] > 0:
        sources = Sources(weight, bias, mean, var, gamma, beta, eps, head_weight, head_bias)
        operands = _operands(x, y, second, placement, upsample=upsample, head_weight=head_weight)
        capability, gpu = place(x.device)
        problem = problem_of(x, weight, second, head_weight, upsample=upsample, pool=False)
        settings = settings_for(problem, capability, gpu, family=operands.family)
        run(operands, packed(sources, x.dtype), relu=relu, settings=settings, problem=problem)
    return y


@conv_bn_relu.register_fake
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
    head_weight: Tensor | None = None,
    head_bias: Tensor | None = None,  # noqa: ARG001
    image: Tensor | None = None,
) -> Tensor:
    _check(x, weight, mean, second, placement, upsample=upsample, head_weight=head_weight)
    return _output(x, weight, head_weight, image)


conv_bn_relu.register_autograd(gradient.backward, setup_context=gradient.save)
cast_activations("conv_bn_relu")
count_flops(torch.ops.unet_kernels.conv_bn_relu)


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
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
    head_weight: Tensor | None = None,
    head_bias: Tensor | None = None,
    image: Tensor | None = None,  # noqa: ARG001 - says a layout, not a value
) -> Tensor:
    """The same in plain PyTorch, in the dtype of its arguments: in fp64 what the kernel is held to."""
    source = two_sources.joined(x, second, placement, upsample=upsample)
    y = F.batch_norm(F.conv2d(source, weight, bias, padding=1), mean, var, gamma, beta, training=False, eps=eps)
    y = F.relu(y) if relu else y
    return y if head_weight is None else F.conv2d(y, head_weight, head_bias)


def _check(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    second: Tensor | None,
    placement: str,
    *,
    upsample: bool,
    head_weight: Tensor | None,
) -> None:
    check("conv_bn_relu", x, weight, mean, second, placement, upsample=upsample)
    if head_weight is not None:
        o = weight.shape[0]
        torch._check(  # noqa: SLF001 - the way to check in a fake kernel
            tuple(head_weight.shape[1:]) == (o, 1, 1) and head_weight.shape[0] <= MOST_CLASSES,
            lambda: f"the head's weight is (K, {o}, 1, 1), K ≤ {MOST_CLASSES}; given {tuple(head_weight.shape)}",
        )
        torch._check(o <= MOST_HEAD_CHANNELS, lambda: f"a head takes at most {MOST_HEAD_CHANNELS} features; given {o}")  # noqa: SLF001


def _output(x: Tensor, weight: Tensor, head_weight: Tensor | None, image: Tensor | None) -> Tensor:
    n, _, h, w = x.shape
    if head_weight is None:
        return nhwc(x.new_empty_strided, n, h, w, weight.shape[0])
    asked = [tensor for tensor in (image, weight) if tensor is not None and tensor.dim() == 4]  # noqa: PLR2004
    if any(torch._prims_common.suggest_memory_format(tensor) is torch.channels_last for tensor in asked):  # noqa: SLF001
        return nhwc(x.new_empty_strided, n, h, w, head_weight.shape[0])
    return x.new_empty((n, head_weight.shape[0], h, w))


def _operands(
    x: Tensor, y: Tensor, second: Tensor | None, placement: str, *, upsample: bool, head_weight: Tensor | None
) -> Operands:
    top = left = 0
    if second is not None:
        second, top, left = two_sources.laid(x, second, placement, upsample=upsample)
    written = {"y": y} if head_weight is None else {"logits": y}
    return Operands(x=x, second=second, top=top, left=left, **written)


def _launcher(arguments: tuple[Any, ...], problem: Problem, settings: Settings) -> Callable[[], Tensor]:
    given = named(torch.ops.unet_kernels.conv_bn_relu, arguments)
    x, second, head_weight = given["x"], given["second"], given["head_weight"]
    sources = Sources(*arguments[1:8])._replace(head_weight=head_weight, head_bias=given["head_bias"])
    y = _output(x, given["weight"], head_weight, given["image"])
    operands = _operands(x, y, second, given["placement"], upsample=given["upsample"], head_weight=head_weight)
    ready = packed(sources, x.dtype)

    def launch_once() -> Tensor:
        run(operands, ready, relu=given["relu"], settings=settings, problem=problem)
        return y

    return launch_once


def _problem(arguments: tuple[Any, ...]) -> Problem:
    given = named(torch.ops.unet_kernels.conv_bn_relu, arguments)
    tensors = (given[name] for name in ("x", "weight", "second", "head_weight"))
    return problem_of(*tensors, upsample=given["upsample"], pool=False)


# Sizes around the tiles' 8 and 16 pixels and channel counts around blocks of 16, 32, 64: under, at and past each.
_SIZES = (
    (2, 7, 9, 3, 64),
    (1, 1, 1, 1, 1),
    (2, 8, 16, 16, 16),
    (1, 9, 17, 24, 40),
    (3, 1, 33, 8, 72),
    (1, 17, 2, 40, 8),
    (1, 5, 18, 17, 130),
    (1, 8, 16, 72, 16),
    (0, 8, 16, 16, 16),
)
# Second sources of as many and of other channels than the first; heads of one class and of more than fit a vector.
_AROUND: tuple[dict[str, Any], ...] = (
    {"batch": 2, "height": 9, "width": 17, "in_channels": 40, "out_channels": 16, "second_channels": 16},
    {"batch": 1, "height": 5, "width": 6, "in_channels": 7, "out_channels": 3, "second_channels": 5},
    {
        "batch": 1,
        "height": 9,
        "width": 19,
        "in_channels": 40,
        "out_channels": 24,
        "second_channels": 24,
        "upsample": True,
    },
    {"batch": 2, "height": 2, "width": 3, "in_channels": 7, "out_channels": 3, "second_channels": 3, "upsample": True},
    {"batch": 2, "height": 9, "width": 17, "in_channels": 16, "out_channels": 40, "classes": 1},
    {"batch": 1, "height": 3, "width": 5, "in_channels": 3, "out_channels": 100, "classes": 5},
    {
        "batch": 1,
        "height": 8,
        "width": 16,
        "in_channels": 32,
        "out_channels": 16,
        "classes": 3,
        "second_channels": 16,
        "upsample": True,
    },
    {"batch": 0, "height": 8, "width": 16, "in_channels": 32, "out_channels": 16, "second_channels": 16, "classes": 2},
)

KERNEL = Kernel(
    name="conv_bn_relu",
    op=conv_bn_relu,
    reference=reference,
    inputs=inputs,
    problem=_problem,
    flops=flops,
    bytes=bytes_moved,
    depth=depth,
    edges=(
        *(
            Problem(batch=n, height=h, width=w, in_channels=i, out_channels=o, precision=precision)
            for precision in ITEM_BYTES
            for n, h, w, i, o in _SIZES
        ),
        *(Problem(**sizes, precision=precision) for precision in ITEM_BYTES for sizes in _AROUND),
    ),
    layers=tuple(layer for layer in LAYERS if not layer.pool),
    settings=settings_for,
    candidates=candidates,
    compilation=compilation,
    launcher=_launcher,
    constants=frozenset({"mean", "var"}),
)
