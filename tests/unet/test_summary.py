"""The table of the network: its sums are the published ones, and making it leaves no trace."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from unet import UNet
from unet.modify import change, inputs_for
from unet.summary import summarize

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("bilinear", "size", "gmac"),
    [
        (False, (256, 256), 48.172),
        (False, (512, 512), 192.686),
        (False, (640, 959), 449.303),
        (True, (256, 256), 39.984),
        (True, (512, 512), 159.937),
        (True, (640, 959), 373.247),
    ],
)
def test_multiply_accumulates_are_counted_as_published(*, bilinear: bool, size: tuple[int, int], gmac: float) -> None:
    with torch.device("meta"):
        rows = summarize(UNet(3, 2, bilinear), torch.empty(1, 3, *size))
    assert round(sum(row.macs for row in rows) / 1e9, 3) == gmac
    assert sum(row.parameters for row in rows) == (17_263_042 if bilinear else 31_037_698)


def test_a_row_says_name_kind_shape_parameters_macs_and_bytes(alive: Callable[..., UNet]) -> None:
    rows = {row.layer: row for row in summarize(alive(), torch.empty(2, 3, 33, 32))}
    assert list(rows)[:4] == [f"inc.double_conv.{i}" for i in range(4)]
    assert len(rows) == 63
    row = rows["inc.double_conv.3"]
    assert (row.kind, row.output_shape, row.parameters) == ("Conv2d", (2, 4, 33, 32), 4 * 4 * 9)
    assert (row.macs, row.activation_bytes) == (2 * 4 * 33 * 32 * 4 * 9, 2 * 4 * 33 * 32 * 4)
    up = rows["up1.up"]
    assert (up.kind, up.output_shape) == ("ConvTranspose2d", (2, 32, 4, 4))
    assert (up.macs, up.parameters) == (2 * 64 * 2 * 2 * 32 * 4, 64 * 32 * 4 + 32)
    assert (rows["inc.double_conv.2"].kind, rows["inc.double_conv.2"].activation_bytes) == ("ReLU", 0)
    pool = rows["down1.maxpool_conv.0"]
    assert (pool.output_shape, pool.macs, pool.activation_bytes) == ((2, 4, 16, 16), 0, 2 * 4 * 16 * 16 * 4)


def test_bytes_follow_the_dtype(alive: Callable[..., UNet]) -> None:
    rows = summarize(alive().double(), torch.empty(1, 3, 16, 16, dtype=torch.float64))
    assert rows[0].activation_bytes == 4 * 16 * 16 * 8


def test_the_model_is_left_as_it_was_even_where_the_inputs_cannot_be(alive: Callable[..., UNet]) -> None:
    model = alive().train()
    model.down1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [layer.training for layer in model.modules()]
    summarize(torch.nn.DataParallel(model), torch.empty(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"4 channels"):
        summarize(model, torch.empty(1, 4, 16, 16))
    assert [layer.training for layer in model.modules()] == modes
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_with_two_inputs_has_a_table_too(alive: Callable[..., UNet]) -> None:
    model = change(alive(), "vector")
    rows = {row.layer: row for row in summarize(model, *inputs_for(model, torch.empty(2, 3, 32, 32)))}
    assert (rows["embed"].output_shape, rows["embed"].macs) == ((2, 64), 2 * 64 * 8)
