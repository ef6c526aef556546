"""`fuse` on our own network: odd sizes, 16 bits, every container and variant."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import kernels
from unet import UNet
from unet.containers import CONTAINERS, build
from unet.modify import CHANGES, change, inputs_for

if TYPE_CHECKING:
    from collections.abc import Callable


def same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
@pytest.mark.parametrize("bilinear", [False, True])
def test_our_unet(
    *, bilinear: bool, size: tuple[int, int], lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(UNet(3, 2, bilinear, width=4)).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    assert (report.chains_fused, report.chains_left) == (18, 0)
    assert isinstance(fused, UNet)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), model.state_dict().values(), strict=True))
    for batch in (0, 2) if size == (32, 32) else (1,):
        x = torch.randn(batch, 3, *size, device=device)
        with torch.no_grad():
            same(fused(x).contiguous(), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("size", [(97, 131), (640, 959)])
@pytest.mark.parametrize("bilinear", [False, True])
def test_our_unet_on_odd_sizes(
    *,
    bilinear: bool,
    size: tuple[int, int],
    batch: int,
    lively: Callable[[nn.Module], nn.Module],
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    model = lively(UNet(3, 2, bilinear, width=1)).to(device)
    fused = kernels.fuse(model)
    x = torch.randn(batch, 3, *size, device=device)
    with torch.no_grad(), kernels.Account(kernels.KERNELS) as account:
        mine = fused(x)
    with torch.no_grad():
        same(mine, model(x))
    assert account.others == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_our_unet_in_16_bits_is_as_near_to_fp64_as_eager(
    dtype: torch.dtype, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(UNet(3, 2, width=4)).to(dtype)
    x = torch.randn(1, 3, 32, 32).to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        mine = kernels.fuse(model).to(device)(x.to(device)).cpu().double()
        eager = model.to(device)(x.to(device)).cpu().double()
    errors = [float((result - truth).norm() / truth.norm()) for result in (mine, eager)]
    assert errors[0] <= 1.5 * errors[1], errors


@pytest.mark.parametrize("container", CONTAINERS)
def test_our_unet_in_every_container(
    container: str, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(build(container, 3, 2, width=4, depth=2)).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    assert (report.chains_fused, report.chains_left) == (10, 0), str(report)
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(1, 3, 9, 14, device=device)
    with torch.no_grad():
        same(fused(x), model(x))


@pytest.mark.parametrize("modified", CHANGES)
def test_our_unet_in_every_variant(
    modified: str, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(change(UNet(3, 2, width=4, depth=2), modified)).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    assert (report.chains_fused, report.chains_left) == (10, 0), str(report)
    inputs = inputs_for(model, torch.randn(2, 3, 9, 14, device=device))
    with torch.no_grad():
        same(fused(*inputs), model(*inputs))
