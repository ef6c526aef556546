import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench import picture as module
from bench.picture import picture, source

ROOT = Path(module.__file__).resolve().parents[1]
sizes = st.integers(16, 600)


@given(batch=st.integers(1, 3), height=sizes, width=sizes)
@example(batch=64, height=16, width=16)
@example(batch=2, height=512, width=512)
@example(batch=1, height=640, width=959)
@example(batch=1, height=16, width=2048)
@settings(deadline=None, max_examples=40)
def test_no_mask_is_constant_whatever_the_size(batch: int, height: int, width: int) -> None:
    images, masks = picture(batch, height, width)
    assert images.shape == (batch, 3, height, width)
    assert images.dtype == torch.float32
    assert masks.shape == (batch, height, width)
    assert masks.dtype == torch.int64
    assert set(masks.unique().tolist()) == {0, 1}
    for mask in masks:
        assert 0.1 <= int(mask.count_nonzero()) / mask.numel() <= 0.9
    assert images.isfinite().all()
    assert images.std(dim=(2, 3)).min() > 0.05, "an even colour"


@given(height=sizes, width=sizes)
@settings(deadline=None, max_examples=20)
def test_the_images_of_a_batch_differ(height: int, width: int) -> None:
    images, masks = picture(8, height, width)
    assert len({image.numpy().tobytes() for image in images}) == 8
    assert len({mask.numpy().tobytes() for mask in masks}) == 8


def test_even_a_large_batch_of_the_smallest_size_has_no_image_twice() -> None:
    images, _ = picture(1000, 16, 16)
    assert len({image.numpy().tobytes() for image in images}) == 1000


def test_an_image_is_the_same_in_every_batch_and_process() -> None:
    few, many = picture(2, 40, 50), picture(9, 40, 50)
    assert torch.equal(few[0], many[0][:2])
    assert torch.equal(few[1], many[1][:2])
    code = (
        "from bench.picture import picture; i, m = picture(2, 40, 50); print(i.double().sum().item(), m.sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(few[0].double().sum().item()), str(few[1].sum().item())]


def test_a_picture_of_the_size_of_the_source_is_the_source() -> None:
    image, mask = source()
    images, masks = picture(1, 512, 512)
    assert np.array_equal(images[0].numpy(), image)
    assert np.array_equal(masks[0].numpy(), mask)


def test_larger_than_the_source_is_mirrored_not_resized() -> None:
    images, masks = picture(1, 1024, 700)
    assert torch.equal(images[..., :512, :512], torch.tensor(source()[0])[None])
    for part in (images[0], masks):
        assert torch.equal(part[:, 512:], part[:, :512].flip(1)), "downwards"
        assert torch.equal(part[..., 512:], part[..., 512 - 188 : 512].flip(2)), "to the right"


def test_the_whole_picture_is_normalised_and_both_classes_are_well_present() -> None:
    image, mask = source()
    assert np.allclose(image.mean((1, 2)), 0, atol=1e-5)
    assert np.allclose(image.std((1, 2)), 1, atol=1e-5)
    assert 0.4 < mask.mean() < 0.6


def test_the_mask_follows_the_picture() -> None:
    image, mask = source()
    red_over_blue = image[0] - image[2]
    assert red_over_blue[mask == 1].mean() > red_over_blue[mask == 0].mean() + 0.3, "brown is redder than blue"


def test_a_caller_cannot_spoil_the_source() -> None:
    with pytest.raises(ValueError, match="read-only"):
        source()[0][0, 0, 0] = 1
    images, masks = picture(1, 512, 512)
    images.zero_()
    masks.zero_()
    assert picture(1, 512, 512)[1].any()


@pytest.mark.parametrize(("batch", "height", "width"), [(0, 64, 64), (1, 15, 64), (1, 64, 15), (-1, 64, 64)])
def test_a_size_out_of_range_is_told(batch: int, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"batch {batch}, height {height}, width {width}.*at least 16"):
        picture(batch, height, width)


@pytest.mark.parametrize(("batch", "height", "width"), [(10**6, 1024, 1024), (1, 10**9, 10**9), (10**12, 16, 16)])
def test_an_absurd_batch_fails_at_once_without_filling_the_machine(batch: int, height: int, width: int) -> None:
    start = time.process_time()
    with pytest.raises(MemoryError, match="MiB are free"):
        picture(batch, height, width)
    assert time.process_time() - start < 1


def test_a_picture_without_both_classes_is_an_error_and_no_endless_search() -> None:
    with pytest.raises(RuntimeError, match="both classes"):
        next(module._windows(np.zeros((64, 64), np.int64), 32, 32))


def test_nothing_is_downloaded(tmp_path: Path) -> None:
    code = (
        "import socket\ndef refuse(*_, **__): raise SystemExit('it went to the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from bench.picture import source; print(source()[0].shape)"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | home, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "(3, 512, 512)"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
