"""Every chart of a page: its frame, its drawing, its caption. A new chart is one line here."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import altair as alt
import msgspec

from bench.report import captions, charts, frames, planes, roof
from bench.report.theme import families

if TYPE_CHECKING:
    import pandas as pd


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """One chart.

    Args:
        name: in file names and anchors.
        scene: its entry in `bench.report.scenes.FREE`.
        title: what question it answers.
        missing: said where a scene has nothing for it.
        frame: from the frame of all cases to its own.
        draw: from rows, colours and width to altair's chart.
        caption: from the rows of a scene to a sentence.
        columns: field → heading, for whom reads the rows as a table.
        beside: what stands left and right of the plot, pixels.
    """

    name: str
    scene: str
    title: str
    missing: str
    frame: Callable[["pd.DataFrame"], "pd.DataFrame"]
    draw: Callable[[Any, alt.Scale, int], Any]
    caption: Callable[["pd.DataFrame"], str]
    columns: dict[str, str]
    beside: int


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """A chart with its rows, scene by scene; scenes without any are not in it."""

    chart: Chart
    rows: dict[str, "pd.DataFrame"]


def drawn(cases: "pd.DataFrame") -> list[Drawn]:
    """All charts of these cases."""
    return [
        Drawn(chart=chart, rows={str(view): rows for view, rows in chart.frame(cases).groupby("view", sort=False)})
        for chart in CHARTS
    ]


def colours(cases: "pd.DataFrame") -> alt.Scale:
    """One colour a family over all of the cases."""
    return families(cases["family"])


def _front(name: str, title: str, field: str, unit: str, missing: str) -> Chart:
    return Chart(
        name=name,
        scene="front",
        title=title,
        missing=missing,
        frame=lambda cases: frames.front(cases, field),
        draw=lambda data, colour, width: planes.front(data, colour, width, unit),
        caption=captions.front,
        columns={"label": "case", "p50_ms_text": "p50 ms", "cost_text": unit, "images_per_s_text": "img/s"},
        beside=planes.VALUES,
    )


CHARTS: Sequence[Chart] = (
    Chart(
        name="ladder",
        scene="ladder",
        title="What each step brings",
        missing="Nothing was tried here.",
        frame=frames.ladder,
        draw=charts.ladder,
        caption=captions.ladder,
        columns={
            "rung": "case",
            "images_per_s_text": "img/s",
            "peak_memory_mib_text": "peak MiB",
            "rel_l2_text": "rel. L2",
            "word": "status",
        },
        beside=charts.VALUES,
    ),
    _front(
        *("front-memory", "Latency against memory", "peak_memory_mib", "peak memory, MiB"),
        "No case has both a latency and a peak of memory.",
    ),
    Chart(
        name="upsampling",
        scene="upsampling",
        title="Bilinear against transposed",
        missing="Only one of the two was tried in this scene.",
        frame=frames.upsampling,
        draw=lambda data, _, width: charts.upsampling(data, width),
        caption=captions.upsampling,
        columns={
            "rung": "case",
            "upsampling": "upsampling",
            "images_per_s": "img/s",
            "ratio_text": "bilinear over transposed",
            "word": "status",
        },
        beside=charts.NAMES,
    ),
    Chart(
        name="devices",
        scene="devices",
        title="One device against many",
        missing="Only one number of devices was tried in this scene.",
        frame=frames.devices,
        draw=charts.devices,
        caption=captions.devices,
        columns={
            "rung": "case",
            "processes": "devices",
            "images_per_s": "img/s",
            "efficiency_text": "of the ideal",
            "lost_text": "step lost to",
            "word": "status",
        },
        beside=charts.VALUES,
    ),
    Chart(
        name="break-even",
        scene="break_even",
        title="When a slow start pays off",
        missing="Nothing but eager has a speed here.",
        frame=frames.break_even,
        draw=charts.break_even,
        caption=captions.break_even,
        columns={"rung": "case", "start_s": "first call s", "start_s_eager": "eager's s", "text": "pays off after"},
        beside=charts.NAMES,
    ),
    Chart(
        name="roofline",
        scene="roofline",
        title="How near each stage comes to the roof",
        missing="Stages and ceilings were not measured: nox -s bench -- --stages --ceilings does.",
        frame=roof.frame,
        draw=lambda data, _, width: planes.roofline(data, width),
        caption=captions.roofline,
        columns={
            "rung": "case",
            "stage": "stage",
            "flop_per_byte": "FLOP per byte",
            "tflop_per_s": "TFLOP/s",
            "share_text": "of its roof",
            "bound": "bound by",
        },
        beside=planes.VALUES,
    ),
    _front(
        *("front-energy", "Latency against energy", "energy_j_per_image", "J a image"),
        "No energy was recorded: a CPU has no meter that is read here.",
    ),
    Chart(
        name="history",
        scene="history",
        title="Over the runs of this machine",
        missing="One run of this machine from committed sources: give several to see them over time.",
        frame=frames.history,
        draw=charts.history,
        caption=captions.history,
        columns={"rung": "case", "time": "UTC", "commit": "commit", "images_per_s": "img/s", "step": "step"},
        beside=charts.VALUES,
    ),
)
