"""The convolutions of a U-Net as problems: what resources, tuning and the roofline run over.

The network itself is not known here; a test walks the real one, fused, and holds these lists to it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from kernels.problem import Precision, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

HALVES: tuple[Precision, ...] = ("bf16", "fp16")
PRECISIONS: tuple[Precision, ...] = (*HALVES, "tf32", "fp32")


def unet_layers(
    *,
    batch: int,
    size: int = 512,
    in_channels: int = 3,
    base: int = 64,
    classes: int = 2,
    precision: Precision = "bf16",
) -> tuple[Problem, ...]:
    """Distinct 3×3 convolutions of a U-Net of five levels with what is fused around them, both upsamplings together.

    Args:
        batch: images.
        size: height and width of the input in pixels, a multiple of 16.
        in_channels: channels of the image.
        base: channels of the first level.
        classes: channels of the logits.
        precision: of the arithmetic.
    """
    levels = [base * 2**level for level in range(5)]

    def layer(level: int, i: int, o: int, **around: int | bool) -> Problem:
        side = size // 2**level
        sizes = {"batch": batch, "height": side, "width": side, "in_channels": i, "out_channels": o}
        return Problem(**sizes, precision=precision, **around)  # type: ignore[arg-type] # as Problem has them

    found: dict[Problem, None] = {layer(0, in_channels, base): None, layer(0, base, base, pool=True): None}
    for level, channels in enumerate(levels[1:], start=1):
        last = level == 4  # noqa: PLR2004
        # Bilinear upsampling halves the last level; each but the last is pooled for the next.
        for out in {channels: None, channels // 2 if last else channels: None}:
            found |= {layer(level, levels[level - 1], out): None, layer(level, out, out, pool=not last): None}
    for level, channels in enumerate(levels[:-1]):
        # The skip and the upsampled map are read together; the decoder with bilinear upsampling narrows as it goes up.
        for upsample in (False, True):
            found |= {layer(level, 2 * channels, channels, second_channels=channels, upsample=upsample): None}
            out = channels // 2 if upsample and level else channels
            found |= {layer(level, channels, out, classes=0 if level else classes): None}
    return tuple(found)


def transposed_layers(
    *, batch: int, size: int = 512, base: int = 64, precision: Precision = "bf16"
) -> tuple[Problem, ...]:
    """The 2×2 transposed convolutions of a U-Net of five levels; sizes are those of their inputs."""
    sides = [size // 2**level for level in range(1, 5)]
    return tuple(
        Problem(batch=batch, height=side, width=side, in_channels=2 * o, out_channels=o, precision=precision)
        for side, o in zip(sides, (base * 2**level for level in range(4)), strict=True)
    )


def folded_layers(*, batch: int, size: int = 512, base: int = 64, precision: Precision = "bf16") -> tuple[Problem, ...]:
    """The convolutions that read a skip and a map from below, through the transposed one that is folded into them."""
    return tuple(
        Problem(
            batch=batch,
            height=size // 2**level,
            width=size // 2**level,
            in_channels=3 * channels,
            out_channels=channels,
            precision=precision,
            second_channels=2 * channels,
        )
        for level, channels in enumerate(base * 2**level for level in range(4))
    )


def alone(layer: Problem, *, in_channels: int, out_channels: int, pool: bool = False) -> Problem:
    """A problem of the layer's size with these channels, and nothing around it but a pool."""
    nothing: dict[str, Any] = {"second_channels": 0, "upsample": False, "classes": 0}
    return dataclasses.replace(layer, in_channels=in_channels, out_channels=out_channels, pool=pool, **nothing)


def extremes(layers: Sequence[Problem]) -> tuple[Problem, ...]:
    """Of layers whose code differs in its loop's number of steps alone, those with the fewest and the most.

    Code differs by precision, by what is fused, by whether few input channels are gathered, and by the tile, which is
    a narrow one up to 64 output channels (`kernels.defaults`).
    """
    alike: dict[tuple[object, ...], list[Problem]] = {}
    for layer in layers:
        kind = (layer.precision, layer.fused, layer.in_channels < 16, layer.out_channels > 64)  # noqa: PLR2004
        alike.setdefault(kind, []).append(layer)
    chosen = {end(group, key=lambda layer: layer.in_channels) for group in alike.values() for end in (min, max)}
    return tuple(layer for layer in layers if layer in chosen)


# What stands around a convolution is looked at in 16 bits, a plain one in every precision: a compilation each,
# and they are to be done within three minutes.
LAYERS = tuple(
    layer
    for precision in PRECISIONS
    for batch in (1, 16)
    for layer in unet_layers(batch=batch, precision=precision)
    if precision in HALVES or not any(layer.fused)
)
FOLDED_LAYERS = tuple(
    layer for precision in HALVES for batch in (1, 16) for layer in folded_layers(batch=batch, precision=precision)
)
TRANSPOSED_LAYERS = tuple(
    layer for precision in HALVES for batch in (1, 16) for layer in transposed_layers(batch=batch, precision=precision)
)
