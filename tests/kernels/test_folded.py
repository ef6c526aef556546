"""Transposed convolutions folded into the convolutions behind them: the same networks without the map between."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

import kernels
from kernels import conv_bn_relu_up
from kernels.convolve import nhwc
from kernels.folded_packing import Sources
from kernels.problem import Problem
from unet import UNet
from unet.containers import CONTAINERS, build

if TYPE_CHECKING:
    from collections.abc import Callable


def same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def folded(model: nn.Module) -> nn.Module:
    return kernels.fuse(model, fold_transposed=True)


def calls(model: nn.Module, x: Tensor) -> list[str]:
    return [call.kernel for call in kernels.account_for(model, x).calls]


@pytest.mark.parametrize("container", CONTAINERS)
def test_our_unet_in_every_container(container: str) -> None:
    model = build(container, 3, 2, width=4, depth=2).eval()
    fused = folded(model)
    report = kernels.fusion_report(fused)
    assert (report.chains_fused, report.chains_left, report.transposed, report.left) == (10, 0, (), ())
    taken = [entry.transposed for entry in report.fused if entry.transposed]
    assert all(isinstance(model.get_submodule(path), nn.ConvTranspose2d) for path in taken)
    assert len(taken) == len(set(taken)) == 2
    assert list(fused.state_dict()) == list(model.state_dict())
    account = kernels.account_for(fused, torch.empty(1, 3, 9, 14))
    assert account.others == []
    assert len(account.calls) == 10


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 16, 16), (1, 3, 17, 23)])
def test_it_gives_what_eager_gives(
    shape: tuple[int, ...], lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(UNet(3, 2, width=4, depth=2)).to(device)
    x = torch.randn(shape, device=device)
    with torch.no_grad():
        same(folded(model)(x).contiguous(), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(97, 131), (640, 959)])
def test_our_unet_on_odd_sizes(
    size: tuple[int, int], lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(UNet(3, 2, width=1)).to(device)
    x = torch.randn(1, 3, *size, device=device)
    with torch.no_grad():
        same(folded(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_weights_round_no_worse_than_eager_s_map(
    dtype: torch.dtype, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(UNet(3, 2, width=4, depth=2)).to(dtype)
    x = torch.randn(1, 3, 16, 16).to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        mine = folded(model).to(device)(x.to(device)).cpu().double()
        eager = model.to(device)(x.to(device)).cpu().double()
    errors = [float((result - truth).norm() / truth.norm()) for result in (mine, eager)]
    assert errors[0] <= 1.5 * errors[1], errors


class Decoder(nn.Module):
    """A level of somebody's decoder, and what a test does with the upsampled map and the features."""

    def __init__(self, meet: Callable[[Decoder, Tensor, Tensor], Tensor], *, bias: bool = True) -> None:
        super().__init__()
        self.meet = meet
        self.skip, self.below = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 6, 1)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2, bias=bias)
        self.last = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        return self.meet(self, self.skip(x), self.up(self.below(low)))


def joined(module: Decoder, skip: Tensor, up: Tensor) -> Tensor:
    return module.last(torch.cat([skip, up], 1))


