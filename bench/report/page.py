"""One self-contained page: opens from disk, asks no network for anything, and runs no script but its own.

All text of records is escaped, and a Content-Security-Policy with the hashes of the page's own scripts keeps whatever
slips through from running.
"""

import base64
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altair as alt
import jinja2
import vl_convert

from bench.case import AXES
from bench.machine import slug
from bench.report import catalog, frames, planes, reference, theme
from bench.report.samples import points, thinned
from bench.report.scenes import title
from bench.report.table import DASH, FIGURES, cells, conditions, three_digits
from bench.report.verdicts import Verdicts
from bench.results import Record, Run, Value

if TYPE_CHECKING:
    import pandas as pd

VEGALITE = "6.1"
WIDTH = 520  # the page sets the width that there is; this one is for a moment
FILTERS = ("task", "implementation", "precision", "layout", "upsampling", "batch", "size", "devices")


def html(runs: Sequence[Run], verdicts: Verdicts | None = None) -> str:
    """The page of these runs, with the gate's verdicts on top where there are some."""
    cases = frames.cases(runs)
    records = [record for run in runs for record in run.records]
    scripts = {"vega": _in_script(_vega_embed()), "page": _in_script(_part("page.js"))}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    data = _data(runs, cases, records)
    return environment.from_string(_part("page.html.jinja")).render(
        scripts=scripts,
        hashes=[_hash(script) for script in scripts.values()],
        css=theme.style() + _part("page.css"),
        data=_json(data),
        runs=[_run(run) for run in runs],
        best=[view for view in data["views"] if view["best"]],
        charts=catalog.CHARTS,
        headings=list(FIGURES),
        rows=list(_rows(runs)),
        filters={name: _values(records, name) for name in FILTERS if len(_values(records, name)) > 1},
        statuses=list(dict.fromkeys(record.status for record in records)),
        verdicts=verdicts,
        published=reference.beside(records),
        dash=DASH,
    )


@functools.cache
def _vega_embed() -> str:
    """The library that draws, in one script: it comes with vl-convert, and takes a second or two to bundle."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGALITE))


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _in_script(source: str) -> str:
    """Source that HTML cannot take for the end of its element."""
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _json(data: object) -> str:
    """JSON for a script element: no text in it can end the element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _run(run: Run) -> dict[str, Any]:
    env, settings = run.header.environment, run.header.settings
    counted: dict[str, int] = {}
    for record in run.records:
        counted[record.status] = counted.get(record.status, 0) + 1
    return {
        "conditions": conditions(run),
        "file": f"{slug(env.machine)}/{run.path.name}",
        "preset": run.header.preset,
        "measure_s": three_digits(settings.measure_s),
        "load": three_digits(env.load_average[0]),
        "os": f"{env.machine.os}, {env.machine.kernel}",
        "counted": ", ".join(f"{count} {status}" for status, count in counted.items()) or "no case",
        "disturbed": sum(bool(record.figures.get("disturbed")) for record in run.records),
        "damaged": run.damaged,
        "dirty": bool(env.dirty),
    }


def _rows(runs: Sequence[Run]) -> Any:  # noqa: ANN401 (an iterator of what the template takes)
    for number, run in enumerate(runs):
        words = cells(run)
        for record in run.records:
            yield {
                "run": number,
                "id": record.case.id,
                "axes": {name: getattr(record.case, name) for name in FILTERS},
                "status": record.status,
                # The status has a column of its own here.
                "cells": [DASH if cell == record.status else cell for cell in words[record.case].values()],
                "repeat": record.repeat,
            }


def _values(records: Sequence[Record], axis: str) -> list[Value]:
    return list(dict.fromkeys(getattr(record.case, axis) for record in records))


