"""What a record and a run hold beside figures: clocks block by block, the network's stages, what a device can do."""

import msgspec


class Block(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Timed steps between two looks at the clock, and how the GPU was just after; in a file an array in this order.

    Args:
        samples: how many steps.
        sm_mhz: clock of the multiprocessors, MHz; None where it is not told.
        temperature_c: of the chip, °C; None where it is not told.
        throttled: what held the clock down against everyone's will, by NVML's names.
    """

    samples: int
    sm_mhz: int | None = None
    temperature_c: int | None = None
    throttled: tuple[str, ...] = ()


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A block of the network in a forward pass of eager: `inc`, `down1` …, `up1` …, `outc`.

    Args:
        name: of the block.
        ms: median duration, ms.
        gflop: its floating-point operations, 10⁹, 2 a multiply-add.
        gbyte: bytes it must move, 10⁹: see the figure `gbyte`.
    """

    name: str
    ms: float
    gflop: float
    gbyte: float


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """What a device did at its best in this very run: a large matrix product, a large copy.

    Args:
        device: `cpu` or `gpu`.
        threads: CPU threads; 0 on a GPU.
        precision: of the arithmetic, as in a case; autocast counts as the dtype it casts to.
        tflop_per_s: 10¹² floating-point operations a second of the product, dense, 2 a multiply-add.
        gb_per_s: 10⁹ bytes a second of the copy, read and written.
    """

    device: str
    threads: int
    precision: str
    tflop_per_s: float
    gb_per_s: float
