"""Operations and bytes of a module, counted on the meta device: shapes only, nothing is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_aten = torch.ops.aten
_MOVING = {
    _aten.convolution.default,
    _aten.max_pool2d_with_indices.default,
    _aten.upsample_bilinear2d.default,
    _aten.upsample_bilinear2d.vec,
    _aten.cat.default,
    _aten.constant_pad_nd.default,
}
_NORMS = {
    _aten.native_batch_norm.default,
    _aten._native_batch_norm_legit_no_training.default,  # noqa: SLF001 (an operation's name)
    _aten.cudnn_batch_norm.default,
}


class _Traffic(TorchDispatchMode):
    """Sums what the operations of a forward pass must move if BatchNorm and ReLU ride along with their convolution."""

    def __init__(self, item_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.bytes = 0
        self._item_bytes = item_bytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation gives)
        result = func(*args, **(kwargs or {}))
        if func in _MOVING:
            read = args[0] if func is _aten.cat.default else args[:3]
            # Of pooling the maxima alone: where they stood matters to a backward pass.
            written = result[0] if isinstance(result, tuple) else result
            tensors = [tensor for tensor in (*read, written) if isinstance(tensor, Tensor)]
            self.bytes += self._item_bytes * sum(tensor.numel() for tensor in tensors)
        elif func in _NORMS:
            self.bytes += 8 * args[0].shape[1]  # a scale and a shift a channel, fp32
        return result


def gflop(call: Callable[[], object]) -> float:
    """10⁹ floating-point operations of what `call` does on the meta device, 2 a multiply-add; by torch's formulas."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops() / 1e9


def gbyte(module: nn.Module, inputs: Sequence[Tensor], precision: str) -> float:
    """10⁹ bytes that a forward pass must move at least, operation by operation, in the arithmetic of `precision`.

    Each convolution reads its input and weight once and writes its output once, BatchNorm and ReLU included, as the
    cost of the fused kernel says; pooling, upsampling, padding and concatenation read and write once. Nothing stays in
    a cache between two of them.
    """
    traffic = _Traffic(4 if precision in {"fp32", "tf32"} else 2)
    # Not inference mode, in which a mode like this sees conv2d and batch_norm instead of what they consist of.
    with traffic, torch.no_grad():
        module(*inputs)
    return traffic.bytes / 1e9
