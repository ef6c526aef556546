"""Changing a model: what follows, what stays, and that the model given is never touched."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from unet import UNet
from unet.containers import InModuleDict
from unet.modify import (
    CHANGES,
    add_features,
    add_planes,
    add_supervision,
    add_vector,
    capture,
    change,
    inputs_for,
    replace_head,
)
from unet.variants import FeatureUNet, PlaneUNet, SupervisedUNet, VectorUNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BOTH = pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])


def flat(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_leaves_the_model_as_it_was_and_shares_nothing_with_it(alive: Callable[..., UNet], name: str) -> None:
    model = alive()
    before = copy.deepcopy(model.state_dict())
    changed = change(model, name)
    with torch.no_grad():
        for tensor in changed.state_dict().values():
            tensor.zero_()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.n_classes == 2


@BOTH
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "head"])
def test_a_change_at_first_gives_the_same_logits(alive: Callable[..., UNet], *, bilinear: bool, name: str) -> None:
    model = alive(bilinear=bilinear)
    changed = change(model, name)
    x = torch.randn(2, 3, 37, 61)
    assert torch.equal(flat(changed(*inputs_for(changed, x)))[0], model(x))
    assert not changed.training
    assert set(model.state_dict()) <= set(changed.state_dict())


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_keeps_dtype_flags_and_memory_format(alive: Callable[..., UNet], name: str) -> None:
    model = alive().to(dtype=torch.float64, memory_format=torch.channels_last).train()
    model.checkpoint_blocks = True
    changed = change(model, name)
    assert changed.training
    assert all(layer.training for layer in changed.modules())
    assert changed.checkpoint_blocks
    assert {p.dtype for p in changed.parameters()} == {torch.float64}
    assert changed.inc.double_conv[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert change(alive(), name).inc.double_conv[0].weight.is_contiguous()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_leaves_frozen_statistics_frozen(alive: Callable[..., UNet], name: str) -> None:
    model = alive(depth=2).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    changed = change(model, name)
    assert {type(layer) for layer in changed.modules() if not layer.training} == {nn.BatchNorm2d}
    before = copy.deepcopy(dict(changed.named_buffers()))
    changed(*inputs_for(changed, torch.randn(2, 3, 16, 16)))
    assert all(torch.equal(buffer, before[key]) for key, buffer in changed.named_buffers())
    assert not any(layer.training for layer in change(model.eval(), name).modules())


def test_an_unknown_change_is_refused_with_the_known_ones(alive: Callable[..., UNet]) -> None:
    with pytest.raises(ValueError, match=r"'tail': expected one of none, head, vector, plane, supervision, features"):
        change(alive(), "tail")


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_traces_compiles_and_exports_with_all_its_inputs(
    alive: Callable[..., UNet], *, bilinear: bool, name: str
) -> None:
    torch._dynamo.reset()
    model = change(alive(bilinear=bilinear, depth=3), name)
    inputs = inputs_for(model, torch.randn(2, 3, 37, 61))
    if len(inputs) == 2:
        inputs = inputs[0], torch.randn_like(inputs[1])
    expected = flat(model(*inputs))
    torch.testing.assert_close(flat(torch.fx.symbolic_trace(model)(*inputs)), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(*inputs)), expected)
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=16), 3: torch.export.Dim("w", min=16)}
    second = {"plane": (sizes,), "vector": ({0: sizes[0]},)}.get(name, ())
    exported = torch.export.export(model, inputs, dynamic_shapes=(sizes, *second)).module()
    other = inputs_for(model, torch.randn(3, 3, 40, 33))
    torch.testing.assert_close(flat(exported(*other)), flat(model(*other)))


# The head -----------------------------------------------------------------------------------------------------------


def test_a_new_head_has_the_classes_and_the_number_follows(alive: Callable[..., UNet]) -> None:
    model = alive(n_classes=2)
    changed = replace_head(model, 7)
    assert changed.n_classes == 7
    x = torch.randn(1, 3, 16, 16)
    features = changed.decode(changed.encode(x))
    expected = torch.einsum("oc,nchw->nohw", changed.outc.conv.weight[..., 0, 0], features)
    torch.testing.assert_close(changed(x), expected + changed.outc.conv.bias.view(1, -1, 1, 1))
    assert torch.equal(features, model.decode(model.encode(x)))


def test_a_new_head_replaces_the_heads_of_supervision_too(alive: Callable[..., UNet]) -> None:
    changed = replace_head(add_supervision(alive()), 5)
    assert [output.shape[1] for output in changed(torch.randn(1, 3, 32, 32))] == [5, 5, 5, 5]


@pytest.mark.parametrize("wrap", [nn.DataParallel, InModuleDict], ids=["wrapped", "container"])
def test_a_new_head_is_refused_where_the_number_of_classes_could_not_follow(
    alive: Callable[..., UNet], wrap: Callable[[UNet], nn.Module]
) -> None:
    model = wrap(alive(depth=1))
    with pytest.raises(TypeError, match=rf"the model is a {type(model).__name__}: expected a UNet.*not wrapped"):
        replace_head(model, 7)


@pytest.mark.parametrize("make", [replace_head, add_vector, add_planes])
def test_a_change_by_nothing_is_refused(alive: Callable[..., UNet], make: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"is 0: expected 1 or more"):
        make(alive(), 0)


# Another input ------------------------------------------------------------------------------------------------------


@BOTH
def test_a_vector_adds_its_embedding_at_the_bottleneck_of_each_image(
    alive: Callable[..., UNet], reference: Callable[..., dict[str, Tensor]], *, bilinear: bool
) -> None:
    model = add_vector(alive(bilinear=bilinear).double(), 3)
    nn.init.normal_(model.embed.weight)
    x, vector = torch.randn(2, 3, 32, 32).double(), torch.randn(2, 3).double()
    features = model.encode(x)
    theirs = reference(model.state_dict(), x, bilinear=bilinear, training=False)
    torch.testing.assert_close(features[-1], theirs["down4"])
    features[-1] = features[-1] + (vector @ model.embed.weight.T).view(2, -1, 1, 1)
    torch.testing.assert_close(model(x, vector), model.outc(model.decode(features)))
    # Each image has its own vector.
    assert torch.allclose(model(x, vector)[1], model(x[1:], vector[1:])[0])
    assert not torch.allclose(model(x, vector), model(x, vector.flip(0)))


def test_a_vector_learns_though_it_starts_without_effect(alive: Callable[..., UNet]) -> None:
    model = add_vector(alive(), 2).train()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x, torch.zeros(2, 2)), model(x, torch.ones(2, 2)))
    model(x, torch.ones(2, 2)).square().mean().backward()
    assert model.embed.weight.grad.abs().max() > 0


def test_a_plane_is_seen_by_the_first_convolution(
    alive: Callable[..., UNet], reference: Callable[..., dict[str, Tensor]]
) -> None:
    model = add_planes(alive().double(), 2)
    assert (model.n_channels, model.planes, model.inc.double_conv[0].in_channels) == (3, 2, 5)
    nn.init.normal_(model.inc.double_conv[0].weight)
    x, planes = torch.randn(1, 3, 17, 32).double(), torch.randn(1, 2, 17, 32).double()
    expected = reference(model.state_dict(), torch.cat([x, planes], 1), bilinear=False, training=False)["logits"]
    torch.testing.assert_close(model(x, planes), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "said"),
    [
        ((2, 4), torch.float32, ValueError, r"vector is \(2, 4\): expected \(2, 3\)"),
        ((1, 3), torch.float32, ValueError, r"vector is \(1, 3\): expected \(2, 3\)"),
        ((3,), torch.float32, ValueError, r"vector is \(3,\)"),
        ((2, 3), torch.float64, TypeError, "vector is torch.float64: expected torch.float32"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(
    alive: Callable[..., UNet], shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        add_vector(alive(), 3)(torch.randn(2, 3, 32, 32), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "said"),
    [
        ((2, 2, 32, 32), torch.float32, ValueError, r"planes are \(2, 2, 32, 32\): expected \(N, 1, H, W\)"),
        ((1, 1, 32, 32), torch.float32, ValueError, r"same N, H and W, here \(2, 3, 32, 32\)"),
        ((2, 1, 32, 31), torch.float32, ValueError, "same N, H and W"),
        ((1, 32, 32), torch.float32, ValueError, "planes are"),
        ((2, 1, 32, 32), torch.float64, TypeError, "planes are torch.float64: expected torch.float32"),
    ],
)
def test_planes_that_do_not_fit_are_refused(
    alive: Callable[..., UNet], shape: tuple[int, ...], dtype: torch.dtype, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        add_planes(alive())(torch.randn(2, 3, 32, 32), torch.ones(shape, dtype=dtype))


def test_a_vector_in_another_dtype_passes_under_autocast(alive: Callable[..., UNet]) -> None:
    model = add_vector(alive(), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(1, 3, 16, 16), torch.ones(1, 3)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [(VectorUNet, {"vector_size": 3}), (PlaneUNet, {"planes": 2}), (SupervisedUNet, {}), (FeatureUNet, {})],
)
def test_a_changed_network_can_be_built_from_nothing(kind: type[UNet], extra: dict[str, int]) -> None:
    model = kind(3, 2, width=4, depth=2, **extra).eval()
    outputs = flat(model(*inputs_for(model, torch.randn(1, 3, 8, 8))))
    assert outputs[0].shape == (1, 2, 8, 8)
    assert not any(p.is_meta for p in model.parameters())


def test_new_weights_start_as_they_should(alive: Callable[..., UNet]) -> None:
    assert torch.equal(VectorUNet(3, 2, width=4, vector_size=3).embed.weight, torch.zeros(64, 3))
    assert torch.equal(add_vector(alive(), 3).embed.weight, torch.zeros(64, 3))
    assert torch.equal(add_planes(alive()).inc.double_conv[0].weight[:, 3:], torch.zeros(4, 1, 3, 3))
    for head in add_supervision(alive()).heads:
        # The bound of torch's own draw: 1 / sqrt(inputs).
        assert 0 < head.conv.weight.abs().max() <= head.conv.in_channels**-0.5


# Other outputs ------------------------------------------------------------------------------------------------------


@BOTH
def test_supervision_gives_logits_of_every_level_of_the_decoder(
    alive: Callable[..., UNet], reference: Callable[..., dict[str, Tensor]], *, bilinear: bool
) -> None:
    model = add_supervision(alive(bilinear=bilinear).double())
    x = torch.randn(1, 3, 37, 61).double()
    seen = reference(model.state_dict(), x, bilinear=bilinear, training=False)
    outputs = model(x)
    assert [tuple(output.shape[2:]) for output in outputs] == [(37, 61), (18, 30), (9, 15), (4, 7)]
    torch.testing.assert_close(outputs[0], seen["logits"])
    for level, output in enumerate(outputs[1:], start=1):
        head = model.heads[level - 1].conv
        expected = nn.functional.conv2d(seen[f"up{4 - level}"], head.weight, head.bias)
        torch.testing.assert_close(output, expected)


@BOTH
def test_features_are_the_bottlenecks_and_nothing_overwrites_them(
    alive: Callable[..., UNet], reference: Callable[..., dict[str, Tensor]], *, bilinear: bool
) -> None:
    model = add_features(alive(bilinear=bilinear).double())
    x = torch.randn(2, 3, 37, 61).double()
    seen = reference(model.state_dict(), x, bilinear=bilinear, training=False)
    logits, features = model(x)
    assert features.shape == (2, 32 if bilinear else 64, 2, 3)
    torch.testing.assert_close(features, seen["down4"])
    torch.testing.assert_close(logits, seen["logits"])


def test_a_captured_output_is_what_the_layer_gave_before_the_relu_overwrote_it(alive: Callable[..., UNet]) -> None:
    model = alive()
    name = "down4.maxpool_conv.1.double_conv.4"
    naive = {}
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: naive.update(out=out))
    x = torch.randn(1, 3, 64, 64)
    with capture(model, name, "inc") as seen:
        model(x)
    handle.remove()
    assert naive["out"].min() == 0
    assert seen[name].min() < 0
    torch.testing.assert_close(seen[name].relu(), model.encode(x)[-1])
    assert torch.equal(seen["inc"], model.inc(x))


def test_a_captured_output_carries_gradients_and_the_hooks_go(alive: Callable[..., UNet]) -> None:
    model = alive()
    with capture(model, "inc.double_conv.1") as seen:
        model(torch.randn(1, 3, 16, 16))
    seen["inc.double_conv.1"].sum().backward()
    assert model.inc.double_conv[0].weight.grad.abs().max() > 0
    assert not any(layer._forward_hooks for layer in model.modules())
    with pytest.raises(ValueError, match=r"no layer is called nowhere"), capture(model, "inc", "nowhere"):
        pass
    assert not model.inc._forward_hooks


@pytest.mark.parametrize("make", [add_supervision, add_features, lambda model: add_vector(model, 1), add_planes])
def test_a_changed_network_is_not_changed_twice(alive: Callable[..., UNet], make: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"FeatureUNet: expected a plain UNet"):
        make(add_features(alive()))


def test_inputs_for_a_plain_network_are_the_image_alone() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert inputs_for(UNet(3, 2, width=2), x) == (x,)
    assert inputs_for(VectorUNet(3, 2, width=2, vector_size=5), x)[1].tolist() == [[1] * 5] * 2
    assert torch.equal(inputs_for(PlaneUNet(3, 2, width=2, planes=2), x)[1], torch.ones(2, 2, 8, 8))
