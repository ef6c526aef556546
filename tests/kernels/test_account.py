"""The bytes of the fused U-Net are those of the arithmetic: counted, not hoped for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import kernels
from kernels import conv_bn_relu_up, conv_transpose, convolve
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# 512×512, 3 → 2, width 64, 16 bits: MB that must move, GFLOP. Each layer reads its inputs and weights once and writes
# its outputs once; nothing is read or written between layers. Summed by hand, layer by layer.
FUSED = {("transposed", 1): (666.6, 385.4), ("transposed", 16): (9734.1, 6166.0)}
FUSED |= {("bilinear", 1): (479.6, 319.9), ("bilinear", 16): (7156.4, 5118.0)}
FUSED |= {("folded", 1): (551.3, 359.6), ("folded", 16): (7731.3, 5753.6)}
LAUNCHES = {"transposed": 22, "bilinear": 18, "folded": 18}


def fuse(model: nn.Module, upsampling: str) -> nn.Module:
    return kernels.fuse(model, fold_transposed=upsampling == "folded")


def on_meta(upsampling: str, batch: int, size: tuple[int, int] = (512, 512)) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        model = UNet(3, 2, bilinear=upsampling == "bilinear").eval().bfloat16()
        return model, torch.empty(batch, 3, *size, dtype=torch.bfloat16)


@pytest.mark.parametrize(("upsampling", "batch"), FUSED)
def test_every_byte_is_one_that_arithmetic_needs(upsampling: str, batch: int) -> None:
    model, image = on_meta(upsampling, batch)
    account = kernels.account_for(fuse(model, upsampling), image)
    megabytes, gflop = FUSED[upsampling, batch]
    assert account.others == []
    assert len(account.calls) == LAUNCHES[upsampling]
    assert sum(call.bytes for call in account.calls) / 1e6 == pytest.approx(megabytes, rel=0.001)
    assert sum(call.flops for call in account.calls) / 1e9 == pytest.approx(gflop, rel=0.001)


@pytest.mark.parametrize("size", [(512, 512), (97, 131)])
@pytest.mark.parametrize("upsampling", LAUNCHES)
def test_nothing_is_allocated_but_what_a_kernel_hands_on(upsampling: str, size: tuple[int, int]) -> None:
    model, image = on_meta(upsampling, 1, size)
    account = kernels.account_for(fuse(model, upsampling), image)
    handed_on = [shape for call in account.calls for shape in call.shapes]
    assert [allocation.shape for allocation in account.allocations] == handed_on
    assert account.bytes == 0


def test_an_extra_tensor_would_be_seen() -> None:
    model, image = on_meta("bilinear", 1)
    fused = kernels.fuse(torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), model))
    account = kernels.account_for(fused, image)
    assert account.others == ["aten::upsample_nearest2d"]
    assert account.allocations[0].operation == "aten::upsample_nearest2d"


# Of eager's, which concatenates. Upsampled by transposed convolutions, the table's own maps that live at once at the
# last level, skip, upsampled and result, are 96 of eager's 176 MiB; folded into the next convolution, the second is
# never made, and what lives beside the others is its input, of half the size.
PEAKS = {"bilinear": 0.43, "transposed": 0.546, "folded": 0.456}


@pytest.mark.parametrize("size", [(512, 512), (640, 959)])
@pytest.mark.parametrize("upsampling", PEAKS)
def test_activations_alive_at_once(upsampling: str, size: tuple[int, int]) -> None:
    model, image = on_meta(upsampling, 1, size)
    eager, fused = (kernels.account_for(one, image).peak_bytes for one in (model, fuse(model, upsampling)))
    assert fused <= PEAKS[upsampling] * eager


def test_the_count_is_of_what_lives_and_not_of_what_was() -> None:
    class Chain(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            x = x + 1
            x = x + 1
            return x.relu_().view(-1)

    account = kernels.account_for(Chain(), torch.empty(256))
    assert len(account.allocations) == 3
    assert account.peak_bytes == 2 * 1024
    assert account.bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("upsampling", LAUNCHES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_interpreter_launches_what_was_counted(
    upsampling: str, layout: torch.memory_format, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[object] = []
    for module in (convolve, conv_transpose, conv_bn_relu_up):
        original = module.launch
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, *a, _launch=original, **k: launches.append(kernel) or _launch(kernel, *a, **k),
        )
    fused = fuse(UNet(3, 2, bilinear=upsampling == "bilinear", width=8, depth=2), upsampling).half().to(device)
    image = torch.randn(1, 3, 17, 24, dtype=torch.float16, device=device).contiguous(memory_format=layout)
    with torch.no_grad(), kernels.Account(kernels.KERNELS) as account:
        fused(image)
    # The image is read where it is: no layout pass, no cast, no copy, whatever its layout.
    assert account.others == []
    assert len(launches) == len(account.calls) == {"transposed": 12, "bilinear": 10, "folded": 10}[upsampling]
    families = [launch.__name__ for launch in launches]
    assert families[0] == "pointers"
    folded = 2 * (upsampling == "folded")  # their boxes take whole blocks of channels, and here there are eight
    assert families[1:].count("descriptors") == len(families) - 1 - folded or device.type == "cuda"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("upsampling", LAUNCHES)
def test_the_allocator_holds_what_was_counted(upsampling: str, lively: Callable[[nn.Module], nn.Module]) -> None:
    model = fuse(lively(UNet(3, 2, bilinear=upsampling == "bilinear")), upsampling).half().cuda()
    image = torch.randn(1, 3, 512, 512, dtype=torch.float16, device="cuda")
    image = image.contiguous(memory_format=torch.channels_last)
    expected = kernels.account_for(model, image).peak_bytes
    with torch.no_grad():
        model(image)  # compiles and packs
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(image)
    grown = torch.cuda.max_memory_allocated() - before
    assert expected <= grown <= expected + 22 * 512  # blocks are rounded up to 512 bytes
