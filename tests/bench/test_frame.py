import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.case import Case
from bench.frame import through
from bench.support import unsupported
from unet import UNet

from .conftest import MACHINE, TINY, Bench

CASE = Case(**{**TINY, "size": "150x131"})  # type: ignore[arg-type]


def network(*, bilinear: bool) -> UNet:
    torch.manual_seed(0)
    return UNet(3, 2, bilinear=bilinear, width=2, depth=2).double().eval()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@settings(max_examples=6)
@given(st.integers(4, 300), st.integers(4, 300), st.integers(1, 2))
def test_tiles_give_the_whole_images_logits_with_transposed_upsampling(height: int, width: int, batch: int) -> None:
    model, image = network(bilinear=False), torch.randn(batch, 3, height, width, dtype=torch.float64)
    with torch.inference_mode():
        assert apart(through(model, "tiled", 2, image), model(image)) < 1e-12


def test_tiles_are_only_nearly_right_with_bilinear_upsampling() -> None:
    model, image = network(bilinear=True), torch.randn(1, 3, 200, 200, dtype=torch.float64)
    with torch.inference_mode():
        assert 1e-12 < apart(through(model, "tiled", 2, image), model(image)) < 0.1


@settings(max_examples=20)
@given(st.integers(4, 60), st.integers(4, 60), st.booleans())
def test_padding_gives_every_pixel_and_hands_on_multiples_alone(height: int, width: int, bilinear: bool) -> None:  # noqa: FBT001
    model, image = network(bilinear=bilinear), torch.randn(1, 3, height, width, dtype=torch.float64)
    seen = []

    def call(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        logits: torch.Tensor = model(x)
        return logits

    with torch.inference_mode():
        logits = through(call, "padded", 2, image)
        assert logits.shape == (1, 2, height, width)
        (given_,) = seen
        assert given_.shape[2] % 4 == given_.shape[3] % 4 == 0
        assert torch.equal(given_[:, :, :height, :width], image)
        assert torch.equal(logits, model(given_)[:, :, :height, :width])
        if height % 4 == width % 4 == 0:
            assert torch.equal(logits, model(image))


def test_padding_keeps_the_memory_format() -> None:
    image = torch.randn(1, 3, 9, 9).to(memory_format=torch.channels_last)
    assert through(lambda x: x, "padded", 2, image).is_contiguous(memory_format=torch.channels_last) is False
    seen = []
    through(lambda x: seen.append(x) or x, "padded", 2, image)  # type: ignore[func-returns-value]
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(frame="tiled", task="train"), "padding and tiles are for inference"),
        (Case(frame="padded", modification="vector"), "padding and tiles are for inference"),
        (Case(frame="tiled", implementation="aotinductor"), "it takes one size"),
    ],
    ids=lambda part: part.id if isinstance(part, Case) else None,
)
def test_a_frame_that_makes_no_sense_is_unsupported(case: Case, reason: str) -> None:
    assert (unsupported(case, MACHINE) or "").startswith(reason)


@pytest.mark.slow
def test_frames_are_cases_with_their_exactness(bench: Bench) -> None:
    cases = [msgspec.structs.replace(CASE, frame=frame) for frame in ("whole", "padded", "tiled")]
    told = bench.measure(*cases)
    (run,) = bench.runs()
    whole, padded, tiled = run.records
    assert {whole.status, padded.status, tiled.status} == {"ok"}, told.stdout
    assert whole.figures["rel_l2"] == 0
    # Exact but for the order of sums; near the edges another function, and told so.
    assert tiled.figures["rel_l2"] < 1e-5  # type: ignore[operator]
    assert 1e-4 < padded.figures["rel_l2"] < padded.figures["rel_l2_limit"]  # type: ignore[operator]
    assert cases[1].id.endswith("-padded")
