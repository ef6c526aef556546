import shutil
from pathlib import Path

import pytest
import torch

from bench.case import Case
from bench.errors import UsageError
from bench.picture import picture
from bench.weights import Weights, digest, look, state_of
from unet import UNet
from unet.checkpoint import CheckpointError, save_weights

from .conftest import TINY, Bench

OWN = {"upsampling": "bilinear", "width": 6, "depth": 2}
CASE = Case(**OWN, size="32x48", threads=1)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one channel and three classes, saved from DataParallel: nothing here was fitted by the suite."""
    path = tmp_path_factory.mktemp("own") / "unet.pt"
    torch.manual_seed(0)
    save_weights(torch.nn.DataParallel(UNet(1, 3, bilinear=True, width=6, depth=2)), path)
    return path


def test_a_checkpoint_says_which_network_it_is(checkpoint: Path) -> None:
    assert look(checkpoint) == Weights(
        path=str(checkpoint), sha256=digest(checkpoint), channels=1, classes=3, upsampling="bilinear", width=6, depth=2
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is empty"), (b"hello", "is no checkpoint"), (None, "cannot read the weights (No such file or directory)")],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        look(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_axes_and_cases_of_another_network_are_refused(checkpoint: Path) -> None:
    weights = look(checkpoint)
    assert weights.asked_for({"batch": (1, 2)}, [CASE]) == {"batch": (1, 2), **weights.axes}
    with pytest.raises(UsageError, match=r"--axis width=64 is a network of width 64, and .* holds one of width 6$"):
        weights.asked_for({"width": (6, 64)})
    with pytest.raises(UsageError, match=r"--case infer-.* is a network of upsampling transposed"):
        weights.asked_for({}, [Case(width=6, depth=2)])


@pytest.mark.slow
def test_the_network_of_a_checkpoint_is_what_is_measured(bench: Bench, checkpoint: Path) -> None:
    told = bench.measure(CASE, options=("--weights", str(checkpoint)))
    assert told.returncode == 0, told.stdout
    (run,) = bench.runs()
    (record,) = run.records
    weights = run.header.settings.weights
    assert weights is not None
    assert (weights.sha256, weights.channels, weights.classes) == (digest(checkpoint), 1, 3)
    assert record.figures["rel_l2"] == 0
    assert "fitted_dice" not in record.figures
    assert f"--weights {checkpoint}" in record.repeat
    # 2 multiply-adds: the first convolution has one channel, the head three classes.
    with torch.device("meta"):
        plain = UNet(1, 3, bilinear=True, width=6, depth=2).eval()
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            plain(torch.empty(1, 1, 32, 48))
    assert record.figures["gflop"] == counter.get_total_flops() / 1e9


@pytest.mark.slow
def test_a_network_that_calls_everything_one_class_has_no_meaningful_agreement(bench: Bench, tmp_path: Path) -> None:
    model = UNet(3, 2, bilinear=True, width=6, depth=2)
    with torch.no_grad():
        model.outc.conv.bias.copy_(torch.tensor([1e3, 0.0]))
    save_weights(model, tmp_path / "one.pt")
    assert bench.measure(CASE, options=("--weights", str(tmp_path / "one.pt"))).returncode == 0
    (record,) = bench.runs()[0].records
    assert record.figures["largest_class"] == 1.0
    assert record.figures["agreement_meaningful"] is False


@pytest.mark.slow
def test_a_single_logit_is_a_class_where_it_is_above_zero(bench: Bench, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = UNet(3, 1, width=4, depth=2).eval()
    with torch.no_grad():
        # As many pixels above 0 as below, on the picture that is measured.
        model.outc.conv.bias -= model(picture(1, 32, 32)[0]).median()
    save_weights(model, tmp_path / "one.pt")
    cases = [Case(**TINY), Case(**TINY, task="train")]  # type: ignore[arg-type]
    told = bench.measure(*cases, options=("--weights", str(tmp_path / "one.pt")))
    infer, train = bench.runs()[0].records
    assert infer.status == "ok", told.stdout
    assert 0.4 < infer.figures["largest_class"] < 0.6  # type: ignore[operator]
    assert (train.status, train.reason[:27]) == ("unsupported", "the loss here is of two cla")


def test_a_checkpoint_that_changed_since_it_was_looked_at_is_not_measured(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "unet.pt"
    shutil.copy(checkpoint, copy)
    weights = look(copy)
    assert set(state_of(weights)) == set(UNet(1, 3, bilinear=True, width=6, depth=2).state_dict())
    save_weights(UNet(1, 3, bilinear=True, width=6, depth=2), copy)
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        state_of(weights)


@pytest.mark.slow
def test_weights_of_another_network_are_refused_before_anything_is_measured(bench: Bench, checkpoint: Path) -> None:
    told = bench.measure(Case(), options=("--weights", str(checkpoint)))
    assert told.returncode == 4
    assert (
        "--case infer-eager-fp32-nchw-transposed-b1-256x256-1cpu is a network of upsampling transposed" in told.stderr
    )
    assert bench.runs() == []
