"""Real input of any size: a stained tissue section, and the mask of what is stained.

The picture is scikit-image's `ihc.png` (512×512, part of its package, nothing is downloaded): colon tissue, cell nuclei
blue, the antibody's stain (DAB) brown. Class 1 is the brown: colour deconvolution, then Otsu's threshold.
"""

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil

from bench.gpus import MIB
from bench.machine import usable_memory_mib

if TYPE_CHECKING:
    import numpy as np
    import torch

CHANNELS = 3
CLASSES = 2
SMALLEST = 16
SHARE = (0.1, 0.9)
"""Of every mask class 1 covers at least and at most this much."""


def picture(batch: int, height: int, width: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Cut different windows out of the picture.

    The picture continues without end by mirroring at its edges; it is never resized, so that texture keeps its scale. A
    window without enough of both classes is passed over. Nothing is random: image i is the same in every batch.

    Args:
        batch: Number of images.
        height: Height in pixels, at least 16.
        width: Width in pixels, at least 16.

    Returns:
        images: (batch, 3, height, width), float32, each channel of the whole picture with mean 0 and variance 1.
        masks: (batch, height, width), int64, 0 or 1; class 1 covers 10 to 90 % of each.

    Raises:
        ValueError: A size is out of range.
        MemoryError: They do not fit into the memory that is free. This is known before any of it is filled.
    """
    import numpy as np
    import torch

    if batch < 1 or min(height, width) < SMALLEST:
        raise ValueError(
            f"no pictures of batch {batch}, height {height}, width {width}: "
            f"batch must be at least 1, height and width at least {SMALLEST}"
        )
    _check_memory(batch * height * width * (4 * CHANNELS + 8), f"{batch} pictures of {height}×{width}")
    images = np.empty((batch, CHANNELS, height, width), np.float32)
    masks = np.empty((batch, height, width), np.int64)
    image, mask = source()
    for index, (rows, columns) in zip(range(batch), _windows(mask, height, width), strict=False):
        window = np.ix_(rows, columns)
        masks[index] = mask[window]
        for channel in range(CHANNELS):
            images[index, channel] = image[channel][window]
    return torch.from_numpy(images), torch.from_numpy(masks)


@functools.cache
def source() -> tuple["np.ndarray", "np.ndarray"]:
    """Give the whole picture and its mask.

    Returns:
        image: (3, 512, 512), float32, each channel with mean 0 and variance 1; read-only.
        mask: (512, 512), int64, 1 where the tissue is stained brown; read-only.
    """
    import numpy as np
    from skimage import color, data, filters

    rgb = data.immunohistochemistry()  # type: ignore[no-untyped-call]
    # One pixel of blur: without it the mask is speckled with the grain of the camera, which is not worth learning.
    stain = filters.gaussian(color.rgb2hed(rgb)[..., 2], sigma=1)  # type: ignore[no-untyped-call]
    threshold = filters.threshold_otsu(stain)  # type: ignore[no-untyped-call]
    mask = (stain > threshold).astype(np.int64)
    planes = rgb.transpose(2, 0, 1).astype(np.float64)
    image = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
    image = np.ascontiguousarray(image, np.float32)
    image.flags.writeable = mask.flags.writeable = False
    return image, mask


def _windows(mask: "np.ndarray", height: int, width: int) -> Iterator[tuple["np.ndarray", "np.ndarray"]]:
    """Give rows and columns of one window after the other, each with enough of both classes.

    Offsets follow the R2 sequence (the plane's golden ratio), which spreads its points evenly however many are taken.
    They reach over the picture and its mirror image, so that half of the windows are flipped.

    Raises:
        RuntimeError: No such window in a thousand places.
    """
    import numpy as np

    plastic = 1.32471795724474602596
    tall, broad = mask.shape
    refused = 0
    for step in range(2**53):
        rows = _mirrored(math.floor(step / plastic % 1 * 2 * tall), height, tall)
        columns = _mirrored(math.floor(step / plastic**2 % 1 * 2 * broad), width, broad)
        # How often each row and column is taken: this counts class 1 without cutting the window out.
        ones = np.bincount(rows, minlength=tall) @ mask @ np.bincount(columns, minlength=broad)
        if SHARE[0] <= ones / (height * width) <= SHARE[1]:
            refused = 0
            yield rows, columns
        else:
            refused += 1
            if refused == 1000:  # noqa: PLR2004 (as the docstring says)
                raise RuntimeError(f"no window of {height}×{width} in this picture has enough of both classes")


def _mirrored(start: int, length: int, size: int) -> "np.ndarray":
    """Index start, start + 1 … into a line of `size` pixels that goes on by mirroring: 0 … size-1, size-1 … 0, 0 …."""
    import numpy as np

    index = np.arange(start, start + length) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def _check_memory(needed: int, what: str) -> None:
    """Refuse what does not fit: Linux grants memory that it does not have, and kills some process when it is used.

    Raises:
        MemoryError: More bytes are needed than are free.
    """
    free = min(psutil.virtual_memory().available, usable_memory_mib() * MIB)
    if needed > free:
        raise MemoryError(f"{what} need {needed // MIB} MiB, and {free // MIB} MiB are free")
