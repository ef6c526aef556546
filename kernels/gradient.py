"""Gradient of the fused convolution by PyTorch's own operations: right, and not fast.

The op is for inference. Its gradient is for what is done with a network in evaluation mode (saliency, adversarial
examples, fine-tuning with frozen statistics), and lets torch.compile take the op where gradients are enabled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor

from kernels.two_sources import joined, split_gradient

_NOT_TRANSPOSED = False


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - autograd's context
    """Keep what `backward` reads: the op's arguments; the raw convolution and the features are computed again."""
    *tensors, eps, relu = inputs[:9]
    second, placement, upsample, *head = inputs[9:]
    ctx.pooled = isinstance(output, tuple)
    ctx.save_for_backward(*tensors, second, *(head[:2] or (None, None)))
    ctx.eps, ctx.relu, ctx.placement, ctx.upsample = eps, relu, placement, upsample
    ctx.arguments = len(inputs)


def backward(ctx: Any, gradient: Tensor, gradient_pooled: Tensor | None = None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Turn dy (dlogits, and d of the maxima) into gradients of every tensor but the statistics, each in its dtype.

    z = conv([x, second]) + bias, y = relu(γ (z - μ) / √(σ² + ε) + β), with μ and σ² constants;
    logits = head(y), maxima = max_pool2(y).
    """
    x, weight, bias, mean, var, gamma, beta, second, head_weight, head_bias = ctx.saved_tensors
    source = joined(x, second, ctx.placement, upsample=ctx.upsample)
    kernel = weight.to(x.dtype)
    z = F.conv2d(source, kernel, None if bias is None else bias.to(x.dtype), padding=1)
    # In fp32: CPU and GPU differ in which mixtures of dtypes they take.
    scale, shift = (None if tensor is None else tensor.float() for tensor in (gamma, beta))
    y = F.batch_norm(z.float(), mean.float(), var.float(), scale, shift, training=False, eps=ctx.eps)
    y = (F.relu(y) if ctx.relu else y).to(x.dtype)
    gradient_head = gradient_head_bias = None
    if head_weight is not None:
        head = head_weight.to(x.dtype)
        gradient, gradient_head, gradient_head_bias = _convolution_backward(gradient, y, head, head_bias, padding=0)
    if gradient_pooled is not None and gradient_pooled.shape[2] > 0 and gradient_pooled.shape[3] > 0:
        _, indices = F.max_pool2d_with_indices(y, (2, 2))
        geometry = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # kernel, stride, padding, dilation, ceil mode
        gradient = gradient + torch.ops.aten.max_pool2d_with_indices_backward(gradient_pooled, y, *geometry, indices)
    if ctx.relu:
        gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
    wanted = [True, gamma is not None, beta is not None]
    training = False
    statistics = (scale, mean.float(), var.float(), None, None, training)
    gradient_z, gradient_gamma, gradient_beta = torch.ops.aten.native_batch_norm_backward(
        gradient.float(), z.float(), *statistics, ctx.eps, wanted
    )
    gradient_source, gradient_weight, gradient_bias = _convolution_backward(
        gradient_z.to(x.dtype), source, kernel, bias, padding=1
    )
    below = None if second is None else second.shape
    gradient_x, gradient_second = split_gradient(gradient_source, x.shape, below, ctx.placement, upsample=ctx.upsample)

    def like(value: Tensor | None, tensor: Tensor | None) -> Tensor | None:
        return None if value is None or tensor is None else value.to(tensor.dtype)

    parameters = (like(gradient_weight, weight), like(gradient_bias, bias), None, None)
    layers = (gradient_x, *parameters, like(gradient_gamma, gamma), like(gradient_beta, beta), None, None)
    behind = (gradient_second, None, None, like(gradient_head, head_weight), like(gradient_head_bias, head_bias), None)
    return (*layers, *behind)[: ctx.arguments]


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    ends = [padding, padding]
    geometry = (
        [1, 1],
        ends,
        [1, 1],
        _NOT_TRANSPOSED,
        [0, 0],
        1,
    )  # stride, padding, dilation, …, output padding, groups
    found: tuple[Tensor, Tensor, Tensor | None] = torch.ops.aten.convolution_backward(
        gradient, x, weight, [weight.shape[0]], *geometry, [True, True, bias is not None]
    )
    return found
