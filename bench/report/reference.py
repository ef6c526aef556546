"""What others have published of a U-Net, shown beside our figures where the work is the same, and never ranked."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from bench.results import RESULTS, Record, ResultsError

FILE = RESULTS / "reference" / "published.csv"


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """One published figure, as its source gives it.

    Args:
        source: where it was published.
        system: which suite or program.
        model: which network; only its name is known to be that of ours.
        task: `infer` or `train`.
        hardware: the device.
        devices: how many.
        precision: the arithmetic.
        batch_per_device: images a step on each device; 0 where it is not told.
        height: of the image, pixels.
        width: of the image, pixels.
        depth_px: of a volume, voxels; 0 for an image.
        metric: what was measured.
        value: the figure.
        unit: its unit.
        note: what is known to be wrong with it.
    """

    source: str
    system: str
    model: str
    task: str
    hardware: str
    devices: int
    precision: str
    batch_per_device: Annotated[int, msgspec.Meta(ge=0)]
    height: int
    width: int
    depth_px: int
    metric: str
    value: float
    unit: str
    note: str


def published(path: Path = FILE) -> tuple[Published, ...]:
    """All of them; none where the file is absent, as in an installed package.

    Raises:
        ResultsError: the file is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    try:
        rows = [{**row, **{name: row.get(name) or "0" for name in _MAY_LACK}} for row in csv.DictReader(lines)]
        return msgspec.convert(rows, tuple[Published, ...], strict=False)
    except msgspec.ValidationError as error:
        raise ResultsError(f"{path}: not a table of published figures ({error})") from error


_MAY_LACK = ("batch_per_device", "depth_px")


def beside(records: Sequence[Record], path: Path = FILE) -> tuple[Published, ...]:
    """Those that have task, size and precision of some record; figures of volumes have the size of none."""
    ours = {(record.case.task, record.case.size, record.case.precision) for record in records}
    return tuple(
        row
        for row in published(path)
        if not row.depth_px and (row.task, f"{row.height}x{row.width}", row.precision) in ours
    )
