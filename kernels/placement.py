"""Where a padding puts a map, recognised from the arithmetic on sizes in a traced forward."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import fx

from kernels.trace import inside
from kernels.two_sources import padding

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.two_sources import Placement

# What forwards compute sizes with: it reads no values and changes nothing.
_ARITHMETIC: set[Any] = {
    *(builtins.getattr, builtins.int, builtins.max, builtins.min, operator.getitem, operator.add, operator.sub),
    *(operator.mul, operator.floordiv, operator.mod, operator.neg, torch.ops.aten.sym_size.int),
}
_SIZE_METHODS = {"size", "dim"}


def padded(node: object, like: object) -> tuple[fx.Node, Placement] | None:
    """(what is padded, how), where `node` pads its input with zeros to the size of `like`."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    known: dict[fx.Node, Any] = {}
    if node.target is F.pad:
        pad = node
        source = argument(node, 0, "input", None)
    else:
        # A function that torch.fx takes as one piece: what a compiler would see of it.
        pad, placeholders = _single_pad(node)
        if pad is None:
            return None
        arguments = dict(zip(placeholders, node.args, strict=False))
        source = arguments.get(argument(pad, 0, "input", None))
        known = {placeholder: _Size(given) for placeholder, given in arguments.items() if isinstance(given, fx.Node)}
    zeros = argument(pad, 2, "mode", "constant") == "constant" and not argument(pad, 3, "value", None)
    if not isinstance(source, fx.Node) or not isinstance(like, fx.Node) or not zeros:
        return None
    ends = argument(pad, 1, "pad", None)
    found = _placement(ends, source, like, known)
    return None if found is None else (source, found)


@dataclasses.dataclass(frozen=True)
class _Size:
    """Stands for a tensor of the outer forward of which the sizes alone are known."""

    node: fx.Node


def _single_pad(node: fx.Node) -> tuple[Any, list[fx.Node]]:
    graph = inside(node.target)
    if graph is None or node.kwargs:
        return None, []
    placeholders = [inner for inner in graph.nodes if inner.op == "placeholder"]
    result = next(inner for inner in graph.nodes if inner.op == "output").args[0]
    is_pad = isinstance(result, fx.Node) and result.target is F.pad
    others = [
        inner for inner in graph.nodes if inner not in placeholders and inner.op != "output" and inner is not result
    ]
    harmless = all(is_arithmetic(inner) for inner in others)
    return (result if is_pad and harmless else None), placeholders


def _placement(ends: object, source: fx.Node, like: fx.Node, known: dict[fx.Node, Any]) -> Placement | None:
    """How the ends of a padding, computed from sizes, place `source` in `like`: tried on sizes of each kind."""

    def computed(height: int, width: int) -> object:
        tensors = {
            source: torch.empty(1, 1, 7, 9, device="meta"),
            like: torch.empty(1, 1, height, width, device="meta"),
        }
        values = {inner: tensors.get(size.node) for inner, size in known.items()} | tensors
        return _value(ends, {node: tensor for node, tensor in values.items() if tensor is not None})

    sizes = list(itertools.product((7, 8, 9, 12, 4), (9, 10, 11, 7)))
    placements: tuple[Placement, ...] = ("end", "centre")
    for placement in placements:
        try:
            if all(
                computed(height, width) == [*padding(width - 9, placement), *padding(height - 7, placement)]
                for height, width in sizes
            ):
                return placement
        except _UnknownError:
            return None
    return None


class _UnknownError(Exception):
    """A number that does not come from the sizes of the two sources alone."""


def _value(given: object, known: dict[fx.Node, Any]) -> Any:  # noqa: ANN401 - a size, or what one is computed from
    if isinstance(given, (list, tuple)):
        return [_value(one, known) for one in given]
    if not isinstance(given, fx.Node):
        return given
    if given in known:
        return known[given]
    if not is_arithmetic(given):
        raise _UnknownError
    arguments = [_value(one, known) for one in given.args]
    if given.op == "call_method":
        return getattr(arguments[0], str(given.target))(*arguments[1:])
    function: Callable[..., Any] = given.target  # type: ignore[assignment] # a call_function's
    return function(*arguments)


def is_arithmetic(node: fx.Node) -> bool:
    """Whether `node` only computes with sizes: it reads no values and changes nothing."""
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    return node.op == "call_function" and node.target in _ARITHMETIC


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:  # noqa: ANN401 - an argument
    """An argument of a call, given by position or by name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)
