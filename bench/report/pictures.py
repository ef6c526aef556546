"""Charts as files: PNG on white for slides and issues, SVG that follows the reader's light or dark for a README."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vl_convert
from rich.console import Console
from rich.progress import track

from bench.report import catalog, frames, theme
from bench.report.page import VEGALITE
from bench.report.scenes import title
from bench.report.table import conditions
from bench.results import ResultsError, Run

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 560


def save(runs: Sequence[Run], folder: Path) -> int:
    """Write every chart of every scene as `folder/<run>/<scene>-<chart>.png`, and tell how many."""
    drawings = list(_drawings(runs))
    for chart, _, name, drawing in track(drawings, "drawing", console=Console(stderr=True), transient=True):
        run, _, held = name.partition(":")
        place = folder / (runs[int(run)].path.stem if run.isdecimal() else run)
        place.mkdir(parents=True, exist_ok=True)
        spec = theme.in_light(json.dumps(drawing))
        (place / f"{held}-{chart.name}.png").write_bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGALITE, scale=2))
    return len(drawings)


def ladder(run: Run, scene: str) -> tuple[str, str]:
    """The ladder of a scene such as `infer-transposed-b1-256x256-1cpu` as SVG, and the same in a sentence.

    Raises:
        ResultsError: the run has no such scene.
    """
    for chart, rows, name, drawing in _drawings([run]):
        if chart.name == "ladder" and name == f"0:{scene}":
            svg = vl_convert.vegalite_to_svg(json.dumps(drawing), vl_version=VEGALITE)
            head, end, rest = svg.partition(">")
            return f"{head}{end}<style>{theme.style()}</style>{rest}\n", chart.caption(rows)
    raise ResultsError(f"{run.path}: no scene {scene!r} in it")


def _drawings(runs: Sequence[Run]) -> Iterator[tuple[catalog.Chart, "pd.DataFrame", str, dict[str, Any]]]:
    """Each chart of each scene: chart, rows, `<run>:<scene>`, and the drawing under its title and conditions."""
    cases = frames.cases(runs)
    records = [record for run in runs for record in run.records]
    colours = catalog.colours(cases)
    for found in catalog.drawn(cases):
        for view, rows in found.rows.items():
            # Not a row that the scene has from another, such as the one device that a shared batch is compared with.
            own = cases[f"in_{found.chart.scene}"] == view
            case = int(next(number for number in rows["case"] if own[number]))
            run = runs[int(cases["run"].iloc[case])]
            said = f"{found.chart.title}: {title(records[case].case, found.chart.scene)}"
            drawing = found.chart.draw(rows, colours, WIDTH).properties(
                title={"text": said, "subtitle": conditions(run).split(" · "), "offset": 14}
            )
            yield found.chart, rows, view, drawing.to_dict()
