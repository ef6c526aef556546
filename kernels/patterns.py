"""What stands around a convolution in a traced forward and can run in its kernel, recognised by structure.

Before it a concatenation of two, with the zero padding and the bilinear upsampling of the second; behind it a 2×2
max-pool or a 1×1 convolution. And, by itself, a transposed 2×2 convolution. Each function returns what it found, or in
words why that stays as it is.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import fx, nn

import kernels.conv_transpose  # noqa: F401 - it registers its op
from kernels.conv_bn_relu import MOST_CLASSES, MOST_HEAD_CHANNELS
from kernels.placement import argument, is_arithmetic, padded
from kernels.trace import hooked, own_forward

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kernels.two_sources import Placement

CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
POOLINGS = {F.max_pool2d, torch.max_pool2d}
TRANSPOSED = torch.ops.unet_kernels.conv_transpose.default
INTERPOLATIONS = {F.interpolate, F.upsample, F.upsample_bilinear}


@dataclasses.dataclass(frozen=True)
class Second:
    """A concatenation that the convolution behind it reads as two tensors.

    `taken` are the nodes it stands for; `words` say it in the report; `transposed` are weight and bias of a
    transposed convolution that is to be folded into the convolution: `source` is then what that one reads.
    """

    first: fx.Node
    source: fx.Node
    placement: Placement
    upsample: bool
    taken: tuple[fx.Node, ...]
    words: tuple[str, ...]
    transposed: tuple[fx.Node, fx.Node | None] | None = None


def module_at(root: nn.Module, node: fx.Node, kind: type[Any]) -> Any:  # noqa: ANN401 - of the kind asked for, or None
    """The module of this kind that `node` calls, or None."""
    if node.op != "call_module":
        return None
    module = root.get_submodule(str(node.target))
    return module if isinstance(module, kind) else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one's result, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def untouched(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why this module is not the plain layer that its class says; None where it is."""
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not a plain {kind.__name__}"
    if own_forward(module):
        return "its forward was replaced on the instance"
    return "has hooks, which would not fire" if hooked(module) else None


def differences(wanted: dict[str, tuple[object, object]]) -> str | None:
    """`stride (2, 2), groups 8`: what differs, of (given, expected) by name; None where nothing does."""
    other = [f"{what} {given}" for what, (given, expected) in wanted.items() if given != expected]
    return ", ".join(other) or None


def second_source(root: nn.Module, convolution: fx.Node, *, fold: bool = False) -> Second | str | None:
    """The concatenation that this convolution reads, as two sources; why it stays one; None where there is none.

    With `fold` it takes the transposed convolution before the second one in, where nothing else reads that.
    """
    concatenation = convolution.args[0] if convolution.args else convolution.kwargs["input"]
    if not isinstance(concatenation, fx.Node) or concatenation.target not in CONCATENATIONS:
        return None
    tensors: Any = argument(concatenation, 0, "tensors", ())
    dimension = argument(concatenation, 1, "dim", argument(concatenation, 1, "axis", 0))
    if dimension not in {1, -3}:
        return f"concatenates along dimension {dimension}"
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2:  # noqa: PLR2004
        return f"concatenates {len(tensors) if isinstance(tensors, (list, tuple)) else 'a list of'} tensors, not two"
    if only_user(concatenation) is not convolution:
        return "its output is read elsewhere too"
    first, source = tensors
    taken, words = [concatenation], ["two sources"]
    placement: Placement = "exact"
    if (laid := padded(source, first)) is not None and only_user(source) is concatenation:
        taken += [source, *_feeding(source, {source})]
        source, placement = laid
        words.append("padding")
    upsample = _is_doubling(root, source) and all(user in taken for user in source.users)
    if upsample:
        taken.append(source)
        source = argument(source, 0, "input", None)
        words.append("bilinear upsampling")
    transposed: Any = None
    if fold and source.target is TRANSPOSED and all(user in taken for user in source.users):
        taken.append(source)
        source, *transposed = source.args
        words.append("transposed convolution")
    if not _undisturbed(taken, convolution):
        return "something else runs between it and the convolution"
    return Second(first, source, placement, upsample, tuple(taken), tuple(words), transposed and tuple(transposed))


def pooling(root: nn.Module, features: fx.Node) -> fx.Node | None:
    """The 2×2 max-pool that reads `features` before anything else does, which might change them in place."""
    first = min(features.users, default=None)
    return first if first is not None and is_pooling(root, first) and why_not_pooling(root, first) is None else None


def is_pooling(root: nn.Module, node: fx.Node) -> bool:
    """Whether `node` is a two-dimensional max-pool of any kind."""
    return node.target in POOLINGS or module_at(root, node, nn.MaxPool2d) is not None


