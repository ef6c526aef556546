"""Images larger than memory: overlapping tiles through the network, blended into one map of logits.

A tile is a core, whose logits are kept, and a halo around it, whose pixels the core's logits depend on. With transposed
upsampling, cores on multiples of 2^depth and a halo of 6 · 2^depth (96 at depth 4) every kept logit is the whole
image's: the receptive field reaches 6 · 2^depth − 2 pixels beyond a core so placed. With bilinear upsampling it is
not, at any halo: `align_corners=True` takes its samples (h − 1) / (2h − 1) apart, where h is the tile's height and not
the image's (4e-5 at halo 112). Blending then hides the seams.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from unet.state import unwrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from unet.model import UNet


class Span(NamedTuple):
    """One tile along one axis: the pixels lo … hi go in, and the logits start … stop are kept."""

    lo: int
    hi: int
    start: int
    stop: int


def predict(
    model: nn.Module,
    image: Tensor,
    *,
    tile: int = 768,
    halo: int | None = None,
    blend: int = 32,
    batch: int = 1,
    depth: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Logits of an image of any size: (N, C, H, W) → (N, n_classes, H, W), tile by tile and without gradients.

    Where two cores overlap, their logits are averaged with weights that fall linearly from one to the other.

    Args:
        model: the network in eval mode, wrapped or not; each tile comes to its device.
        image: on any device with room for it; the logits come to the same.
        tile: side of a tile with its halo, in pixels: what the memory depends on. A multiple of 2^depth.
        halo: pixels on each side of a core that are computed and dropped; 6 · 2^depth if not given, which makes the
            result exact with transposed upsampling. A multiple of 2^depth.
        blend: pixels by which cores overlap. A multiple of 2^depth; at most half of `tile` − 2 · `halo`.
        batch: tiles at once; only tiles of one shape go together.
        depth: how often the network halves the resolution; if not given, as the model says.
        progress: called after each batch with the number of tiles done and of all tiles.

    Raises:
        TypeError: the model does not say its depth, or returns something else than one map of logits.
        ValueError: the model is in training mode, where a tile's statistics would decide; the image is not
            four-dimensional, or none; or the numbers do not go together.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: expected 1 or more")
    step = 2 ** _depth(model, image, depth)
    halo = 6 * step if halo is None else halo
    rows, columns = (spans(length, tile=tile, halo=halo, blend=blend, step=step) for length in image.shape[2:])
    shares = [[_share(axis, i, image.device) for i in range(len(axis))] for axis in (rows, columns)]

    # Tiles by the shape of what goes in, in reading order: a batch is of one shape.
    groups: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for n, i, j in itertools.product(range(image.shape[0]), range(len(rows)), range(len(columns))):
        groups.setdefault((rows[i].hi - rows[i].lo, columns[j].hi - columns[j].lo), []).append((n, i, j))
    batches = [group[k : k + batch] for group in groups.values() for k in range(0, len(group), batch)]
    total, done = sum(map(len, batches)), 0
    device = next(model.parameters()).device

    out: Tensor | None = None
    with torch.no_grad():
        for tiles in batches:
            windows = [image[n, :, rows[i].lo : rows[i].hi, columns[j].lo : columns[j].hi] for n, i, j in tiles]
            logits = model(torch.stack(windows).to(device))
            if not isinstance(logits, Tensor):
                raise TypeError(f"the model returned a {type(logits).__name__}: expected one map of logits")
            if out is None:
                out = logits.new_zeros((image.shape[0], logits.shape[1], *image.shape[2:]), device=image.device)
            for (n, i, j), whole in zip(tiles, logits, strict=True):
                row, column = rows[i], columns[j]
                core = whole[
                    :, row.start - row.lo : row.stop - row.lo, column.start - column.lo : column.stop - column.lo
                ]
                share = (shares[0][i][:, None] * shares[1][j]).to(core.dtype)
                out[n, :, row.start : row.stop, column.start : column.stop] += share * core.to(image.device)
            done += len(tiles)
            if progress is not None:
                progress(done, total)
    return cast("Tensor", out)


def _depth(model: nn.Module, image: Tensor, depth: int | None) -> int:
    """How often the network halves, as given or as it says, once model and image are seen to be fit for tiles."""
    if unwrap(model).training:
        raise ValueError("the model is in training mode, and BatchNorm would normalise by tile: call model.eval()")
    if image.ndim != 4 or not image.shape[0]:  # noqa: PLR2004 - N, C, H, W
        raise ValueError(f"the image is {tuple(image.shape)}: expected (N, C, H, W) with N at least 1")
    said = getattr(unwrap(model), "depth", None) if depth is None else depth
    if not isinstance(said, int):
        raise TypeError(f"a {type(model).__name__} does not say its depth: give depth=…")
    return said


def spans(length: int, *, tile: int, halo: int, blend: int, step: int) -> list[Span]:
    """The tiles along an axis of `length` pixels: cores cover it and overlap by `blend`, on multiples of `step`.

    At the image's ends there is no halo, so that the network pads where it would for the whole image.

    Raises:
        ValueError: the numbers are not multiples of `step`, or the core is shorter than twice the overlap.
    """
    core = tile - 2 * halo
    if tile % step or halo % step or blend % step or halo < 0 or blend < 0:
        raise ValueError(f"tile {tile}, halo {halo}, blend {blend}: expected multiples of {step}, none below 0")
    if core < max(2 * blend, step):
        raise ValueError(
            f"a tile of {tile} with a halo of {halo} leaves a core of {core}: expected at least "
            f"{max(2 * blend, step)}, twice the overlap of {blend}; take a tile of {2 * halo + max(2 * blend, step)}"
        )
    found: list[Span] = []
    start = 0
    while not found or found[-1].stop < length:
        lo = max(0, start - halo)
        hi = min(length, lo + tile)
        # The last tile, too, is at least as large as the network can take.
        lo = max(0, min(lo, (hi - step) // step * step))
        found.append(Span(lo, hi, start, hi if hi == length else hi - halo))
        start = found[-1].stop - blend
    return found


def memory_bound(model: UNet, image: Tensor, *, tile: int = 768, batch: int = 1) -> int:
    """Bytes that `predict` needs at most beyond the model and the image, with eager convolutions on a CPU.

    n_classes · N · H · W for the logits, and 16 · width · tile² · batch for the tiles, each times the bytes of a
    number; and 64 MiB once, for what the libraries set up and the allocator keeps. At the finest level of the decoder
    a skip (width), the coarser map (width / 2), skip and upsampled map together (2 width) and two outputs of
    convolutions (2 width) exist at once, 5.5 width; a convolution's own copies and the allocator's gaps make it 6 to
    14 where it was measured, less for large tiles.

    Args:
        model: the network, for its width and classes.
        image: (N, C, H, W), for its size and dtype.
        tile: as for `predict`.
        batch: as for `predict`.
    """
    size = image.shape[0] * image.shape[2] * image.shape[3]
    numbers = model.n_classes * size + 16 * model.width * min(tile**2, size) * batch
    return 64 * 2**20 + image.element_size() * numbers


def _share(axis: list[Span], i: int, device: torch.device) -> Tensor:
    """The share of tile i in each pixel of its core, along one axis: 1, but for the ramps where cores overlap."""
    span = axis[i]
    share = torch.ones(span.stop - span.start, dtype=torch.float64)
    if i > 0 and (shared := axis[i - 1].stop - span.start):
        share[:shared] = (torch.arange(shared) + 0.5) / shared
    if i + 1 < len(axis) and (shared := span.stop - axis[i + 1].start):
        share[-shared:] = 1 - (torch.arange(shared) + 0.5) / shared
    return share.to(device)
