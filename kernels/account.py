"""What a forward costs, counted exactly and without a GPU: kernels, bytes they must move, activations alive at once.

    account_for(kernels.fuse(model), image).peak_bytes

The forward runs on the "meta" device, where nothing is computed. Every tensor that an operation makes is a storage of
its own until the last reference to it goes; views and results in place make none. Python counts references alike on
every device, so the peak is what an allocator must hold at least: without its rounding, and without the workspaces of
libraries.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from kernels.problem import Problem
    from kernels.spec import Kernel

# What makes no kernel: a view, or a tensor whose memory is not written.
_VIEWS = {"aten::view", "aten::slice.Tensor", "aten::detach", "aten::select.int", "aten::permute", "aten::alias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One launch of a kernel of the registry, its output shapes, FLOPs and bytes by the kernel's own cost functions."""

    kernel: str
    problem: Problem
    shapes: tuple[tuple[int, ...], ...]
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One new storage: the operation that made it, its tensor's shape, and its bytes."""

    operation: str
    shape: tuple[int, ...]
    bytes: int


class Account(TorchDispatchMode):
    """While entered, counts operations and the bytes of every storage they make.

    Tensors that were there before, inputs and parameters among them, are not counted.

    Args:
        registry: the kernels whose calls have costs.

    Attributes:
        calls: launches of the registry's kernels, in order.
        others: names of the operations that launch something else.
        allocations: every storage made, in order.
        bytes: of those that live now.
        peak_bytes: the most that lived at once.
    """

    def __init__(self, registry: Sequence[Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self.calls: list[Call] = []
        self.others: list[str] = []
        self.allocations: list[Allocation] = []
        self.bytes = 0
        self.peak_bytes = 0
        self._registry = {f"unet_kernels::{kernel.name}": kernel for kernel in registry}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's
        kwargs = kwargs or {}
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **kwargs)
        tensors = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        name = func.name()
        if (kernel := self._registry.get(name)) is not None:
            problem = kernel.problem(args)
            costs = {"flops": kernel.flops(problem), "bytes": kernel.bytes(problem)}
            shapes = tuple(tuple(tensor.shape) for tensor in tensors)
            self.calls.append(Call(kernel=kernel.name, problem=problem, shapes=shapes, **costs))
        elif name not in _VIEWS:
            self.others.append(name)
        for tensor in tensors:
            if _storage(tensor) not in given | self._alive:
                self._count(tensor, name)
        return result

    def _count(self, tensor: Tensor, operation: str) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if (size := storage.nbytes()) == 0:
            return
        self._alive.add(key)
        self.allocations.append(Allocation(operation=operation, shape=tuple(tensor.shape), bytes=size))
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.bytes -= size


def account_for(model: nn.Module, *inputs: Tensor) -> Account:
    """What one forward of `model` without gradients costs.

    Args:
        model: in evaluation mode; a copy of it goes to the "meta" device.
        inputs: its inputs, or tensors on "meta" like them.
    """
    from kernels import KERNELS

    twin = copy.deepcopy(model).to("meta")
    images = [tensor.to("meta") for tensor in inputs]
    account = Account(KERNELS)
    with torch.no_grad(), account:
        twin(*images)
    return account


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - a storage's identity, as torch.multiprocessing.reductions does
