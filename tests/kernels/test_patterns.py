"""What `fuse` takes in around a convolution, in networks not ours, and what it leaves alone and why."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

import kernels
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable


def same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class Centred(nn.Module):
    """A decoder that pads on both sides, with sizes computed in its forward, and pools by a function."""

    def __init__(self, up: nn.Module | None, low: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.last = block(3, 4), block(4, low), block(8, 4)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.second(F.max_pool2d(skip, 2))
        double = self.up or (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        x = double(x)
        down, right = skip.size()[2] - x.size()[2], skip.size(3) - x.size(3)
        x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return self.last(torch.cat((skip, x), dim=1))


@pytest.mark.parametrize("up", ["transposed", "module", "function"])
def test_a_decoder_written_otherwise(up: str, lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    torch.manual_seed(0)
    layers = {"transposed": nn.ConvTranspose2d(8, 4, 2, stride=2), "module": nn.UpsamplingBilinear2d(scale_factor=2)}
    model = lively(Centred(layers.get(up), 8 if up == "transposed" else 4)).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    upsampling = () if up == "transposed" else ("bilinear upsampling",)
    assert [entry.around for entry in report.fused] == [("max-pool",), (), ("two sources", "padding", *upsampling)]
    assert report.transposed == (("up",) if up == "transposed" else ())
    assert report.left == ()
    for batch, size in ((2, (8, 12)), (1, (7, 11)), (0, (9, 6))):
        x = torch.randn(batch, 3, *size, device=device)
        with torch.no_grad(), kernels.Account(kernels.KERNELS) as account:
            mine = fused(x)
        same(mine, model(x))
        assert account.others == []
        assert len(account.calls) == (4 if up == "transposed" else 3)
    assert list(fused.state_dict()) == list(model.state_dict())


class Step(nn.Module):
    """A stem, what a test does behind it, and a convolution that reads the result."""

    def __init__(self, middle: Callable[[Step, Tensor], Tensor], channels: int = 4, **layers: nn.Module) -> None:
        super().__init__()
        self.middle = middle
        self.stem, self.last = block(3, 4), block(channels, 4)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, self.stem(x)))


def changed(y: Tensor) -> Tensor:
    y.add_(1)
    return y


def joined_then_changed(_: Step, y: Tensor) -> Tensor:
    both = torch.cat([y, y * 2], 1)
    y.mul_(0)
    return both


LEFT: dict[str, tuple[Step, dict[str, str]]] = {
    "a concatenation of three": (
        Step(lambda _, y: torch.cat([y, y, y], 1), 12),
        {"cat": "concatenates 3 tensors, not two"},
    ),
    "a concatenation of rows": (Step(lambda _, y: torch.cat([y, y], 2)), {"cat": "concatenates along dimension 2"}),
    "a concatenation read twice": (
        Step(lambda _, y: (c := torch.cat([y, y], 1)) + c.relu(), 8),
        {"cat": "not read by one fused convolution alone"},
    ),
    "a source changed after the concatenation": (
        Step(joined_then_changed, 8),
        {"cat": "something else runs between it and the convolution"},
    ),
    "a pool of a sum": (
        Step(lambda _, y: F.max_pool2d(y + 1, 2)),
        {"max_pool2d": "no fused convolution alone and first before it"},
    ),
    "a pool of features changed before it": (
        Step(lambda _, y: F.max_pool2d(changed(y), 2)),
        {"max_pool2d": "no fused convolution alone and first before it"},
    ),
    "an overlapping pool": (
        Step(lambda m, y: m.pool(y), pool=nn.MaxPool2d(3, stride=2, padding=1)),
        {"pool": "kernel size (3, 3), padding (1, 1)"},
    ),
    "a pool that rounds up": (
        Step(lambda _, y: F.max_pool2d(y, 2, ceil_mode=True)),
        {"max_pool2d": "ceil mode True"},
    ),
    "an upsampling without a concatenation": (
        Step(lambda _, y: F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)),
        {"interpolate": "not the second of two sources of one fused convolution"},
    ),
    "an upsampling by the nearest": (
        Step(lambda m, y: m.up(y), up=nn.Upsample(scale_factor=2)),
        {"up": "not bilinear ×2 with corners aligned"},
    ),
    "a transposed convolution of three taps": (
        Step(lambda m, y: m.up(y), up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)),
        {"up": "kernel size (3, 3), padding (1, 1)"},
    ),
    "a transposed convolution asked for a size": (
        Step(lambda m, y: m.up(y, output_size=[13, 17]), up=nn.ConvTranspose2d(4, 4, 2, stride=2)),
        {"up": "is asked for an output size"},
    ),
    "a grouped transposed convolution": (
        Step(lambda m, y: m.up(y), up=nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)),
        {"up": "groups 2"},
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_something_else_is_left_by_name(
    case: str, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    step, reasons = LEFT[case]
    model = lively(copy.deepcopy(step)).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    assert {entry.part: entry.reason for entry in report.left} == reasons
    assert report.chains_fused == 2
    assert report.chains_left == 0
    assert f"left: {next(iter(reasons.values()))}" in str(report)
    x = torch.randn(1, 3, 6, 8, device=device)
    with torch.no_grad():
        same(fused(x), model(x))


def test_two_sources_whose_upsampling_is_read_elsewhere_too(
    lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    def middle(_: Step, y: Tensor) -> Tensor:
        wide = F.interpolate(F.max_pool2d(y, 2), scale_factor=2, mode="bilinear", align_corners=True)
        return torch.cat([y + wide, wide], 1)

    model = lively(Step(middle, 8)).to(device)
    fused = kernels.fuse(model)
    around = [entry.around for entry in kernels.fusion_report(fused).fused]
    assert around == [("max-pool",), ("two sources",)]
    x = torch.randn(1, 3, 6, 8, device=device)
    with torch.no_grad():
        same(fused(x), model(x))


def test_sources_of_two_sizes_are_refused_as_in_eager_mode(device: torch.device) -> None:
    model = Step(lambda _, y: torch.cat([y, F.max_pool2d(y, 2)], 1), 8).eval().to(device)
    fused = kernels.fuse(model)
    assert kernels.fusion_report(fused).fused[1].around == ("two sources",)
    with pytest.raises(RuntimeError, match=r"both sources have one size; given \(6, 8\) and \(3, 4\)"), torch.no_grad():
        fused(torch.randn(1, 3, 6, 8, device=device))


@pytest.mark.parametrize(
    ("classes", "width", "times", "taken"), [(16, 8, 1, True), (17, 8, 1, False), (2, 136, 1, False), (2, 8, 2, False)]
)
def test_a_head_is_taken_where_one_program_holds_its_features(
    classes: int, width: int, times: int, *, taken: bool, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = block(3, width), nn.Conv2d(width, classes, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.head(y) * (y.mean() if times == 2 else 1)

    torch.manual_seed(0)
    model = lively(Headed()).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    assert report.fused[0].head == ("head" if taken else "")
    assert [entry.part for entry in report.left] == ([] if taken else ["head"])
    x = torch.randn(2, 3, 5, 7, device=device)
    with torch.no_grad():
        same(fused(x), model(x))


@pytest.mark.parametrize("image", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_logits_have_eager_s_layout_and_dtype(
    image: torch.memory_format, weights: torch.memory_format, device: torch.device
) -> None:
    model = UNet(3, 2, width=2, depth=1).eval().to(device, memory_format=weights)
    x = torch.randn(2, 3, 6, 8, device=device).contiguous(memory_format=image)
    fused = kernels.fuse(model)
    with torch.no_grad():
        assert fused(x).stride() == model(x).stride()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mine, eager = fused(x), model(x)
    assert (mine.stride(), mine.dtype) == (eager.stride(), eager.dtype)


def test_hooks_around_a_convolution_keep_firing(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    model = lively(UNet(3, 2, bilinear=True, width=2, depth=1)).to(device)
    paths = ("down1.maxpool_conv.0", "up1.up", "outc.conv")
    seen: list[str] = []
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    fused = kernels.fuse(model)
    x = torch.randn(1, 3, 6, 8, device=device)
    with torch.no_grad():
        same(fused(x), model(x))
    assert seen == [*paths, *paths]
    report = kernels.fusion_report(fused)
    assert {"down1.maxpool_conv.0", "outc.conv"} <= {entry.part for entry in report.left}
    assert all("hooks" in entry.reason for entry in report.left if entry.part != "up1.up")


@pytest.mark.parametrize("changed_part", ["outc.conv.weight", "outc.conv.bias", "up1.up.weight", "up1.up.bias"])
def test_a_change_of_what_is_taken_in_is_seen(
    changed_part: str, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    model = lively(UNet(3, 2, width=2, depth=1)).to(device)
    fused = kernels.fuse(model)
    x = torch.randn(1, 3, 6, 8, device=device)
    with torch.no_grad():
        before = fused(x)
        for one in (model, fused):
            one.get_parameter(changed_part).mul_(1.5).add_(0.25)
        kernels.renew(fused)
        after = fused(x)
        same(after, model(x))
    assert not torch.allclose(after, before)
