"""Find conv → BatchNorm → ReLU chains in a traced forward, by structure, and put the fused op in their place.

With a chain goes what stands around it (`kernels.patterns`): its sources, a max-pool, a 1×1 convolution.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import fx, nn

import kernels.conv_bn_relu
import kernels.conv_bn_relu_pool
import kernels.conv_bn_relu_up
import kernels.conv_transpose  # noqa: F401 - all four: they register the ops
from kernels import patterns, training
from kernels.patterns import Second, differences, module_at, only_user, untouched
from kernels.trace import hooked, own_forward

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_CONVOLUTION_FUNCTIONS = {F.conv2d, torch.conv2d}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """One call of a convolution that runs in the fused kernel.

    `convolution` and `batch_norm` are paths in the model; `relu` whether a ReLU was taken in as well; `head` the path
    of a 1×1 convolution that runs in it too, or ""; `transposed` that of a transposed convolution folded into it, or
    ""; `around` names what else runs in it, in the order of execution.
    """

    convolution: str
    batch_norm: str
    relu: bool
    head: str = ""
    transposed: str = ""
    around: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Left:
    """A convolution, or a layer of those that run in its kernel elsewhere, which runs as it was.

    `part` is its path or the name of its operation; `chain` whether it is a convolution with a BatchNorm behind it.
    """

    part: str
    reason: str
    chain: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewritten:
    """What became of one forward: chains, paths of transposed convolutions that run as kernels, and what was left."""

    fused: tuple[Fused, ...]
    transposed: tuple[str, ...]
    left: tuple[Left, ...]


@dataclasses.dataclass(frozen=True)
class _Match:
    convolution: fx.Node
    batch_norm: fx.Node
    relu: fx.Node | None
    second: Second | str | None
    pooling: fx.Node | None
    head: fx.Node | None

    @property
    def last(self) -> fx.Node:
        """The node whose result are the features."""
        return self.batch_norm if self.relu is None else self.relu


def rewrite(root: nn.Module, graph: fx.Graph, path: str, *, trained: bool = False, fold: bool = False) -> Rewritten:
    """Replace every chain in `graph` that the kernel can do; the graph is changed in place.

    Args:
        root: the module that was traced.
        graph: its forward.
        path: where `root` is in the model, for the report.
        trained: by kernels that train; a 1×1 convolution behind a chain stays PyTorch's then.
        fold: transposed convolutions into the convolutions that read them, where these can take them.
    """
    fused: list[Fused] = []
    transposed: list[str] = []
    left: list[Left] = []
    done: set[fx.Node] = set()
    joined: dict[fx.Node, str] = {}  # concatenations that stay, and why
    for node in list(graph.nodes):
        if node in done:  # in the kernel of a chain before it
            continue
        found = _transpose(root, graph, node) or _match(root, node, trained=trained, fold=fold)
        if isinstance(found, str):
            transposed.append(join(path, found))
        elif isinstance(found, Left):
            left.append(dataclasses.replace(found, part=join(path, found.part)))
        elif found is not None:
            if isinstance(found.second, str):
                joined[found.convolution.all_input_nodes[0]] = found.second
            done |= _replace(root, graph, found, trained=trained)
            entry = _entry(found, path)
            if entry.transposed:
                transposed.remove(entry.transposed)  # of one call: another of the same module may stay a kernel
            fused.append(entry)
    left += [dataclasses.replace(entry, part=join(path, entry.part)) for entry in _beside(root, graph, joined)]
    if trained:
        training.connect(root, graph)
    if fused or transposed:
        graph.lint()
    return Rewritten(fused=tuple(fused), transposed=tuple(transposed), left=tuple(left))


def join(path: str, name: str) -> str:
    """A dotted path; the model itself is the empty one."""
    return f"{path}.{name}".strip(".")


def why_not(convolution: nn.Conv2d) -> str | None:
    """What about this convolution the kernel can't do; None where it can."""
    if (why := untouched(convolution, nn.Conv2d)) is not None:
        return why
    return differences(
        {
            "kernel size": (convolution.kernel_size, (3, 3)),
            "stride": (convolution.stride, (1, 1)),
            "dilation": (convolution.dilation, (1, 1)),
            "groups": (convolution.groups, 1),
            "padding": ((1, 1) if convolution.padding == "same" else convolution.padding, (1, 1)),
            "padding mode": (convolution.padding_mode, "zeros"),
        }
    )