def centred(module: Decoder, skip: Tensor, up: Tensor) -> Tensor:
    down, right = skip.shape[2] - up.shape[2], skip.shape[3] - up.shape[3]
    return joined(module, skip, F.pad(up, [right // 2, right - right // 2, down // 2, down - down // 2]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [((8, 10), (4, 5)), ((9, 11), (4, 5)), ((12, 15), (4, 5)), ((13, 8), (2, 1)), ((7, 9), (4, 5)), ((3, 2), (1, 3))],
    ids=str,
)
def test_wherever_the_map_lies_in_the_skip(
    sizes: tuple[tuple[int, int], tuple[int, int]],
    lively: Callable[[nn.Module], nn.Module],
    device: torch.device,
    *,
    bias: bool,
) -> None:
    # Zeros on one side, on both, more than a tile of them; and a map that is cropped.
    torch.manual_seed(0)
    model = lively(Decoder(centred, bias=bias)).to(device)
    fused = folded(model)
    assert [entry.around for entry in kernels.fusion_report(fused).fused] == [
        ("two sources", "padding", "transposed convolution")
    ]
    x, low = (torch.randn(2, 3, *size, device=device) for size in sizes)
    with torch.no_grad():
        same(fused(x, low), model(x, low))


KEPT: dict[str, Callable[[Decoder, Tensor, Tensor], Tensor]] = {
    "the map is read elsewhere too": lambda module, skip, up: joined(module, skip, up) + up.mean(),
    "the map is the first source": lambda module, skip, up: module.last(torch.cat([up, skip], 1)),
    "a pool follows": lambda module, skip, up: F.max_pool2d(joined(module, skip, up), 2),
    "a head follows": lambda module, skip, up: module.head(joined(module, skip, up)),
    "the map is changed on the way": lambda module, skip, up: joined(module, skip, up.relu()),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_something_else_stays_a_kernel_of_its_own(
    case: str, lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    torch.manual_seed(0)
    model = lively(Decoder(KEPT[case])).to(device)
    fused = folded(model)
    report = kernels.fusion_report(fused)
    assert report.transposed == ("up",)
    assert not any(entry.transposed for entry in report.fused)
    x, low = torch.randn(1, 3, 8, 10, device=device), torch.randn(1, 3, 4, 5, device=device)
    with torch.no_grad():
        same(fused(x, low), model(x, low))


def test_of_a_module_called_twice_one_call_is_folded_and_the_other_still_renewed(
    lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    model = lively(
        Decoder(lambda module, skip, up: joined(module, skip, module.up(module.below(skip[:, :3]))) + up.mean())
    )
    fused = folded(model.to(device))
    report = kernels.fusion_report(fused)
    assert report.transposed == ("up",)
    assert [entry.transposed for entry in report.fused] == ["up"]
    assert fused._fused_transposed == ("up",)


def test_layers_that_are_trained_are_not_folded() -> None:
    with pytest.raises(ValueError, match="fold_transposed is for inference"):
        kernels.fuse(UNet(3, 2, width=2, depth=1), training=True, fold_transposed=True)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_folded_too(how: str) -> None:
    fused = folded(UNet(3, 2, width=2, depth=1))
    other = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))  # noqa: S301 - written here
    assert kernels.fusion_report(other) == kernels.fusion_report(fused)
    x = torch.empty(1, 3, 4, 6)
    assert calls(other, x) == calls(fused, x)
    assert "conv_transpose" not in calls(other, x)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["up1.up.weight", "up1.up.bias", "up1.conv.double_conv.0.weight"])
@pytest.mark.parametrize("renewed", [False, True])
def test_a_change_of_either_layer_is_seen(
    part: str, lively: Callable[[nn.Module], nn.Module], device: torch.device, *, renewed: bool
) -> None:
    model = lively(UNet(3, 2, width=2, depth=1)).to(device)
    fused = folded(model)
    x = torch.randn(1, 3, 6, 8, device=device)
    with torch.no_grad():
        before = fused(x)
        for one in (model, fused):
            one.get_parameter(part).mul_(1.5).add_(0.25)
        if renewed:
            kernels.renew(fused)
        same(fused(x), model(x))
    assert not torch.allclose(fused(x), before)


def test_renewal_writes_where_the_old_weights_were(lively: Callable[[nn.Module], nn.Module]) -> None:
    from kernels.packing import packed  # what a graph's replay reads

    fused = folded(lively(UNet(3, 2, width=2, depth=1)))
    up, chain = fused.get_submodule("up1.up"), fused.get_submodule("up1.conv.double_conv")
    norm = chain[1]  # type: ignore[index] # a Sequential
    layers = (chain[0].weight, chain[0].bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)  # type: ignore[index]
    sources = Sources(*layers, up.weight, up.bias)  # type: ignore[arg-type] # a transposed convolution
    old = packed(sources, torch.float32)
    kept = old.folded.clone()
    with torch.no_grad():
        up.weight.mul_(2)  # type: ignore[operator]
    kernels.renew(fused)
    assert packed(sources, torch.float32).folded.data_ptr() == old.folded.data_ptr()
    torch.testing.assert_close(old.folded, 2 * kept)


@pytest.mark.slow
def test_compilers_and_autocast_take_it(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    fused = folded(lively(UNet(3, 2, width=2, depth=1))).to(device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(1, 3, 4, 6, device=device)
    with torch.no_grad():
        same(compiled(x), fused(x))
        same(compiled(x[..., :4]), fused(x[..., :4]))
        program = torch.export.export(fused, (x,))
        assert sum("conv_bn_relu_up" in str(node.target) for node in program.graph.nodes) == 1
        same(program.module()(x), fused(x))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            low = fused(x)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), fused(x), rtol=0.05, atol=0.05)


def test_gradients_go_through_both_layers(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    model = lively(UNet(3, 2, width=2, depth=1)).to(device)
    fused = folded(model)
    x = torch.randn(1, 3, 6, 8, device=device)
    for one in (model, fused):
        one(x).square().sum().backward()
    for (name, mine), truth in zip(fused.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"up_weight": torch.zeros(8, 3, 3, 3)}, r"takes \(L, U, 2, 2\) for low"),
        ({"up_weight": torch.zeros(8, 4, 2, 2)}, r"takes a weight \(O, 9, 3, 3\)"),
        ({"low": torch.zeros(1, 8, 3, 3, dtype=torch.float16)}, "both sources have one dtype"),
        ({"placement": "exact", "low": torch.zeros(1, 8, 3, 3)}, "without padding both sources have one size"),
        ({"placement": "left"}, "placement is one of"),
        ({"up_bias": torch.zeros(1)}, "one value for each of 3 channels"),
    ],
    ids=lambda part: "" if isinstance(part, dict) else part,
)
def test_what_does_not_belong_together_is_refused(change: dict[str, object], said: str, device: torch.device) -> None:
    weight = torch.randn(4, 8, 3, 3)
    given: dict[str, object] = {
        "x": torch.randn(1, 5, 8, 10),
        "weight": weight,
        "bias": None,
        "mean": torch.zeros(4),
        "var": torch.ones(4),
        "gamma": None,
        "beta": None,
        "eps": 1e-5,
        "relu": True,
        "low": torch.randn(1, 8, 4, 5),
        "placement": "exact",
        "up_weight": torch.randn(8, 3, 2, 2),
        "up_bias": None,
    }
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in {**given, **change}.items()
    }
    with pytest.raises(RuntimeError, match=said):
        conv_bn_relu_up.conv_bn_relu_up(**moved)


@pytest.mark.parametrize("layout", ["nchw", "rows of a wider map", "expanded"])
def test_maps_of_any_strides(layout: str, device: torch.device) -> None:
    problem = Problem(batch=2, height=6, width=8, in_channels=80, out_channels=64, precision="fp16", second_channels=16)
    x, *layers = conv_bn_relu_up.inputs(problem, device, torch.Generator().manual_seed(0))
    if layout == "nchw":
        x = x.contiguous()
    elif layout == "expanded":
        x = x[:1].expand_as(x)
    else:
        wide = nhwc(torch.empty_strided, 2, 6, 11, 64, dtype=x.dtype, device=device)
        wide[...] = 1e4  # what must not be read
        wide[..., :8] = x
        x = wide[..., :8]
    exact = conv_bn_relu_up.reference(*(one.double().cpu() if isinstance(one, Tensor) else one for one in (x, *layers)))
    mine = conv_bn_relu_up.conv_bn_relu_up(x, *layers).cpu().double()
    assert float((mine - exact).norm() / exact.norm()) < 1e-3
