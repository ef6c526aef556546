"""Packed parameters: derived once from what a kernel fuses, renewed when one of its sources changes.

The packed tensors are a memo behind a pure function of the parameters. They are in no module, so no state_dict has
them, and `.to()`, `load_state_dict` and deepcopy need no help. An entry belongs to the storages of its `owners` (the
convolution's weight, the running mean); it is stale as soon as the version counter, the address or the dtype of one of
its sources differs, and then it is overwritten in place, so a CUDA graph that read it finds the new values where the
old ones were.

PyTorch's fused optimizers (`fused=True`) write without counting; so from the first packing on, a hook after every
optimizer's step makes what was packed before such a step stale.

What version counters do not see, the memo does not see: writes through `.data` (`p.data.copy_(…)`, `p.data += …`) and
writes by code outside PyTorch. Assigning `.data = other` is seen. After such a write call `forget()`.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Packable(Protocol):
    """Tensors, Nones and numbers that a kernel packs: a NamedTuple with these two methods."""

    def owners(self) -> tuple[Tensor, ...]:
        """The tensors whose storages what is packed belongs to."""

    def pack(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """A NamedTuple of contiguous tensors, for arithmetic in `dtype`."""

    def __iter__(self) -> Iterator[Any]:
        """Every source."""


class Packed(NamedTuple):
    """`weight` (3, 3, O, I) contiguous in the arithmetic's dtype, `scale` and `shift` (O,) fp32, None for 1 and 0.

    Where a 1×1 convolution follows, `head_weight` (K, O) and `head_bias` (K,) fp32.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None


class Sources(NamedTuple):
    """What one fused convolution is made of.

    weight (O, I, 3, 3), the rest (O,): any floating dtype, one device. `bias` is the convolution's, `gamma` and `beta`
    are BatchNorm's weight and bias; each of the three may be None. `head_weight` (K, O, 1, 1) and `head_bias` (K,) are
    those of a 1×1 convolution behind it.
    """

    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None

    def owners(self) -> tuple[Tensor, ...]:
        """The convolution's weight and BatchNorm's running mean."""
        return self.weight, self.mean

    def pack(self, dtype: torch.dtype) -> Packed:
        """BatchNorm as one multiplication and one addition in fp32, and the weight in the order the kernel reads it.

        scale = γ / √(σ² + ε),  shift = β + (bias - μ) · scale;  relu(bn(conv(x))) = relu(conv₀(x) · scale + shift).

        The scale stays outside the weight: the epilogue multiplies its fp32 accumulator, so the weight is rounded to
        `dtype` once, as eager rounds it, and no channel of tiny variance overflows fp16.
        """
        o = self.weight.shape[0]
        mean, var = vector(self.mean, o), vector(self.var, o)
        scale = torch.rsqrt(var + self.eps)
        if self.gamma is not None:
            scale = scale * vector(self.gamma, o)
        offset = -mean if self.bias is None else vector(self.bias, o) - mean
        shift = offset * scale
        if self.beta is not None:
            shift = shift + vector(self.beta, o)
        folded = Packed(copied(self.weight.permute(2, 3, 0, 1), dtype), scale, shift)
        if self.head_weight is None:
            return folded
        head = copied(self.head_weight.flatten(1), torch.float32)
        k = head.shape[0]
        bias = head.new_zeros(k) if self.head_bias is None else copied(vector(self.head_bias, k), torch.float32)
        return folded._replace(head_weight=head, head_bias=bias)


@dataclasses.dataclass
class _Entry:
    packed: tuple[Tensor | None, ...]
    stamp: tuple[object, ...]
    # While these live, the storages' addresses, which are the key, are not given to anything else.
    owners: tuple[StorageWeakRef, ...]


_entries: dict[tuple[object, ...], _Entry] = {}
_lock = threading.Lock()
_uncounted_steps = 0


def copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`, dense, in memory of its own: a packed tensor is written over when its sources change."""
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


def vector(tensor: Tensor, length: int) -> Tensor:
    """`tensor` in fp32, of which a kernel reads `length` values.

    Raises:
        RuntimeError: it has others.
    """
    if tuple(tensor.shape) != (length,):
        raise RuntimeError(f"one value for each of {length} channels is wanted; given {tuple(tensor.shape)}")
    return tensor.detach().float()


def packed(sources: Packable, dtype: torch.dtype) -> Any:  # noqa: ANN401 - what the sources' own pack returns
    """`sources.pack(dtype)`, remembered until a source changes, at an address that stays while its sources' do."""
    _watch_optimizers()
    stamp = _stamp(sources)
    if stamp is None:
        return sources.pack(dtype)
    key = _key(sources, dtype)
    with _lock:
        entry = _entries.get(key)
        if entry is not None and entry.stamp == stamp:
            return entry.packed
        # Not as inference tensors, which nobody may write to when the weights have changed.
        with torch.inference_mode(mode=False), torch.no_grad():
            fresh = sources.pack(dtype)
        device = sources.owners()[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Recorded, not computed: it packs at every replay, and its memory belongs to the graph.
            return fresh
        if entry is not None and _shapes(entry.packed) == _shapes(fresh):
            for kept, new in zip(entry.packed, fresh, strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)
            fresh = entry.packed
        if device.type == "cuda":
            # Once, since a call on another stream will find it, and must not read what is not written yet.
            torch.cuda.current_stream(device).synchronize()
        _sweep()
        owners = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in sources.owners())
        _entries[key] = _Entry(fresh, stamp, owners)
        return fresh


def renew(sources: Packable) -> None:
    """Bring what was packed from `sources`, in any dtype, up to date in place; what was never packed stays so."""
    for dtype in PACKED_DTYPES:
        if _key(sources, dtype) in _entries:
            packed(sources, dtype)


def forget() -> None:
    """Drop every packed tensor: the next call of each fused convolution packs anew, at a new address."""
    with _lock:
        _entries.clear()


def uncounted_steps() -> int:
    """How many steps of fused optimizers there were: writes that no tensor's version counts."""
    return _uncounted_steps


@functools.cache
def _watch_optimizers() -> None:
    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # noqa: ANN401
        global _uncounted_steps  # noqa: PLW0603 - one count for the process, as versions are one for a tensor
        _uncounted_steps += any(group.get("fused") for group in optimizer.param_groups)

    register_optimizer_step_post_hook(stepped)


def _key(sources: Packable, dtype: torch.dtype) -> tuple[object, ...]:
    # A storage and a place in it, not the tensor: compiled code may pass another tensor object over the same memory.
    # Its shape too: the first channels of a weight begin where the weight does.
    places = [
        (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)  # noqa: SLF001 - as torch.multiprocessing.reductions does
        for tensor in sources.owners()
    ]
    return (type(sources), *places, dtype)


def _stamp(sources: Packable) -> tuple[object, ...] | None:
    stamp: list[object] = [_uncounted_steps]
    for source in sources:
        if not isinstance(source, Tensor):
            stamp.append(source)
        elif source.is_inference():
            return None  # such tensors count no versions: pack at every call
        else:
            stamp += (source.data_ptr(), source._version, source.dtype, source.device, source.stride())  # noqa: SLF001
    return tuple(stamp)


def _shapes(tensors: tuple[Tensor | None, ...]) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in tensors]


def _sweep() -> None:
    for key in [key for key, entry in _entries.items() if any(owner.expired() for owner in entry.owners)]:
        del _entries[key]
