"""What stands in a state_dict: names with the prefixes of wrappers, older forms of the network, tensors that fit."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# Names that torch's wrappers put anywhere into a key, and that no layer of a network has.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Where a checkpoint with more than weights usually keeps them.
PLACES = ("model", "state_dict", "model_state_dict")


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside any nesting of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # noqa: SLF001 - getattr asks the inner
            model = inner
        else:
            return model


def state_of(model: nn.Module, *, canonical_names: bool = True) -> OrderedDict[str, Tensor]:
    """The state_dict of the network inside `model`, with its metadata.

    Args:
        model: the network, wrapped or not.
        canonical_names: without the prefixes inside the names of parts that are compiled by themselves.

    Raises:
        TypeError: `model.state_dict` was assigned to, which loads nothing and hides the method.
    """
    network = unwrap(model)
    if "state_dict" in vars(network):
        raise TypeError(
            "model.state_dict was assigned to, which loads nothing: del model.state_dict, then load_weights"
        )
    state = cast("OrderedDict[str, Tensor]", network.state_dict())
    return strip_prefixes(state, [canonical(name) for name in state]) if canonical_names else state


def canonical(name: str) -> str:
    """The name of a layer or tensor without what torch.compile and the like put into it: inc._orig_mod.x → inc.x."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def strip_prefixes(state: Mapping[str, Tensor], expected: Collection[str] = ()) -> OrderedDict[str, Tensor]:
    """The tensors of `state` under the names of the network itself, with `_metadata` renamed alike.

    torch.compile's `_orig_mod` goes wherever it stands, since no layer is called so. `module.`, of DataParallel and
    DistributedDataParallel, could be a layer's own name: it is taken off the front only, and only as often as makes
    the most names meet `expected`. So `module.submodule.x` becomes `submodule.x`, or stays.

    Args:
        state: tensors by name, with any order of prefixes.
        expected: the network's names; if empty, `module.` is taken off as long as every name has it.

    Raises:
        ValueError: two names become the same.
    """
    names = {name: canonical(name) for name in state}
    depth = 0
    if expected:
        wanted = set(expected)
        deepest = max((_modules_in_front(name) for name in names.values()), default=0)
        depth = max(range(deepest + 1), key=lambda k: sum(_drop(name, k) in wanted for name in names.values()))
    elif names:
        depth = min(_modules_in_front(name) for name in names.values())
    stripped = OrderedDict((_drop(names[name], depth), tensor) for name, tensor in state.items())
    if len(stripped) < len(state):
        twice = sorted(name for name in stripped if sum(_drop(n, depth) == name for n in names.values()) > 1)
        raise ValueError(f"two tensors are called {', '.join(twice[:3])} once the wrappers' prefixes are gone")
    if (metadata := getattr(state, "_metadata", None)) is not None:
        # In order: what a wrapper says of itself comes first and gives way to what the network says.
        renamed = OrderedDict((_drop(canonical(path), depth, whole=True), entry) for path, entry in metadata.items())
        stripped._metadata = renamed  # type: ignore[attr-defined] # noqa: SLF001 - torch's own place for it
    return stripped


def _modules_in_front(name: str) -> int:
    """How many `module.` a tensor's name starts with."""
    parts = name.split(".")[:-1]
    return next((i for i, part in enumerate(parts) if part != "module"), len(parts))


def _drop(name: str, count: int, *, whole: bool = False) -> str:
    """`name` with up to `count` leading `module.` taken off; the path of a layer (`whole`) may vanish altogether."""
    parts = name.split(".")
    end = len(parts) if whole else len(parts) - 1
    while count and end and parts[0] == "module":
        parts, count, end = parts[1:], count - 1, end - 1
    return ".".join(parts)


