"""How several devices share a step: what goes around the network, and within it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

if TYPE_CHECKING:
    from bench.case import Case


def share(model: Any, case: Case, device: torch.device) -> Any:  # noqa: ANN401 (what an implementation has made)
    """`model` as the case's strategy wants it called: as it is, or in DistributedDataParallel or DataParallel."""
    strategy = case.shared_by
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if case.on_gpu else None)
    if strategy == "dp":
        return DataParallel(model, device_ids=list(range(case.device_count)))
    return model


def unexchanged(shared: nn.Module | None, *, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, backward passes of DistributedDataParallel add to the rank's own gradients alone."""
    if wanted and isinstance(shared, DistributedDataParallel):
        return shared.no_sync()
    return contextlib.nullcontext()


def synchronized(model: nn.Module, case: Case) -> nn.Module:
    """`model` with BatchNorm over the images of all ranks, where the case wants that.

    PyTorch's SyncBatchNorm on GPUs. It has none for CPUs; there the same arithmetic by gloo stands in.
    """
    if case.batchnorm != "syncbn":
        return model
    if case.on_gpu:
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SyncedBatchNorm.of(child))
    return model


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose mean and variance are those of all ranks' images together, whatever each rank's number of them.

    y = (x - μ) / √(σ² + ε) · γ + β, μ = Σx / n and σ² = Σ(x - μ)² / n over all pixels of all ranks; the running
    variance takes σ² · n / (n - 1). Gradients pass through the sums. Input (N, C, H, W) of any floating dtype;
    statistics in fp32, of fp64 in fp64.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> SyncedBatchNorm:
        """The same layer, synchronized, with the parameters and buffers of `norm` themselves."""
        synced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name, parameter in norm.named_parameters():
            setattr(synced, name, parameter)
        for name, buffer in norm.named_buffers():
            setattr(synced, name, buffer)
        return synced.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; in evaluation as any BatchNorm."""
        if not self.training or self.running_mean is None or self.running_var is None or self.momentum is None:
            return super().forward(x)
        pixels, column = (0, 2, 3), (1, -1, 1, 1)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            count = _sum_of_ranks(wide.new_tensor([x.numel() / x.shape[1]]))
            mean = _sum_of_ranks(wide.sum(pixels)) / count
            centred = wide - mean.view(column)
            variance = _sum_of_ranks(centred.square().sum(pixels)) / count
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight * (variance + self.eps).rsqrt()
            return (centred * scale.view(column) + self.bias.view(column)).to(x.dtype)


def _sum_of_ranks(tensor: Tensor) -> Tensor:
    """The sum over ranks; its gradient is the sum over ranks of theirs."""
    total: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:  # noqa: ANN401 (autograd's context)
        return _all_reduced(tensor)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401 (autograd's context)
        return _all_reduced(gradients[0])


def _all_reduced(tensor: Tensor) -> Tensor:
    import torch.distributed as dist

    total = tensor.clone()
    dist.all_reduce(total)
    return total