def why_not_pooling(root: nn.Module, node: fx.Node) -> str | None:
    """What about this max-pool no kernel here does; None where one does, behind its convolution."""
    module = module_at(root, node, nn.MaxPool2d)
    if module is not None and (why := untouched(module, nn.MaxPool2d)) is not None:
        return why
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = (None, None, 0, 1, False, False)
    if module is not None:
        given = [getattr(module, name) for name in names]
    else:
        pairs = zip(names, defaults, strict=True)
        given = [argument(node, index, name, default) for index, (name, default) in enumerate(pairs, start=1)]
    kernel, stride, *others = given
    stride = kernel if stride is None or stride == () else stride
    expected = ((2, 2), (2, 2), (0, 0), (1, 1), False, False)
    found = [_pair(value) for value in (kernel, stride, *others[:2])] + others[2:]
    return differences(
        {n.replace("_", " "): pair for n, pair in zip(names, zip(found, expected, strict=True), strict=True)}
    )


def head(root: nn.Module, convolution: nn.Conv2d, features: fx.Node) -> fx.Node | None:
    """The 1×1 convolution that alone reads `features`, the output of `convolution`'s chain."""
    node = only_user(features)
    module = None if node is None else module_at(root, node, nn.Conv2d)
    if module is None or untouched(module, nn.Conv2d) is not None:
        return None
    geometry = (module.kernel_size, module.stride, module.groups, module.padding in {(0, 0), "valid", "same"})
    fits = module.out_channels <= MOST_CLASSES and convolution.out_channels <= MOST_HEAD_CHANNELS
    return node if geometry == ((1, 1), (1, 1), 1, True) and fits else None


def why_not_transposed(module: nn.ConvTranspose2d, node: fx.Node | None = None) -> str | None:
    """What about this transposed convolution the kernel can't do; None where it can."""
    if (why := untouched(module, nn.ConvTranspose2d)) is not None:
        return why
    if node is not None and (len(node.args) > 1 or "output_size" in node.kwargs):
        return "is asked for an output size"
    return differences(
        {
            "kernel size": (module.kernel_size, (2, 2)),
            "stride": (module.stride, (2, 2)),
            "padding": (module.padding, (0, 0)),
            "output padding": (module.output_padding, (0, 0)),
            "dilation": (module.dilation, (1, 1)),
            "groups": (module.groups, 1),
        }
    )


def why_not_interpolated(root: nn.Module, node: fx.Node) -> str:
    """Why no convolution interpolates this as it reads."""
    if not _is_doubling(root, node):
        return "not bilinear ×2 with corners aligned"
    return "not the second of two sources of one fused convolution"


def image_of(node: fx.Node) -> fx.Node | None:
    """The forward's input from which `node` comes, by the first argument of each step."""
    while node.op != "placeholder":
        tensors = [before for before in node.all_input_nodes if before.op != "get_attr"]
        if not tensors:
            return None
        node = tensors[0]
    return node


def _is_doubling(root: nn.Module, node: object) -> bool:
    """Whether `node` interpolates bilinearly to twice the size with corners aligned."""
    if not isinstance(node, fx.Node):
        return False
    module = module_at(root, node, nn.Upsample)
    if module is not None:
        if untouched(module, type(module)) or type(module) not in {nn.Upsample, nn.UpsamplingBilinear2d}:
            return False
        size, factor, mode, aligned = module.size, module.scale_factor, module.mode, module.align_corners
    elif node.target is F.interpolate:
        names = ("size", "scale_factor", "mode", "align_corners")
        size, factor, mode, aligned = (argument(node, index, name, None) for index, name in enumerate(names, start=1))
    else:
        return False
    return size is None and _pair(factor) == (2, 2) and mode == "bilinear" and aligned is True


def _feeding(node: fx.Node, into: set[fx.Node]) -> list[fx.Node]:
    """The arithmetic on sizes before `node` that nothing else reads."""
    found: list[fx.Node] = []
    for before in reversed(list(node.graph.nodes)):
        if is_arithmetic(before) and before.users and all(user in into for user in before.users):
            into.add(before)
            found.append(before)
    return found


def _undisturbed(taken: Iterable[fx.Node], convolution: fx.Node) -> bool:
    """Whether from the first node taken to the convolution nothing runs that could change a source in place."""
    gone = set(taken)
    node = min(gone)
    while node is not convolution:
        if node not in gone and not is_arithmetic(node) and node.op not in {"get_attr", "placeholder"}:
            return False
        node = node.next
    return True


def _pair(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
