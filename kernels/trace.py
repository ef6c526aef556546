"""Trace a module's forward with torch.fx, and refuse where a traced forward would not do what the written one does."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# Tracing patches nn.Module, and here the regions, for the whole process: one thread at a time, and others, which may be
# serving, go on as if nothing were patched.
_ONE_AT_A_TIME = threading.RLock()


class Untraceable(Exception):  # noqa: N818 - a finding about a module, caught and reported, not a failure
    """A forward that must run as it is written; the message says why."""


def hooked(module: nn.Module) -> bool:
    """Whether code of others runs around this module's forward."""
    return any(getattr(module, hooks, None) for hooks in _HOOKS)


def own_forward(module: nn.Module) -> bool:
    """Whether this one instance was given a forward of its own, which its class does not know."""
    return "forward" in vars(module)


def trace(root: nn.Module, *, modes: bool = False) -> fx.Graph:
    """The operations of `root.forward`, through its submodules down to those of torch.nn and those that carry hooks.

    Args:
        root: a module.
        modes: the graph is to serve training and evaluation.

    Raises:
        Untraceable: the forward branches on values or sizes, opens a region of autocast or without gradients, keeps
            something of what it saw, or with `modes` asks which mode it is in; the module is as it was before.
    """
    if not modes:
        return _traced(root)
    before = [(module, module.training) for module in root.modules()]
    try:
        graph, other = (_traced(_set(before, mode=mode)) for mode in (True, False))
    finally:
        for module, mode in before:
            module.training = mode
    if str(graph) != str(other):
        raise Untraceable("its forward asks whether it trains")
    return graph


def _set(modules: list[tuple[nn.Module, bool]], *, mode: bool) -> nn.Module:
    # Not by `train()`, which a class may have its own of.
    for module, _ in modules:
        module.training = mode
    return modules[0][0]


def _traced(root: nn.Module) -> fx.Graph:
    if own_forward(root):
        raise Untraceable("its forward was replaced on the instance")
    if type(root).forward is nn.Module.forward:
        raise Untraceable("it has no forward")
    before = _attributes(root)
    try:
        with _ONE_AT_A_TIME, _no_regions():
            graph = _Tracer().trace(root)
    except Exception as error:
        _restore(before)
        message = str(error).strip().splitlines() or [type(error).__name__]
        raise Untraceable(message[0]) from error
    if _changed(before):
        # The tracer keeps tensors that a forward makes as attributes: random ones would be frozen, none would move.
        _restore(before)
        raise Untraceable("its forward makes tensors from nothing or assigns attributes")
    return graph


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401 - fx's
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:  # noqa: ANN401 - fx's
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks fire only where the module is called as a whole; its inside is then traced by itself.
        # Subclasses of layers are layers too: what is special about them is named in the report, not traced away.
        whole = hooked(m) or hasattr(m, "_fused_chains") or isinstance(m, (nn.Conv2d, _BatchNorm))
        return whole or super().is_leaf_module(m, module_qualified_name)


_REGIONS: dict[Any, str] = {
    torch.autocast: "of autocast",
    torch.no_grad: "without gradients",
    torch.enable_grad: "with gradients",
}


@contextlib.contextmanager
def _no_regions() -> Iterator[None]:
    # The tracer runs through a `with torch.autocast(…)` and forgets it: the region would be lost without a word.
    tracing = threading.get_ident()

    def refusing(kind: Any, original: Callable[[Any], Any]) -> Callable[[Any], Any]:  # noqa: ANN401
        def enter(region: Any) -> Any:  # noqa: ANN401
            if threading.get_ident() == tracing:
                raise Untraceable(f"its forward opens a region {_REGIONS[kind]}")
            return original(region)

        return enter

    originals = {kind: kind.__enter__ for kind in _REGIONS}
    for kind, original in originals.items():
        kind.__enter__ = refusing(kind, original)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.__enter__ = original


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A container of a module and a copy of what was in it."""

    container: Any
    contents: Any

    def changed(self) -> bool:
        container, contents = self.container, self.contents
        if isinstance(container, set):
            return bool(container != contents)
        values = (container.values(), contents.values()) if isinstance(container, dict) else (container, contents)
        return len(container) != len(contents) or any(one is not other for one, other in zip(*values, strict=True))

    def restore(self) -> None:
        self.container.clear()
        (self.container.extend if isinstance(self.container, list) else self.container.update)(self.contents)


def _attributes(root: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    def kept(value: Any) -> Any:  # noqa: ANN401
        return _Kept(value, value.copy()) if type(value) in {dict, list, set} else value

    return {module: {name: kept(value) for name, value in vars(module).items()} for module in root.modules()}


def _changed(before: dict[nn.Module, dict[str, Any]]) -> bool:
    def differs(now: object, then: object) -> bool:
        return (now is not then.container or then.changed()) if isinstance(then, _Kept) else now is not then

    return any(
        vars(module).keys() != then.keys() or any(differs(vars(module)[name], value) for name, value in then.items())
        for module, then in before.items()
    )


def _restore(before: dict[nn.Module, dict[str, Any]]) -> None:
    for module, then in before.items():
        vars(module).clear()
        for name, value in then.items():
            if isinstance(value, _Kept):
                value.restore()
            vars(module)[name] = value.container if isinstance(value, _Kept) else value


def inside(function: object) -> fx.Graph | None:
    """The operations of a function that torch.fx takes as one piece, as a compiler would see them; None where it can't.

    A function asks `torch.compiler.is_compiling()` where the same result is to be computed without a branch on sizes.
    """
    if not isinstance(function, types.FunctionType) or function.__module__.split(".")[0] == "torch":
        return None
    with _ONE_AT_A_TIME:
        before = torch.compiler._is_compiling_flag  # noqa: SLF001 - what is_compiling reads
        torch.compiler._is_compiling_flag = True  # noqa: SLF001
        try:
            return _Tracer().trace(function)
        except Exception:  # noqa: BLE001 - whatever somebody's function does with a proxy: then it stays one piece
            return None
        finally:
            torch.compiler._is_compiling_flag = before  # noqa: SLF001
