"""Tiles: the whole image's logits where that is possible, and memory that does not grow with the image."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet import UNet
from unet.modify import add_features
from unet.tiling import memory_bound, predict, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn


def worst(model: nn.Module, x: Tensor, **options: int) -> float:
    """The largest difference of any logit to the whole image's, in units of the logits' spread."""
    with torch.no_grad():
        whole = model(x)
    return float((predict(model, x, **options) - whole).abs().max() / whole.std())


@pytest.mark.parametrize("blend", [0, 16])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_equal_the_whole_image_with_transposed_upsampling(
    alive: Callable[..., UNet], blend: int, batch: int
) -> None:
    model = alive().double()
    x = torch.randn(1, 3, 410, 333, dtype=torch.float64)
    assert worst(model, x, tile=288, blend=blend, batch=batch) < 1e-12


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_halo_that_makes_tiles_exact_follows_the_depth(alive: Callable[..., UNet], depth: int) -> None:
    model = alive(depth=depth).double()
    step = 2**depth
    x = torch.randn(2, 3, 33 * step - 1, 23 * step + 1, dtype=torch.float64)
    assert worst(model, x, tile=18 * step, blend=step) < 1e-12
    # A shorter one is not enough; at depth 1 the receptive field leaves more than a step of slack.
    assert worst(model, x, tile=18 * step, blend=step, halo=(5 if depth > 1 else 2) * step) > 1e-6


def test_tiles_never_equal_the_whole_image_with_bilinear_upsampling(alive: Callable[..., UNet]) -> None:
    model = alive(bilinear=True, depth=2).double()
    x = torch.randn(1, 3, 100, 90, dtype=torch.float64)
    assert worst(model, x, tile=80, blend=4, halo=32) > 1e-6


def test_an_image_no_larger_than_a_tile_is_one_tile(alive: Callable[..., UNet]) -> None:
    model = alive(bilinear=True, depth=2)
    x = torch.randn(1, 3, 33, 40)
    assert torch.equal(predict(model, x, tile=72, blend=8), model(x))


def test_batches_and_progress_count_every_tile(alive: Callable[..., UNet]) -> None:
    model, sizes, told = alive(depth=1), [], []
    handle = model.register_forward_pre_hook(lambda _m, args: sizes.append(tuple(args[0].shape)))
    predict(model, torch.randn(2, 3, 60, 36), tile=36, blend=4, batch=4, progress=lambda *counts: told.append(counts))
    handle.remove()
    rows = spans(60, tile=36, halo=12, blend=4, step=2)
    assert told[-1] == (2 * len(rows), 2 * len(rows))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert sum(shape[0] for shape in sizes) == 2 * len(rows)
    assert max(shape[0] for shape in sizes) == 4
    assert max(shape[2] for shape in sizes) == 36


def test_logits_carry_no_gradient_and_the_models_dtype(alive: Callable[..., UNet]) -> None:
    out = predict(alive(depth=1).bfloat16(), torch.randn(1, 3, 40, 40).bfloat16(), tile=36, blend=4)
    assert not out.requires_grad
    assert out.dtype == torch.bfloat16


def test_a_wrapped_network_is_asked_for_its_depth_and_another_must_be_given_one(alive: Callable[..., UNet]) -> None:
    model = alive(depth=1)
    x = torch.randn(1, 3, 50, 40)
    expected = predict(model, x, tile=36, blend=4)
    assert torch.equal(predict(torch.nn.DataParallel(model), x, tile=36, blend=4), expected)
    traced = torch.fx.symbolic_trace(model).eval()
    with pytest.raises(TypeError, match=r"does not say its depth"):
        predict(traced, x, tile=36, blend=4)
    assert torch.equal(predict(traced, x, tile=36, blend=4, depth=1), expected)


def test_what_cannot_be_tiled_is_refused(alive: Callable[..., UNet]) -> None:
    model = alive(depth=1)
    x = torch.randn(1, 3, 50, 40)
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        predict(model.train(), x)
    model.eval()
    with pytest.raises(ValueError, match=r"image is \(3, 50, 40\): expected \(N, C, H, W\)"):
        predict(model, x[0])
    with pytest.raises(TypeError, match=r"returned a tuple: expected one map"):
        predict(add_features(model), x)
    with pytest.raises(ValueError, match=r"tile 37, halo 12, blend 4: expected multiples of 2"):
        predict(model, x, tile=37, blend=4)
    with pytest.raises(ValueError, match=r"none below 0"):
        predict(model, x, tile=36, blend=-2)
    with pytest.raises(ValueError, match=r"leaves a core of 6: expected at least 8.*take a tile of 32"):
        predict(model, x, tile=30, blend=4)
    with pytest.raises(ValueError, match=r"\(0, 3, 50, 40\): expected \(N, C, H, W\) with N at least 1"):
        predict(model, x[:0], tile=36, blend=4)
    for batch in (0, -1):
        with pytest.raises(ValueError, match=rf"batch is {batch}: expected 1 or more"):
            predict(model, x, tile=36, blend=4, batch=batch)
    with pytest.raises(ValueError, match=r"1×36 pixels"):
        predict(model, x[:, :, :1], tile=36, blend=4)


@settings(deadline=None)
@given(
    length=st.integers(16, 2000),
    core=st.integers(1, 12),
    halo=st.integers(0, 6),
    blend=st.integers(0, 6),
)
def test_tiles_cover_an_axis_in_order_aligned_and_never_larger_than_asked(
    length: int, core: int, halo: int, blend: int
) -> None:
    tile, halo, blend = (core + 2 * halo) * 16, halo * 16, min(blend, core // 2) * 16
    found = spans(length, tile=tile, halo=halo, blend=blend, step=16)
    assert (found[0].start, found[-1].stop) == (0, length)
    for span in found:
        assert 0 <= span.lo <= span.start < span.stop <= span.hi <= length
        assert span.lo % 16 == span.start % 16 == 0
        assert 16 <= span.hi - span.lo <= max(tile, 32)
        assert span.lo in (0, span.start - halo) or span.hi - span.lo < 32
        assert span.hi == length or span.hi == span.stop + halo
    for one, two in itertools.pairwise(found):
        assert two.start == one.stop - blend
    for one, three in zip(found, found[2:], strict=False):
        assert one.stop <= three.start


@settings(deadline=None, max_examples=15)
@given(height=st.integers(2, 90), width=st.integers(2, 90), tile=st.integers(14, 40), blend=st.integers(0, 2))
def test_shares_of_overlapping_cores_sum_to_one(height: int, width: int, tile: int, blend: int) -> None:
    class Ones(torch.nn.Module):
        depth = 1

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    tile = 2 * tile
    blend = 2 * blend if tile - 24 >= 4 * blend else 0
    out = predict(Ones().eval(), torch.zeros(1, 2, height, width, dtype=torch.float64), tile=tile, blend=blend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-15)


def test_seams_are_blended_linearly() -> None:
    class Where(torch.nn.Module):
        """Each tile says its number, so that the blend can be seen."""

        depth = 1

        def __init__(self) -> None:
            super().__init__()
            self.count = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.count.expand_as(x)

    out = predict(Where().eval(), torch.zeros(1, 1, 2, 12), tile=8, halo=0, blend=4)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([1] * 4 + [1.125, 1.375, 1.625, 1.875] + [2.0] * 4))


def test_the_bound_on_memory_is_its_formula() -> None:
    with torch.device("meta"):
        model, image = UNet(3, 2), torch.empty(1, 3, 4096, 4096)
    bound = memory_bound(model, image)
    assert bound == 64 * 2**20 + 4 * (2 * 4096**2 + 16 * 64 * 768**2)
    assert bound < 3 * 2**30
    with torch.device("meta"):
        small = torch.empty(2, 3, 100, 100, dtype=torch.float64)
    assert memory_bound(model, small, batch=2) == 64 * 2**20 + 8 * (2 * 20_000 + 16 * 64 * 20_000 * 2)


CHILD = """
import re, sys, torch
from pathlib import Path
from unet import UNet
from unet.tiling import memory_bound, predict
torch.set_num_threads(1)
tile, size, bilinear = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
model = UNet(3, 2, bilinear, 16).eval()
image = torch.rand(1, 3, size, size)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
predict(model, image[..., :64, :64], tile=256)
before = peak()
predict(model, image, tile=tile, blend=0)
print(peak() - before, memory_bound(model, image, tile=320))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
def test_the_peak_of_a_large_image_stays_within_the_bound_and_the_whole_image_does_not(*, bilinear: bool) -> None:
    def used(tile: int) -> Iterator[int]:
        command = [sys.executable, "-c", CHILD, str(tile), "1024", str(bilinear)]
        return map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    tiled, bound = used(320)
    assert 0 < tiled <= bound
    # At 1024² one map of the finest level has ten times a tile's pixels: what a processor's convolutions take for
    # themselves, which differs between them, does not decide.
    whole, _ = used(1024)
    assert whole > 1.5 * bound