def _match(root: nn.Module, node: fx.Node, *, trained: bool, fold: bool) -> _Match | Left | None:
    name = str(node.target)
    if node.op == "call_function" and node.target in _CONVOLUTION_FUNCTIONS:
        follows = only_user(node)
        chain = follows is not None and (
            follows.target is F.batch_norm or module_at(root, follows, nn.BatchNorm2d) is not None
        )
        return Left(part=node.name, reason="is a function call, not a module", chain=chain)
    convolution = module_at(root, node, nn.Conv2d)
    if convolution is None:
        return None
    users = [user for user in node.users if module_at(root, user, nn.modules.batchnorm._BatchNorm) is not None]  # noqa: SLF001
    reason = why_not(convolution)
    if reason is None and not users:
        reason = "no BatchNorm2d behind it"
    if reason is None and len(node.users) > 1:
        reason = "its output is read elsewhere too"
    if reason is None:
        batch_norm = module_at(root, users[0], nn.modules.batchnorm._BatchNorm)  # noqa: SLF001
        reason = _why_not_norm(batch_norm, trained=trained)
    if reason is not None:
        return Left(part=name, reason=reason, chain=bool(users))
    relu = only_user(users[0])
    relu = relu if relu is not None and _is_relu(root, relu) else None
    features = users[0] if relu is None else relu
    pooling = patterns.pooling(root, features)
    head = None if trained else patterns.head(root, convolution, features)
    return _Match(
        convolution=node,
        batch_norm=users[0],
        relu=relu,
        second=patterns.second_source(root, node, fold=fold and pooling is None and head is None),
        pooling=pooling,
        head=head,
    )


def _why_not_norm(batch_norm: nn.Module, *, trained: bool) -> str | None:
    if type(batch_norm) is not nn.BatchNorm2d:
        return f"its BatchNorm is a {type(batch_norm).__name__}"
    if not trained and (batch_norm.running_mean is None or batch_norm.running_var is None):
        return "its BatchNorm keeps no running statistics"
    if hooked(batch_norm):
        return "its BatchNorm has hooks, which would not fire"
    if own_forward(batch_norm):
        return "its BatchNorm's forward was replaced on the instance"
    return None


