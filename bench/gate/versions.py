"""Two versions of the project in one process: the module table is swapped for imports and for calls.

Both call their packages `bench`, `kernels` and `unet`, and register ops under the same names. An op that is registered
twice is **silently replaced**, so base would run head's kernel and every regression of a kernel would read SAME. So
each version's namespaces carry its tag: `unet_kernels::conv_bn_relu` becomes `unet_kernels_base::conv_bn_relu`, and
`torch.ops.unet_kernels` is that namespace while the version is active.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("bench", "kernels", "unet")
# Functions of torch.library that name an op or a namespace in their first argument.
NAMING = (
    *("define", "impl", "custom_op", "triton_op", "get_kernel", "opcheck"),
    *("register_kernel", "register_autocast", "register_fake", "register_autograd"),
    *("register_torch_dispatch", "register_vmap"),
)


class UnshareableError(Exception):
    """The versions cannot be told apart within one process; the text says why. Two processes can."""


class Version:
    """One checkout, importable beside others.

    Args:
        root: its top.
        tag: what its op namespaces end in, unique in the process; empty leaves them as they are, for a process that
            holds this version alone.
        load: modules that register further implementations; taken from the checkout, or else from the working folder.
    """

    def __init__(self, root: Path, tag: str, load: Sequence[str] = ()) -> None:
        self.root = root.resolve()
        self.tag = tag
        self.load = tuple(load)
        self.namespaces: dict[str, str] = {}
        self._modules: dict[str, ModuleType] = {}
        self._mine = frozenset((*PACKAGES, *(module.partition(".")[0] for module in load)))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """`import` and `torch.ops` mean this version inside; whoever was meant before is meant again after.

        Raises:
            UnshareableError: it registers something that belongs to the whole process.
        """
        others, path = self._take_out(), list(sys.path)
        sys.modules.update(self._modules)
        sys.path.insert(0, str(self.root))
        try:
            with self._own_ops():
                yield
        finally:
            sys.path[:] = path
            self._modules = self._take_out()
            sys.modules.update(others)

    def module(self, name: str) -> Any:  # noqa: ANN401 (another version's module has no type here)
        """Import a module of this version; only while it is active.

        Raises:
            ImportError: it has none of this name. What lies elsewhere under the same name is not this version's.
        """
        found = importlib.import_module(name)
        file = Path(found.__file__ or "").resolve()
        if name.partition(".")[0] in PACKAGES and not file.is_relative_to(self.root):
            raise ImportError(f"{self.root} has no module {name}; found {file}")
        return found

    def implementations(self) -> None:
        """Import what the version's cases need, loaded modules included; only while it is active."""
        for package in PACKAGES:
            self.module(package)
        if self.load:
            self.module("bench.implementations").load(self.load)

    def _take_out(self) -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in self._mine]
        return {name: sys.modules.pop(name) for name in names}

    @contextlib.contextmanager
    def _own_ops(self) -> Iterator[None]:
        if not self.tag:
            yield
            return
        hidden = {name: vars(torch.ops).pop(name) for name in self.namespaces if name in vars(torch.ops)}
        for name in self.namespaces:
            self._alias(name)
        library, before = torch.library, {name: getattr(torch.library, name) for name in NAMING}
        init, load_library = library.Library.__init__, torch.ops.load_library
        for name, function in before.items():
            setattr(library, name, self._renaming(function, position=0))
        library.Library.__init__ = self._renaming(init, position=1)  # type: ignore[method-assign]
        torch.ops.load_library = _refuse  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(library, name, function)
            library.Library.__init__ = init  # type: ignore[method-assign]
            torch.ops.load_library = load_library  # type: ignore[method-assign]
            for name in self.namespaces:
                vars(torch.ops).pop(name, None)
            vars(torch.ops).update(hidden)

    def _renaming(self, function: Callable[..., Any], *, position: int) -> Callable[..., Any]:
        """The function, with the namespace in its argument at `position` replaced by this version's own."""

        @functools.wraps(function)
        def renamed(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 (any signature)
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))  # noqa: SLF001 (who registers decides)
            if caller.partition(".")[0] not in self._mine:  # a part of PyTorch that is imported only now
                return function(*arguments, **keywords)
            given = list(arguments)
            if len(given) > position and isinstance(given[position], str):
                namespace, colons, name = given[position].partition("::")
                given[position] = self._own(namespace) + colons + name
            for key in ("ns", "name", "qualname", "op"):
                if isinstance(text := keywords.get(key), str):
                    namespace, colons, name = text.partition("::")
                    keywords[key] = self._own(namespace) + colons + name
            return function(*given, **keywords)

        return renamed

    def _own(self, namespace: str) -> str:
        if namespace in taken():
            raise UnshareableError(f"it registers into {namespace!r}, which belongs to the whole process")
        if namespace not in self.namespaces:
            self.namespaces[namespace] = f"{namespace}_{self.tag}"
            self._alias(namespace)
        return self.namespaces[namespace]

    def _alias(self, namespace: str) -> None:
        vars(torch.ops)[namespace] = getattr(torch.ops, self.namespaces[namespace])


@functools.cache
def taken() -> frozenset[str]:
    """Namespaces of ops that are there before the first version is imported: nobody's alone."""
    names = torch._C._dispatch_get_all_op_names()  # noqa: SLF001 (no public way to list them)
    return frozenset(name.partition("::")[0] for name in names)


def _refuse(path: object) -> None:
    raise UnshareableError(f"it loads a library of ops ({path}), whose names cannot be changed")
