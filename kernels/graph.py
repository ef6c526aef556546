"""A whole forward in one CUDA graph that notices when the model's weights changed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.fuse import renew
from kernels.packing import uncounted_steps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Watch:
    """Remembers where a model's parameters and buffers are and how often each was written."""

    def __init__(self, model: nn.Module) -> None:
        # Slots, not tensors: load_state_dict(assign=True) puts another tensor into the same slot.
        self._slots: list[tuple[Mapping[str, Tensor | None], str]] = [
            (slots, name)
            for module in model.modules()
            for slots in (module._parameters, module._buffers)  # noqa: SLF001 - the dicts themselves are watched
            for name, tensor in slots.items()
            if tensor is not None
        ]
        self.addresses = self._addresses()
        self.versions = self._versions()

    def moved(self) -> bool:
        """Whether a tensor is elsewhere, in another dtype or gone: what a graph has recorded is void."""
        return self._addresses() != self.addresses

    def written(self) -> bool:
        """Whether a tensor was written since the last call (writes through `.data` leave no trace)."""
        versions = self._versions()
        changed, self.versions = versions != self.versions, versions
        return changed

    def _addresses(self) -> list[tuple[int, torch.dtype] | None]:
        tensors = [slots.get(name) for slots, name in self._slots]
        return [None if tensor is None else (tensor.data_ptr(), tensor.dtype) for tensor in tensors]

    def _versions(self) -> list[int]:
        tensors = [slots.get(name) for slots, name in self._slots]
        versions = [0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001
        return [*versions, uncounted_steps()]


@contextlib.contextmanager
def casts_inside() -> Iterator[None]:
    """Let a capture hold the casts of weights that autocast makes.

    Autocast keeps a cast weight until it ends, and then frees it: a graph that took it from there would read memory
    that is somebody else's by its first replay.
    """
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Graphed:
    """`model(*inputs)` replayed from one CUDA graph, for inputs of one shape, dtype and layout.

    Before a replay it looks whether weights changed: written in place, the packed ones are renewed where they are;
    moved (`.to()`, `.half()`, `load_state_dict(assign=True)`), the graph is recorded anew. The result lives in the
    graph's own memory: the next call overwrites it, so clone what must last. Call it under the autocast it was made
    under.

    Args:
        model: a module in evaluation mode on a CUDA device, usually from `fuse`; its forward must not depend on values.
        examples: its inputs, tensors on that device.

    Raises:
        NotImplementedError: the examples are not on a CUDA device.
    """

    def __init__(self, model: nn.Module, *examples: Tensor) -> None:
        if not examples or not all(example.is_cuda for example in examples):
            where = ", ".join(str(example.device) for example in examples) or "none"
            raise NotImplementedError(f"unsupported: a CUDA graph needs inputs on a CUDA device; given {where}")
        self._model = model
        self._inputs = tuple(example.detach().clone() for example in examples)
        self._record()

    def __call__(self, *inputs: Tensor) -> Any:  # noqa: ANN401 - whatever the model returns
        """Copy `inputs` into the graph's own, replay, and return its output.

        Raises:
            ValueError: an input's shape or dtype is not the example's.
        """
        for mine, given in zip(self._inputs, inputs, strict=True):
            if mine.shape != given.shape or mine.dtype != given.dtype:
                expected, came = f"{tuple(mine.shape)} {mine.dtype}", f"{tuple(given.shape)} {given.dtype}"
                raise ValueError(f"this graph was recorded for {expected}; given {came}: record another for it")
        with torch.no_grad(), torch.cuda.device(self._inputs[0].device):
            for mine, given in zip(self._inputs, inputs, strict=True):
                mine.copy_(given)
            if self._watch.moved():
                self._record()
            elif self._watch.written():
                renew(self._model)
            self._graph.replay()
        return self._output

    def _record(self) -> None:
        device = self._inputs[0].device
        with torch.no_grad(), torch.cuda.device(device), casts_inside():
            # On a side stream, as a capture asks for: kernels compile, cuDNN chooses, weights are packed.
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._model(*self._inputs)
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Not the stream that PyTorch takes by itself: that is one for all, on the device of the first capture.
            with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
                self._output = self._model(*self._inputs)
        self._watch = Watch(self._model)
