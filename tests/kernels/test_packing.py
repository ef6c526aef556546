"""Packed weights follow every change of their sources that PyTorch counts, at an address that stays."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import kernels
from kernels import packing
from kernels.conv_bn_relu import conv_bn_relu
from kernels.graph import Watch

if TYPE_CHECKING:
    from collections.abc import Callable


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@pytest.fixture
def pair(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model, the same fused and called once, and an input."""
    torch.manual_seed(0)
    model = lively(Block()).to(device)
    fused = kernels.fuse(model)
    x = torch.randn(1, 4, 6, 5, device=device)
    with torch.no_grad():
        fused(x)
    return model, fused, x


def same(model: nn.Module, fused: nn.Module, x: torch.Tensor) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[x.dtype]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=tolerance, atol=tolerance)


def other_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value + 1 if value.is_floating_point() and "var" not in name else value.clone()
        for name, value in model.state_dict().items()
    }


def load(model: nn.Module) -> None:
    model.load_state_dict(other_state(model))


def assign(model: nn.Module) -> None:
    model.load_state_dict(other_state(model), assign=True)


def step(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: bool) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    kind(model.parameters(), lr=0.1, **options).step()


def in_place(name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            dict(model.state_dict(keep_vars=True))[name].mul_(1.5).add_(0.25)

    return change


def statistics(model: nn.Module) -> None:
    model.norm.reset_running_stats()


def swap_data(model: nn.Module) -> None:
    model.conv.weight.data = model.conv.weight.data * 2


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": load,
    "load_state_dict(assign=True)": assign,
    ".half()": nn.Module.half,
    ".bfloat16()": nn.Module.bfloat16,
    ".to(float16) and back": lambda model: model.half().float(),
    "optimizer.step() of SGD": step,
    "optimizer.step() of foreach Adam": lambda model: step(model, torch.optim.Adam, foreach=True),
    "optimizer.step() of fused Adam": lambda model: step(model, torch.optim.Adam, fused=True),
    "reset_running_stats": statistics,
    "assignment to .data": swap_data,
    **{
        f"in place: {name}": in_place(name)
        for name in (
            *("conv.weight", "conv.bias"),
            *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(change: str, pair: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    model, fused, x = pair
    for one in (model, fused):
        CHANGES[change](one)
    same(model, fused, x.to(model.conv.weight.dtype))


def test_a_change_is_seen_by_compiled_code(pair: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    model, fused, x = pair
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    same(model, compiled, x)
    for one in (model, fused):
        in_place("conv.weight")(one)
    same(model, compiled, x)


def addresses(fused: nn.Module) -> list[int]:
    conv, norm = fused.conv, fused.norm
    sources = packing.Sources(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    return [tensor.data_ptr() for tensor in packing.packed(sources, torch.float32) if tensor is not None]


@pytest.mark.parametrize("change", ["load_state_dict", "optimizer.step() of SGD", "in place: norm.running_var"])
def test_the_address_stays_while_the_sources_stay(change: str, pair: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    _, fused, _ = pair
    before = addresses(fused)
    CHANGES[change](fused)
    assert addresses(fused) == before


def test_renew_writes_what_the_next_call_would_pack(pair: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    _, fused, _ = pair
    (entry,) = [entry for entry in packing._entries.values() if entry.packed.weight.data_ptr() == addresses(fused)[0]]
    before = entry.packed.weight.clone()
    in_place("conv.weight")(fused)
    assert torch.equal(entry.packed.weight, before)
    kernels.renew(fused)
    expected = fused.conv.weight.detach().permute(2, 3, 0, 1)
    assert torch.equal(entry.packed.weight, expected)


def test_writes_through_data_are_the_named_exception(pair: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    model, fused, x = pair
    for one in (model, fused):
        one.conv.weight.data.mul_(3)
    with pytest.raises(AssertionError, match="not close"):
        same(model, fused, x)
    packing.forget()
    same(model, fused, x)


def test_two_models_do_not_share_packed_weights(pair: tuple[nn.Module, nn.Module, torch.Tensor]) -> None:
    model, fused, x = pair
    other = copy.deepcopy(fused)
    in_place("conv.weight")(other)
    with torch.no_grad():
        other(x)
    assert set(addresses(other)).isdisjoint(addresses(fused))
    same(model, fused, x)


def test_nothing_is_packed_twice(
    pair: tuple[nn.Module, nn.Module, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fused, x = pair
    monkeypatch.setattr(packing.Sources, "pack", lambda *_: pytest.fail("packed again"))
    with torch.no_grad():
        fused(x)
    with torch.inference_mode():
        fused(x)


def test_packed_weights_go_when_their_model_goes(device: torch.device) -> None:
    x = torch.randn(1, 4, 4, 4, device=device)
    packing.forget()

    def use() -> weakref.ref[torch.Tensor]:
        fused = kernels.fuse(Block().to(device))
        with torch.no_grad():
            fused(x)
        (entry,) = packing._entries.values()
        return weakref.ref(entry.packed.weight)

    first = use()
    gc.collect()
    use()  # packing anew looks for what is left over
    gc.collect()
    assert first() is None
    assert len(packing._entries) == 1


def test_weights_made_under_inference_mode_work(device: torch.device) -> None:
    with torch.inference_mode():
        fused = kernels.fuse(Block().to(device))
        x = torch.randn(1, 4, 4, 4, device=device)
        before = fused(x)
        fused.conv.weight.zero_()
        assert not torch.equal(fused(x), before)


def test_weights_first_used_under_inference_mode_may_change(device: torch.device) -> None:
    model = Block().to(device).eval()
    fused = kernels.fuse(model)
    x = torch.randn(1, 4, 4, 4, device=device)
    with torch.inference_mode():
        fused(x)
    for network in (model, fused):
        in_place("conv.weight")(network)
    same(model, fused, x)


@pytest.mark.gpu
@needs_gpu
def test_weights_packed_on_one_stream_are_whole_on_another(lively: Callable[[nn.Module], nn.Module]) -> None:
    model = lively(Block()).cuda()
    x = torch.randn(1, 4, 6, 5, device="cuda")
    with torch.no_grad():
        kernels.fuse(lively(Block()).cuda())(x)  # compiled now, not in between
        fused = kernels.fuse(model)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(500_000_000)  # a quarter of a second in which nothing is packed
            fused(x)
        same(model, fused, x)


def test_the_first_channels_of_a_weight_are_not_the_whole(device: torch.device) -> None:
    block = Block().to(device).eval()
    x = torch.randn(1, 4, 4, 4, device=device)
    parameters = (block.conv.weight, block.conv.bias, block.norm.running_mean, block.norm.running_var)
    with torch.no_grad():
        whole = conv_bn_relu(x, *parameters, None, None, 1e-5, True)  # noqa: FBT003 - an op's arguments
        some = conv_bn_relu(x, *(one[:3] for one in parameters), None, None, 1e-5, True)  # noqa: FBT003
        torch.testing.assert_close(some, whole[:, :3])


@pytest.mark.parametrize("name", ["bias", "mean", "var", "gamma", "beta", "head_bias"])
def test_one_value_for_many_channels_is_refused(name: str) -> None:
    # A kernel would read past its end.
    vector = torch.ones(8)
    sources = packing.Sources(torch.ones(8, 4, 3, 3), *[vector] * 5, 1e-5, torch.ones(8, 8, 1, 1), vector)
    with pytest.raises(RuntimeError, match=r"one value for each of 8 channels is wanted; given \(1,\)"):
        sources._replace(**{name: torch.ones(1)}).pack(torch.float32)


@pytest.mark.parametrize(
    ("change", "moved", "written"),
    [
        (lambda _: None, False, False),
        (load, False, True),
        (step, False, True),
        (assign, True, False),
        (nn.Module.half, True, False),
        (swap_data, True, False),
    ],
)
def test_a_graph_sees_what_changed(change: Callable[[nn.Module], object], *, moved: bool, written: bool) -> None:
    model = Block()
    watch = Watch(model)
    change(model)
    assert watch.moved() is moved
    if not moved:
        assert watch.written() is written
    assert watch.written() is False or moved
