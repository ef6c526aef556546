"""The U-Net: its keys and numbers, its equality with the formula, what it says of inputs that can't be."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from unet import DoubleConv, Down, OutConv, UNet, Up
from unet.blocks import pad_to
from unet.model import check_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BOTH = pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
# The tensors of a double convolution, and those of a block by its channels.
NORM = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def double(prefix: str, into: int, mid: int, out: int) -> dict[str, tuple[int, ...]]:
    found = {}
    for conv, a, b in ((0, into, mid), (3, mid, out)):
        found[f"{prefix}.double_conv.{conv}.weight"] = (b, a, 3, 3)
        for name in NORM:
            found[f"{prefix}.double_conv.{conv + 1}.{name}"] = () if name == "num_batches_tracked" else (b,)
    return found


def expected_keys(*, bilinear: bool) -> dict[str, tuple[int, ...]]:
    found = double("inc", 3, 64, 64)
    lowest = 512 if bilinear else 1024
    for i, (a, b) in enumerate([(64, 128), (128, 256), (256, 512), (512, lowest)], start=1):
        found |= double(f"down{i}.maxpool_conv.1", a, b, b)
    for i, into in enumerate([1024, 512, 256, 128], start=1):
        if bilinear:
            out = into // 4 if i < 4 else 64
            found |= double(f"up{i}.conv", into, into // 2, out)
        else:
            found[f"up{i}.up.weight"], found[f"up{i}.up.bias"] = (into, into // 2, 2, 2), (into // 2,)
            found |= double(f"up{i}.conv", into, into // 2, into // 2)
    return found | {"outc.conv.weight": (2, 64, 1, 1), "outc.conv.bias": (2,)}


@BOTH
def test_keys_and_shapes_are_the_fields_own(*, bilinear: bool) -> None:
    with torch.device("meta"):
        state = UNet(3, 2, bilinear).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_keys(bilinear=bilinear)
    assert list(state) == list(expected_keys(bilinear=bilinear))
    assert len(state) == (110 if bilinear else 118)
    counts = {key for key, value in state.items() if value.dtype != torch.float32}
    assert counts == {key for key in state if key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("channels", "classes", "bilinear", "parameters"),
    [(3, 2, False, 31_037_698), (3, 2, True, 17_263_042), (1, 1, False, 31_036_481), (1, 1, True, 17_261_825)],
)
def test_parameters_are_counted_as_published(channels: int, classes: int, *, bilinear: bool, parameters: int) -> None:
    with torch.device("meta"):
        model = UNet(channels, classes, bilinear)
    assert sum(p.numel() for p in model.parameters()) == parameters
    # Folded, each BatchNorm's scale and shift become one bias.
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    folded = parameters - sum(m.num_features for m in norms)
    if (channels, classes) == (3, 2):
        assert folded == (17_258_626 if bilinear else 31_031_810)


@BOTH
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(16, 16), (16, 31), (33, 48), (64, 64), (97, 131)])
def test_logits_are_those_of_the_formula(
    alive: Callable[..., UNet],
    reference: Callable[..., dict[str, Tensor]],
    *,
    bilinear: bool,
    training: bool,
    size: tuple[int, int],
) -> None:
    model = alive(bilinear=bilinear).double().train(training)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = reference(model.state_dict(), x, bilinear=bilinear, training=training)["logits"]
    assert expected.std() > 1e-3
    logits = model(x)
    assert logits.shape == (2, 2, *size)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)


@BOTH
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_any_depth_and_width_follow_the_formula(
    alive: Callable[..., UNet], reference: Callable[..., dict[str, Tensor]], *, bilinear: bool, depth: int
) -> None:
    model = alive(1, 3, bilinear=bilinear, depth=depth, width=6).double()
    x = torch.randn(1, 1, 37, 41, dtype=torch.float64)
    expected = reference(model.state_dict(), x, bilinear=bilinear, training=False, depth=depth)["logits"]
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


def test_training_moves_the_running_statistics_by_a_tenth_of_the_batchs(alive: Callable[..., UNet]) -> None:
    model = alive().double().train()
    before = model.inc.double_conv[1].running_mean.clone()
    x = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    mean = nn.functional.conv2d(x, model.inc.double_conv[0].weight, padding=1).mean((0, 2, 3))
    model(x)
    torch.testing.assert_close(model.inc.double_conv[1].running_mean, 0.9 * before + 0.1 * mean.detach())


def test_double_conv_has_its_own_middle_width() -> None:
    block = DoubleConv(3, 5, 7)
    assert [m.out_channels for m in block.double_conv if isinstance(m, nn.Conv2d)] == [7, 5]
    assert block(torch.randn(1, 3, 8, 8)).shape == (1, 5, 8, 8)
    assert [type(m).__name__ for m in block.double_conv] == ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    assert all(m.inplace for m in block.double_conv if isinstance(m, nn.ReLU))


def test_down_drops_an_odd_row_and_up_restores_the_size_of_the_skip() -> None:
    x = torch.randn(2, 4, 9, 11)
    assert Down(4, 8)(x).shape == (2, 8, 4, 5)
    for bilinear in (False, True):
        coarse = torch.randn(2, 4 if bilinear else 8, 4, 5)
        assert Up(8, 4, bilinear)(coarse, x).shape == (2, 4, 9, 11)
    assert OutConv(4, 3)(x).shape == (2, 3, 9, 11)


def test_the_skip_comes_first_in_the_concatenation() -> None:
    up = Up(4, 2).eval()
    with torch.no_grad():
        up.conv.double_conv[0].weight[:, :2] = 0
    coarse = torch.randn(1, 4, 4, 4)
    assert torch.equal(up(coarse, torch.randn(1, 2, 8, 8)), up(coarse, torch.randn(1, 2, 8, 8)))


def test_padding_is_zeros_right_and_bottom_and_costs_nothing_where_none_is_missing() -> None:
    x = torch.ones(1, 1, 2, 2)
    padded = pad_to(x, torch.empty(1, 5, 3, 3))
    assert padded.tolist() == [[[[1, 1, 0], [1, 1, 0], [0, 0, 0]]]]
    assert pad_to(x, torch.empty(1, 1, 2, 3)).tolist() == [[[[1, 1, 0], [1, 1, 0]]]]
    assert pad_to(x, torch.empty(1, 1, 3, 2)).shape == (1, 1, 3, 2)
    assert pad_to(x, torch.empty(1, 1, 2, 2)) is x


# Inputs that can't be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"3 dimensions, \(3, 32, 32\): expected \(N, 3, H, W\).*image\[None\]"),
        (torch.zeros(32, 32), ValueError, r"2 dimensions, \(32, 32\): expected \(N, 3, H, W\) .* at least 16$"),
        (torch.zeros(1, 1, 3, 32, 32), ValueError, "5 dimensions"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"4 channels, \(1, 4, 32, 32\): expected \(N, 3, H, W\)"),
        (torch.zeros(1, 3, 15, 32), ValueError, "15×32 pixels: expected .* at least 16, since it is halved 4 times"),
        (torch.zeros(1, 3, 32, 15), ValueError, "32×15 pixels"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "is torch.uint8: expected torch.float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float16), TypeError, r"float16: .*image.to\(torch.float32\)"),
    ],
)
def test_an_input_that_cannot_be_is_told_what_came_and_what_is_expected(
    alive: Callable[..., UNet], x: Tensor, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        alive()(x)


def test_the_smallest_size_follows_the_depth(alive: Callable[..., UNet]) -> None:
    assert alive(depth=1)(torch.zeros(1, 3, 2, 2)).shape == (1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"at least 2, since it is halved 1 times"):
        alive(depth=1)(torch.zeros(1, 3, 1, 2))


def test_autocast_takes_the_floats_that_it_converts(alive: Callable[..., UNet]) -> None:
    model = alive()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
        for dtype in (torch.float64, torch.uint8):
            with pytest.raises(TypeError, match=r"expected torch.float32"):
                model(torch.zeros(1, 3, 16, 16, dtype=dtype))


def test_training_on_one_value_per_channel_is_refused_with_a_way_out(alive: Callable[..., UNet]) -> None:
    model = alive().train()
    with pytest.raises(ValueError, match=r"batch 1 with 31×31 pixels leaves one value.*side of at least 32.*eval\(\)"):
        model(torch.zeros(1, 3, 31, 31))
    model(torch.zeros(2, 3, 16, 16))
    model(torch.zeros(1, 3, 32, 16))
    model.eval()(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("wrong", [{"n_channels": 0}, {"n_classes": 0}, {"width": 0}, {"depth": 0}])
def test_numbers_out_of_range_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is 0: expected 1 or more"):
        UNet(**{"n_channels": 3, "n_classes": 2, "width": 4, "depth": 2} | wrong)


# Tracing, compiling, exporting --------------------------------------------------------------------------------------


@BOTH
def test_a_trace_gives_the_same_for_other_sizes_and_keeps_the_check(
    alive: Callable[..., UNet], *, bilinear: bool
) -> None:
    model = alive(bilinear=bilinear)
    traced = torch.fx.symbolic_trace(model)
    for size in ((16, 16), (37, 61)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(traced(x), model(x))
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"].count(check_image) == 1
    with pytest.raises(ValueError, match=r"4 channels"):
        traced(torch.zeros(1, 4, 16, 16))


def test_a_trace_made_in_training_does_not_freeze_the_flag(alive: Callable[..., UNet]) -> None:
    model = alive().train()
    traced = torch.fx.symbolic_trace(model).eval()
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(traced(x), model.eval()(x))


@BOTH
@pytest.mark.slow
def test_it_compiles_without_a_graph_break_for_odd_and_even_sizes(
    alive: Callable[..., UNet], *, bilinear: bool
) -> None:
    torch._dynamo.reset()
    model = alive(bilinear=bilinear)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((37, 61), (48, 33), (64, 34)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("bad", "said"), [((1, 4, 32, 32), "4 channels"), ((3, 32, 32), "3 dimensions"), ((1, 3, 8, 32), "8×32 pixels")]
)
def test_a_compiled_network_says_the_same_of_a_wrong_input(
    alive: Callable[..., UNet], bad: tuple[int, ...], said: str
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(alive(), backend="eager")
    with pytest.raises(ValueError, match=said):
        compiled(torch.zeros(bad))


@BOTH
@pytest.mark.slow
def test_it_exports_with_any_batch_height_and_width(alive: Callable[..., UNet], *, bilinear: bool) -> None:
    model = alive(bilinear=bilinear)
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=32), 3: torch.export.Dim("w", min=32)}
    exported = torch.export.export(model, (torch.randn(2, 3, 37, 61),), dynamic_shapes=(sizes,)).module()
    for shape in ((1, 3, 64, 32), (3, 3, 33, 50)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), model(x))


# Activation checkpointing -------------------------------------------------------------------------------------------


def trained(model: nn.Module, x: Tensor, *, times: int = 1) -> dict[str, Tensor]:
    loss = model(x).square().mean()
    for i in range(times):
        loss.backward(retain_graph=i + 1 < times)
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


@BOTH
@pytest.mark.parametrize("times", [1, 2])
def test_checkpointed_blocks_give_the_same_gradients_and_running_statistics(
    alive: Callable[..., UNet], *, bilinear: bool, times: int
) -> None:
    model = alive(bilinear=bilinear).train()
    frugal = copy.deepcopy(model)
    frugal.checkpoint_blocks = True
    x = torch.randn(2, 3, 37, 61)
    expected, got = (trained(m, x, times=times) for m in (model, frugal))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert int(frugal.inc.double_conv[1].num_batches_tracked) == 1
    assert frugal.inc.double_conv[1].momentum == 0.1


@pytest.mark.slow
def test_checkpointed_blocks_compile_with_the_same_gradients_and_statistics(alive: Callable[..., UNet]) -> None:
    torch._dynamo.reset()
    model = alive().train()
    frugal = copy.deepcopy(model)
    frugal.checkpoint_blocks = True
    x = torch.randn(2, 3, 37, 61)
    expected = trained(model, x)
    trained(torch.compile(frugal, fullgraph=True, backend="aot_eager"), x)
    got = {name: p.grad for name, p in frugal.named_parameters()} | dict(frugal.named_buffers())
    torch.testing.assert_close(got, expected)


def test_a_trace_leaves_checkpointing_out(alive: Callable[..., UNet]) -> None:
    model = alive().train()
    model.checkpoint_blocks = True
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(traced(x), model(x))


class LiveBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the storages made under it that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor.untyped_storage()._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()),
                    tensor.untyped_storage().nbytes(),
                )
        return out

    def total(self) -> int:
        return sum(size for reference, size in self.alive.values() if not reference.expired())


@BOTH
def test_checkpointed_blocks_keep_a_fraction_of_the_activations(*, bilinear: bool) -> None:
    held = {}
    for checkpoint_blocks in (False, True):
        model = UNet(3, 2, bilinear, 8, 4, checkpoint_blocks=checkpoint_blocks)
        with LiveBytes() as live:
            logits = model(torch.randn(2, 3, 64, 64))
            held[checkpoint_blocks] = live.total()
        assert logits.requires_grad
    assert 0 < held[True] < 0.45 * held[False]
