"""A gate's report on a terminal."""

from rich.console import Console

from bench.gate.markdown import change_of, verdict_of
from bench.gate.report import Report
from bench.report.table import DASH, one_line, three_digits
from bench.report.terminal import print_table, print_text

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
        print_table(on, headings, cells, labels=3, dispensable=("could see", "trials", "base", "head"))
    for row in rows:
        if row.reason:
            print_text(on, f"  {row.name}: {one_line(row.reason)}", "dim")
    for note in report.notes:
        print_text(on, f"  {one_line(note)}", "dim")
    for mute in report.mutes:
        state = "EXPIRED" if mute in report.expired else "until"
        print_text(on, f"  mute {mute.row} · {mute.metric}: {mute.reason}, {state} {mute.expires}")
    equal = len(report.rows) - len(rows)
    if equal:
        print_text(on, f"{equal} deterministic rows are the same in base and head", "dim")
    if report.noise_floor is not None and report.smallest is not None:
        print_text(
            on,
            f"noise floor {report.noise_floor * 100:.1f} %, smallest slow-down this run could have seen "
            f"{report.smallest * 100:.1f} %",
        )
    print_text(on, report.verdict, STYLES.get(report.status, "bold red"))