def _is_relu(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    if node.op == "call_method":
        return node.target in {"relu", "relu_"}
    module = module_at(root, node, nn.ReLU)
    return type(module) is nn.ReLU and not hooked(module) and not own_forward(module)


def _replace(root: nn.Module, graph: fx.Graph, match: _Match, *, trained: bool) -> set[fx.Node]:
    batch_norm = root.get_submodule(str(match.batch_norm.target))
    node = match.convolution
    x = node.args[0] if node.args else node.kwargs["input"]
    gone = [match.head, match.pooling, match.last, match.batch_norm, node]

    # At the convolution's place: what changes x in place afterwards must not be seen.
    with graph.inserting_before(node):
        around: tuple[Any, ...] = ()
        if isinstance(match.second, Second):
            x = match.second.first
            around = (match.second.source, match.second.placement, match.second.upsample)
            gone += match.second.taken
        ops = torch.ops.unet_kernels
        if trained:
            modules = (node, match.batch_norm)
            pool = match.pooling is not None
            features, pooled = training.insert(graph, modules, x, around, relu=match.relu is not None, pool=pool)
            if match.pooling is not None:
                match.pooling.replace_all_uses_with(pooled)
            match.last.replace_all_uses_with(features)
            return _erase(graph, gone)
        layers: tuple[Any, ...] = (
            *_attributes(root, match.convolution, ("weight", "bias")),
            *_attributes(root, match.batch_norm, ("running_mean", "running_var", "weight", "bias")),
            batch_norm.eps,
            match.relu is not None,
        )
        if match.pooling is not None:
            both = graph.call_function(ops.conv_bn_relu_pool.default, (x, *layers, *around))
            features, pooled = (graph.call_function(operator.getitem, (both, index)) for index in range(2))
            match.pooling.replace_all_uses_with(pooled)
            match.last.replace_all_uses_with(features)
        elif isinstance(match.second, Second) and match.second.transposed is not None:
            arguments = (x, *layers, *around[:2], *match.second.transposed)
            match.last.replace_all_uses_with(graph.call_function(ops.conv_bn_relu_up.default, arguments))
        elif match.head is not None:
            behind = (*_attributes(root, match.head, ("weight", "bias")), patterns.image_of(node))
            arguments = (x, *layers, *(around or (None, "exact", False)), *behind)
            match.head.replace_all_uses_with(graph.call_function(ops.conv_bn_relu.default, arguments))
        else:
            match.last.replace_all_uses_with(graph.call_function(ops.conv_bn_relu.default, (x, *layers, *around)))
    return _erase(graph, gone)


def _transpose(root: nn.Module, graph: fx.Graph, node: fx.Node) -> str | None:
    module = module_at(root, node, nn.ConvTranspose2d)
    if module is None or patterns.why_not_transposed(module, node) is not None:
        return None
    x = node.args[0] if node.args else node.kwargs["input"]
    with graph.inserting_before(node):
        arguments = (x, *_attributes(root, node, ("weight", "bias")))
        node.replace_all_uses_with(graph.call_function(torch.ops.unet_kernels.conv_transpose.default, arguments))
    graph.erase_node(node)
    return str(node.target)


def _attributes(root: nn.Module, node: fx.Node, names: Iterable[str]) -> Iterator[fx.Node | None]:
    """The tensors of the module that `node` calls, read anew at each call of the forward."""
    module = root.get_submodule(str(node.target))
    for name in names:
        yield node.graph.get_attr(f"{node.target}.{name}") if getattr(module, name) is not None else None


def _erase(graph: fx.Graph, nodes: Iterable[fx.Node | None]) -> set[fx.Node]:
    gone = {node for node in nodes if node is not None}
    for node in sorted(gone, reverse=True):  # readers first
        graph.erase_node(node)
    return gone


def _entry(match: _Match, path: str) -> Fused:
    around = match.second.words if isinstance(match.second, Second) else ()
    transposed = match.second.transposed if isinstance(match.second, Second) else None
    return Fused(
        convolution=join(path, str(match.convolution.target)),
        batch_norm=join(path, str(match.batch_norm.target)),
        relu=match.relu is not None,
        head="" if match.head is None else join(path, str(match.head.target)),
        transposed="" if transposed is None else join(path, str(transposed[0].target).removesuffix(".weight")),
        around=(*around, *(["max-pool"] if match.pooling else []), *(["1×1 convolution"] if match.head else [])),
    )


def _beside(root: nn.Module, graph: fx.Graph, joined: dict[fx.Node, str]) -> Iterator[Left]:
    """What could have run in a convolution's kernel, or as a kernel, and does not."""
    for node in graph.nodes:
        name = str(node.target) if node.op == "call_module" else node.name
        if (module := module_at(root, node, nn.ConvTranspose2d)) is not None:
            yield Left(part=name, reason=patterns.why_not_transposed(module, node) or "")
        elif patterns.is_pooling(root, node):
            reason = patterns.why_not_pooling(root, node) or "no fused convolution alone and first before it"
            yield Left(part=name, reason=reason)
        elif node.target in patterns.CONCATENATIONS and node.op == "call_function":
            yield Left(part=name, reason=joined.get(node, "not read by one fused convolution alone"))
        elif node.target in patterns.INTERPOLATIONS or module_at(root, node, nn.Upsample) is not None:
            yield Left(part=name, reason=patterns.why_not_interpolated(root, node))
