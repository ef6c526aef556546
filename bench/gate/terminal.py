"""A gate's report on a terminal."""

from rich.console import Console
from rich.text import Text

from bench.gate.markdown import change_of, verdict_of
from bench.gate.report import Report
from bench.report.table import DASH, one_line, three_digits
from bench.report.terminal import draw

STYLES = {0: "bold green", 4: "bold yellow", 5: "bold yellow"}


def show(report: Report, on: Console) -> None:
    """Rows, then the verdict, for which one looks at the end; deterministic rows that are SAME are only counted."""
    rows = [row for row in report.rows if row.estimate is not None or row.word != "SAME"]
    headings = ("row", "metric", "verdict", "change", "base", "head", "trials", "could see")
    cells = [
        (
            *(row.name, row.metric, verdict_of(row), change_of(row), three_digits(row.base), three_digits(row.head)),
            str(row.estimate.trials) if row.estimate else DASH,
            f"{row.estimate.smallest * 100:.1f} %" if row.estimate else DASH,
        )
        for row in rows
    ]
    if cells:
        on.print(draw(headings, cells, labels=3), crop=False)
    for row in rows:
        if row.reason:
            on.print(Text(f"  {row.name}: {one_line(row.reason)}"), style="dim", soft_wrap=True)
    for note in report.notes:
        on.print(Text(f"  {one_line(note)}"), style="dim", soft_wrap=True)
    for mute in report.mutes:
        state = "EXPIRED" if mute in report.expired else "until"
        on.print(Text(f"  mute {mute.row} · {mute.metric}: {mute.reason}, {state} {mute.expires}"), soft_wrap=True)
    equal = len(report.rows) - len(rows)
    if equal:
        on.print(Text(f"{equal} deterministic rows are the same in base and head"), style="dim")
    if report.noise_floor is not None and report.smallest is not None:
        on.print(
            Text(
                f"noise floor {report.noise_floor * 100:.1f} %, smallest slow-down this run could have seen "
                f"{report.smallest * 100:.1f} %"
            )
        )
    on.print(Text(report.verdict), style=STYLES.get(report.status, "bold red"), soft_wrap=True)
