"""One network in five containers: the same numbers to the bit, each key translated."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from unet import UNet
from unet.containers import CONTAINERS, Skip, build, convert, key_map

if TYPE_CHECKING:
    from collections.abc import Callable

BOTH = pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_plain_networks_logits_to_the_bit(
    alive: Callable[..., UNet], container: str, *, bilinear: bool, depth: int
) -> None:
    plain = alive(bilinear=bilinear, depth=depth)
    other = build(container, 3, 2, bilinear=bilinear, width=4, depth=depth).eval()
    other.load_state_dict(convert(plain.state_dict(), key_map("unet", container, bilinear=bilinear, depth=depth)))
    for size in ((16, 16), (37, 61)):
        x = torch.randn(2, 3, *size)
        assert torch.equal(other(x), plain(x))
    assert (other.n_channels, other.n_classes, other.bilinear, other.width, other.depth) == (3, 2, bilinear, 4, depth)


@pytest.mark.parametrize("container", CONTAINERS[1:])
def test_gradients_and_statistics_are_the_plain_networks_too(alive: Callable[..., UNet], container: str) -> None:
    plain = alive().train()
    other = build(container, 3, 2, width=4)
    names = key_map("unet", container)
    other.load_state_dict(convert(plain.state_dict(), names))
    x = torch.randn(2, 3, 32, 32)
    for model in (plain, other):
        model(x).square().mean().backward()
    theirs, buffers = dict(other.named_parameters()), dict(other.named_buffers())
    assert all(torch.equal(p.grad, theirs[names[name]].grad) for name, p in plain.named_parameters())
    assert all(torch.equal(b, buffers[names[name]]) for name, b in plain.named_buffers())


@BOTH
@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(CONTAINERS, 2)))
def test_a_key_map_there_and_back_changes_nothing(a: str, b: str, *, bilinear: bool) -> None:
    there, back = key_map(a, b, bilinear=bilinear), key_map(b, a, bilinear=bilinear)
    assert len(there) == (110 if bilinear else 118)
    assert all(back[there[name]] == name for name in there)


def test_keys_are_called_as_each_container_calls_them() -> None:
    first = {name: next(iter(key_map("unet", name).values())) for name in CONTAINERS}
    assert first == {
        "unet": "inc.double_conv.0.weight",
        "sequential": "net.0.0.0.weight",
        "ordered": "net.unet.encode.0.weight",
        "modulelist": "encoder.0.0.weight",
        "moduledict": "net.encode0.0.weight",
    }
    assert key_map("unet", "moduledict")["down4.maxpool_conv.1.double_conv.3.weight"] == "net.encode4.3.weight"
    assert key_map("moduledict", "modulelist")["net.up1.bias"] == "decoder.0.0.bias"
    assert key_map("unet", "ordered")["up4.up.weight"] == "net.unet.skip.inner.up.weight"


def test_keys_of_another_network_are_refused_by_name() -> None:
    names = key_map("unet", "ordered", depth=2)
    state = UNet(3, 2, width=4, depth=2).state_dict()
    del state["outc.conv.bias"]
    state["stranger"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unknown \['stranger'\], missing \['outc.conv.bias'\]"):
        convert(state, names)


def test_an_unknown_container_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tuple': expected one of unet, sequential, ordered, modulelist, moduledict"):
        build("tuple", 3, 2)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_checks_its_input(container: str) -> None:
    model = build(container, 3, 2, width=2, depth=2)
    for bad, said in (
        ((1, 4, 8, 8), "4 channels"),
        ((3, 8, 8), "3 dimensions"),
        ((1, 3, 7, 7), "one value per channel"),
    ):
        with pytest.raises(ValueError, match=said):
            model(torch.zeros(bad))
    with pytest.raises(TypeError, match=r"float64"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_can_be_traced(container: str) -> None:
    model = build(container, 3, 2, width=2, depth=2).eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(1, 3, 9, 10)
    assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match=r"4 channels"):
        traced(torch.zeros(1, 4, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS[1:])
def test_every_container_compiles_and_exports(container: str) -> None:
    torch._dynamo.reset()
    model = build(container, 3, 2, width=2, depth=2).eval()
    x = torch.randn(1, 3, 37, 61)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    sizes = {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
    x = torch.randn(1, 3, 16, 23)
    torch.testing.assert_close(exported(x), model(x))


def test_a_skip_concatenates_what_it_got_first() -> None:
    x = torch.randn(1, 2, 5, 5)
    out = Skip(nn.MaxPool2d(1))(x)
    assert torch.equal(out, torch.cat([x, x], 1))


def test_a_plain_list_registers_nothing_and_a_module_list_cannot_be_called() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Conv2d(3, 2, 1)]

    assert not list(Plain().parameters())
    with pytest.raises(NotImplementedError):
        nn.ModuleList([nn.Conv2d(3, 2, 1)])(torch.zeros(1, 3, 2, 2))
