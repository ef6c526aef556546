"""A forward in a CUDA graph: the eager answer, also after its weights changed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.graph import casts_inside
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(
        NotImplementedError, match=r"unsupported: a CUDA graph needs inputs on a CUDA device; given cpu"
    ):
        kernels.Graphed(nn.Identity(), torch.zeros(1))


def test_a_capture_under_autocast_casts_each_weight_in_every_forward() -> None:
    layer, image = nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 2, 2)

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            self.count += func is torch.ops.aten._to_copy.default and args[0].shape == layer.weight.shape
            return func(*args, **(kwargs or {}))

    def casts(*, inside: bool) -> int:
        with Casts() as seen, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer(image)
            with casts_inside() if inside else contextlib.nullcontext():
                layer(image)
                layer(image)
        return seen.count

    assert casts(inside=False) == 1, "the trap: later forwards read what the first has left behind"
    assert casts(inside=True) == 3
    assert torch.is_autocast_cache_enabled()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fold", [False, True])
def test_replay_is_the_fused_model_before_and_after_its_weights_change(
    lively: Callable[[nn.Module], nn.Module], *, fold: bool
) -> None:
    model = lively(UNet(3, 2, width=16)).cuda().to(memory_format=torch.channels_last)
    fused = kernels.fuse(model, fold_transposed=fold)
    images = [torch.randn(2, 3, 64, 96, device="cuda").contiguous(memory_format=torch.channels_last) for _ in range(2)]
    graphed = kernels.Graphed(fused, images[0])

    def check() -> None:
        for image in images:
            with torch.no_grad():
                torch.testing.assert_close(graphed(image).clone(), fused(image), rtol=0, atol=1e-5)

    check()
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.1)
    check()
    fused.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    check()


@pytest.mark.gpu
@needs_gpu
def test_another_shape_is_refused_by_name() -> None:
    graphed = kernels.Graphed(nn.Conv2d(3, 3, 3).cuda(), torch.zeros(1, 3, 8, 8, device="cuda"))
    with pytest.raises(ValueError, match=r"recorded for \(1, 3, 8, 8\).*given \(1, 3, 9, 8\)"):
        graphed(torch.zeros(1, 3, 9, 8, device="cuda"))
