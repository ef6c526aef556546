"""A convolution-BatchNorm-ReLU chain of a model that trains: what it computes, and how chains know of each other.

The generated forward calls `chain` with the modules themselves, so that mode, momentum and statistics are those of the
call. Of its results the next chain is handed two more than it reads: the raw convolution and the table that its input
was made with, from which the backward pass makes the input again instead of keeping it.
"""
# ruff: noqa: PLR0913, PLR0917 - one argument for each thing that stands around a convolution
# ruff: noqa: FBT001, FBT002 - they come from a generated forward, by position

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

import kernels.conv_bn_relu
import kernels.conv_bn_relu_pool
import kernels.conv_moments
import kernels.norm_relu  # noqa: F401 - all four: they register the ops
from kernels import patterns
from kernels.patterns import module_at, untouched

if TYPE_CHECKING:
    from torch import Tensor

# Positions among `chain`'s arguments and results.
_X, _RELU, _SECOND = 0, 3, 5
_FEATURES, _MAXIMA, _RAW, _TABLE = range(4)
# What reads a tensor and hands out new memory: afterwards the tensor is what it was.
_PURE_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d, nn.Upsample, nn.UpsamplingBilinear2d)


def chain(
    x: Tensor,
    convolution: nn.Conv2d,
    norm: nn.BatchNorm2d,
    relu: bool,
    pool: bool,
    second: Tensor | None = None,
    placement: str = "exact",
    upsample: bool = False,
    raw: Tensor | None = None,
    table: Tensor | None = None,
    pooled: bool = False,
    second_raw: Tensor | None = None,
    second_table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute relu(norm(convolution([x, second]))) and its 2×2 maxima as the modules would in their present modes.

    Args:
        x: (N, I, H, W).
        convolution: 3×3, padding 1.
        norm: with batch statistics, or in evaluation mode with its running ones; these are updated as PyTorch does.
        relu: whether negative results become zero.
        pool: whether the maxima are wanted.
        second: further channels, as `conv_moments` takes them; so are the rest.
        placement: where they lie.
        upsample: whether they are interpolated.
        raw: what x was made of.
        table: with what.
        pooled: whether x are maxima.
        second_raw: the same of `second`.
        second_table: the same.

    Returns:
        features (N, O, H, W); maxima; the raw convolution and the table of its normalization, where gradients may come.

    Raises:
        TypeError: `norm` is no longer a BatchNorm2d, but computes something else.
        ValueError: batch statistics of one value a channel, as PyTorch says it.
        NotImplementedError, RuntimeError: as `conv_moments`.
    """
    if type(norm).forward is not nn.BatchNorm2d.forward:
        raise TypeError(
            f"this chain was fused with a BatchNorm2d, in whose place there is now a {norm}: put it there before "
            "fuse(model, training=True), which leaves such layers to PyTorch"
        )
    ops = torch.ops.unet_kernels
    of_batch = norm.training or (norm.running_mean is None and norm.running_var is None)
    if not of_batch and not torch.is_grad_enabled():
        layers = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        given = (x, *layers, norm.eps, relu, second, placement, upsample)
        if pool:
            return *ops.conv_bn_relu_pool(*given), None, None
        return ops.conv_bn_relu(*given), None, None, None
    sources = (second, placement, upsample, of_batch, raw, table, pooled, second_raw, second_table)
    z, mean, var = ops.conv_moments(x, convolution.weight, convolution.bias, *sources)
    if of_batch:
        _track(norm, mean, var, z.shape)
    else:
        mean, var = norm.running_mean, norm.running_var
    made_with = _table(norm, mean, var)
    features, maxima = ops.norm_relu(z, made_with, relu, pool, not of_batch)
    return features, maxima, z.detach(), made_with.detach()


def _track(norm: Any, mean: Tensor, var: Tensor, shape: torch.Size) -> None:  # noqa: ANN401 - its parts may be None
    """Update its statistics as PyTorch does: momentum, unbiased variance; without momentum, the average."""
    values = shape[0] * shape[2] * shape[3]
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if not (norm.training and norm.track_running_stats):
        return
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        factor = norm.num_batches_tracked.reciprocal() if factor is None else factor
    if values == 0 or norm.running_mean is None or norm.running_var is None:
        return
    with torch.no_grad():
        unbiased = var * (values / (values - 1))
        for running, fresh in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_(torch.lerp(running.float(), fresh, 0.0 if factor is None else factor))


def _table(norm: Any, mean: Tensor, var: Tensor) -> Tensor:  # noqa: ANN401 - it may have no parameters
    """The rows μ, 1 / σ, γ, β (4, C) in fp32; the last two carry gradients to the layer's parameters."""
    mean = mean.float()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.float()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.float()
    return torch.stack([mean, torch.rsqrt(var.float() + norm.eps), gamma, beta])


def insert(
    graph: fx.Graph,
    modules: tuple[fx.Node, fx.Node],
    x: Any,  # noqa: ANN401 - an argument of a node
    around: tuple[Any, ...],
    *,
    relu: bool,
    pool: bool,
) -> tuple[fx.Node, fx.Node]:
    """Call `chain` at the graph's insertion point: (features, maxima).

    Args:
        graph: a traced forward.
        modules: the nodes that call the convolution and the BatchNorm.
        x: the first source.
        around: the second one, its placement and whether it is interpolated; or nothing.
        relu: whether a ReLU is taken in.
        pool: whether the maxima are wanted.
    """
    layers = (graph.get_attr(str(module.target)) for module in modules)
    called = graph.call_function(chain, (x, *layers, relu, pool, *(around or (None, "exact", False))))
    features, maxima = (graph.call_function(operator.getitem, (called, index)) for index in (_FEATURES, _MAXIMA))
    return features, maxima


def connect(root: nn.Module, graph: fx.Graph) -> None:
    """Tell every chain what its sources were made of, where nothing could have changed them since."""
    for node in list(graph.nodes):
        if node.target is not chain:
            continue
        raw, table, pooled = _origin(root, graph, node.args[_X], node)
        second_raw, second_table, of_maxima = _origin(root, graph, node.args[_SECOND], node)
        if of_maxima:  # only features are made again for a second source
            second_raw = second_table = None
        node.args = (*node.args, raw, table, pooled, second_raw, second_table)
    for node in reversed(list(graph.nodes)):
        if node.target is operator.getitem and not node.users and getattr(node.args[0], "target", None) is chain:
            graph.erase_node(node)


def _origin(
    root: nn.Module,
    graph: fx.Graph,
    source: Any,  # noqa: ANN401 - an argument of a node
    reader: fx.Node,
) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """The nodes of `source`'s raw convolution and table, and whether it is the maxima of these features."""
    if not isinstance(source, fx.Node) or source.target is not operator.getitem:
        return None, None, False
    made: Any
    made, index = source.args
    ours = isinstance(made, fx.Node) and made.target is chain
    if not ours or not made.args[_RELU] or not all(_pure(root, user) for user in source.users if user < reader):
        return None, None, False
    with graph.inserting_after(made):
        raw, table = (graph.call_function(operator.getitem, (made, position)) for position in (_RAW, _TABLE))
    return raw, table, bool(index == _MAXIMA)


def _pure(root: nn.Module, node: fx.Node) -> bool:
    """Whether `node` leaves the tensors it reads alone, and hands out none of their memory."""
    if node.op == "call_module":
        module = module_at(root, node, nn.Module)
        return type(module) in _PURE_LAYERS and untouched(module, type(module)) is None
    if node.op == "call_method":
        return node.target in {"size", "dim"}
    functions = {
        *(chain, getattr, torch.ops.unet_kernels.conv_transpose.default),
        *(*patterns.CONCATENATIONS, *patterns.POOLINGS, *patterns.INTERPOLATIONS),
    }
    return node.op == "call_function" and node.target in functions