def find_tensors(content: Any) -> tuple[OrderedDict[str, Tensor], dict[str, Any]]:  # noqa: ANN401 - of any file
    """The state_dict in what a file held, and what stood beside the tensors, such as `mask_values`.

    Args:
        content: a state_dict, a dict with one under "model", "state_dict" or "model_state_dict", or a whole model.

    Raises:
        ValueError: there is none; says what there is.
    """
    if isinstance(content, nn.Module):
        content = unwrap(content).state_dict()
    if not isinstance(content, Mapping):
        hint = "; it was saved without calling it: save model.state_dict()" if callable(content) else ""
        # A fault of the file, not of the caller's types.
        raise ValueError(f"holds a {type(content).__name__}; expected a state_dict{hint}")  # noqa: TRY004
    for place in PLACES:
        if isinstance(content.get(place), Mapping):
            return find_tensors(content[place])
    tensors = OrderedDict((name, value) for name, value in content.items() if isinstance(value, Tensor))
    extras = {str(name): value for name, value in content.items() if name not in tensors}
    if not tensors:
        raise ValueError(f"holds no tensors, but {', '.join(map(repr, list(content)[:5])) or 'nothing'}")
    if odd := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"has tensors under {odd[:3]}; expected names")
    if (metadata := getattr(content, "_metadata", None)) is not None:
        tensors._metadata = metadata  # type: ignore[attr-defined] # noqa: SLF001 - torch's own place for it
    return tensors, extras


def migrate_biases(state: OrderedDict[str, Tensor], expected: Collection[str]) -> tuple[str, ...]:
    """Fold the biases of an older network's convolutions into the BatchNorm that follows, in place.

    (x + b − m) / σ = (x − (m − b)) / σ: the bias is taken off the running mean and dropped, exactly, since in
    training it cancels with the mean of the batch. A bias that the network has itself is left alone.

    Args:
        state: tensors by name; with biases, where the layer i of a Sequential is a convolution and i + 1 a BatchNorm.
        expected: the network's names.

    Returns:
        The names of the biases folded.
    """
    folded = []
    for name in [name for name in state if name not in expected]:
        place = re.fullmatch(r"((?:.*\.)?)(\d+)\.bias", name)
        if place is None:
            continue
        mean = f"{place[1]}{int(place[2]) + 1}.running_mean"
        if mean in state and mean in expected and state[mean].shape == state[name].shape:
            state[mean] = (state[mean].double() - state.pop(name).double()).to(state[mean].dtype)
            folded.append(name)
    return tuple(folded)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a state_dict fits a network: names that it lacks, has too many, and has in a form that can't be loaded."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The faults, the first few of each kind by name."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected}
        said = [f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds.items() if names]
        if self.mismatched:
            said.append(f"{len(self.mismatched)} that do not fit ({_few([*self.mismatched.values()], '; ')})")
        return ", ".join(said)


def compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Fit:
    """How the tensors of `state` fit the network's, `expected`: by name, shape, kind of number and layout."""
    mismatched = {}
    for name, theirs in state.items():
        ours = expected.get(name)
        if ours is None:
            continue
        if theirs.layout != torch.strided or theirs.is_meta or theirs.is_quantized:
            mismatched[name] = f"{name} is no dense tensor with values"
        elif theirs.shape != ours.shape:
            mismatched[name] = f"{name} is {tuple(theirs.shape)}, expected {tuple(ours.shape)}"
        elif theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
            mismatched[name] = f"{name} is {theirs.dtype}, expected {ours.dtype}"
    return Fit(
        missing=tuple(name for name in expected if name not in state),
        unexpected=tuple(name for name in state if name not in expected),
        mismatched=mismatched,
    )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""

    def bad(tensor: Tensor) -> bool:
        # The extremes carry a NaN along, and make no copy of the tensor.
        return not all(torch.isfinite(extreme) for extreme in tensor.aminmax())

    return [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel() and bad(tensor)]


def _few(words: Collection[str], separator: str = ", ") -> str:
    """The first four words."""
    shown = list(words)[:4]
    return separator.join(shown) + (f"{separator}…" if len(words) > len(shown) else "")