def _data(runs: Sequence[Run], cases: "pd.DataFrame", records: Sequence[Record]) -> dict[str, Any]:
    colours = catalog.colours(cases)
    drawn = catalog.drawn(cases)
    most = points(len(records))
    # Names once, and not once a case: they are most of what there is to say.
    names = list(dict.fromkeys(name for record in records for name in record.figures))
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "axes": list(AXES),
        "names": names,
        "charts": {found.chart.name: _chart(found, colours) for found in drawn},
        "samples": _vega(planes.samples(alt.NamedData("rows"), WIDTH, clocks=_clocks(records)), planes.VALUES),
        "views": _views(runs, cases, records),
        "cases": [_case(record, numbers, most) for record in records],
    }


def _clocks(records: Sequence[Record]) -> bool:
    return any(block.sm_mhz is not None for record in records for block in record.blocks)


def _chart(found: catalog.Drawn, colours: alt.Scale) -> dict[str, Any]:
    chart = found.chart
    return {
        **_vega(chart.draw(alt.NamedData("rows"), colours, WIDTH), chart.beside),
        "columns": list(chart.columns.items()),
        "rows": {view: _records(rows.drop(columns="view")) for view, rows in found.rows.items()},
        "captions": {view: chart.caption(rows) for view, rows in found.rows.items()},
    }


def _vega(chart: Any, beside: int) -> dict[str, Any]:  # noqa: ANN401 (any of altair's charts)
    spec = vl_convert.vegalite_to_vega(json.dumps(chart.to_dict()), vl_version=VEGALITE)
    return {"spec": spec, "beside": beside}


def _records(rows: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{name: _plain(value) for name, value in row.items()} for row in rows.to_dict("records")]


def _plain(value: Any) -> Any:  # noqa: ANN401 (what a pandas cell may hold)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _views(runs: Sequence[Run], cases: "pd.DataFrame", records: Sequence[Record]) -> list[dict[str, Any]]:
    """The scenes to choose from, in the order they were measured, and for each the place of its rows in every chart."""
    words = [cells(run) for run in runs]
    views = []
    for view, rows in cases.groupby("in_ladder", sort=False):
        first = rows.iloc[0]
        measured = rows[rows["images_per_s"].notna()]
        best = None if measured.empty else measured.loc[measured["images_per_s"].idxmax()]
        views.append(
            {
                "key": view,
                "run": int(first["run"]),
                "title": title(records[first["case"]].case),
                "charts": {chart.name: first[f"in_{chart.scene}"] for chart in catalog.CHARTS},
                "measured": len(measured),
                "best": None if best is None else _best(best, records[best["case"]], words[best["run"]]),
            }
        )
    return views


def _best(row: "pd.Series", record: Record, words: Any) -> dict[str, Any]:  # noqa: ANN401 (what `cells` gives)
    return {"case": int(row["case"]), "rung": row["rung"], **words[record.case]}


def _case(record: Record, numbers: Mapping[str, int], most: int) -> dict[str, Any]:
    return {
        "id": record.case.id,
        "axes": [getattr(record.case, name) for name in AXES],
        "status": record.status,
        "reason": record.reason,
        "warnings": list(_warnings(record)),
        "figures": [[numbers[name], _shown(value)] for name, value in record.figures.items()],
        "repeat": record.repeat,
        "started": f"{record.started:%Y-%m-%d %H:%M:%S} UTC",
        "spent_s": {phase: three_digits(seconds) for phase, seconds in record.spent_s.items()},
        "samples": thinned(record, most),
    }


def _warnings(record: Record) -> Iterator[str]:
    """What stood in the way of an undisturbed measurement."""
    found = record.figures
    if found.get("disturbed"):
        yield "Other processes used the cores meanwhile."
    if found.get("drifting"):
        yield f"Durations drifted by {three_digits(_percent(found.get('drift')))} % from the first step to the last."
    if found.get("throttled"):
        share = three_digits(_percent(found.get("throttled_share")))
        yield f"The clock was held down in {share} % of the steps: {found['throttled']}."


def _percent(share: Value) -> float | None:
    return share * 100 if isinstance(share, int | float) else None


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    # More digits than elsewhere: this is the record itself, and 0.99976 of the pixels are not all of them.
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
