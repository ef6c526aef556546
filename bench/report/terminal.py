"""Tables on a terminal: as wide as it is, plain when piped, `NO_COLOR` respected (all by rich)."""

import io
import sys
from collections.abc import Collection, Sequence
from typing import IO

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench.report.stages import HEADINGS, stage_rows
from bench.report.table import Table, conditions, tables
from bench.results import Run

PIPED_WIDTH = 160
# Left out first where the terminal is narrow; what is left decides.
DISPENSABLE = ("95 %, this process", "p90 ms", "first call s", "same class", "rel. L2", "peak MiB", "img/s")


def console(file: IO[str] | None = None) -> Console:
    """A console on standard output or `file`; wide enough for whole rows where there is no terminal to fit."""
    stream = file or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal without × and … is no reason to fail
    found = Console(file=file, highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(file=file, highlight=False, width=PIPED_WIDTH)


def error_console() -> Console:
    """The console on standard error, for progress: what a command prints can be piped on."""
    return Console(stderr=True, highlight=False)


def show(run: Run, on: Console) -> None:
    """Print the tables of a run."""
    on.print(Text(conditions(run)), style="dim", soft_wrap=True)
    if run.damaged:
        on.print(Text(f"{run.damaged} line(s) of {run.path} cannot be read; the others are whole."), style="yellow")
    for table in tables(run):
        on.print()
        on.print(Text(table.title), style="bold", soft_wrap=True)
        on.print(_fitting(table, on.width), crop=False)
        for note in table.notes:
            on.print(Text(f"  {note}"), style="dim", soft_wrap=True)
    for record in run.records:
        if record.stages:
            on.print()
            on.print(Text(f"stages of {record.case.id}"), style="bold", soft_wrap=True)
            on.print(draw(HEADINGS, list(stage_rows(run, record)), labels=1), crop=False)


def _fitting(table: Table, width: int) -> RichTable:
    """The table without the columns that one can do without, if it is too wide: a figure is never cut off."""
    columns = list(range(len(table.headings)))
    for heading in DISPENSABLE:
        if _width([[row[column] for column in columns] for row in (table.headings, *table.rows)]) <= width:
            break
        columns = [column for column in columns if table.headings[column] != heading]
    rows = [[row[column] for column in columns] for row in table.rows]
    return draw([table.headings[column] for column in columns], rows, labels=table.labels, bold=table.baselines)


def _width(rows: Sequence[Sequence[str]]) -> int:
    """Of a table of these rows: its cells and two signs between columns."""
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) - 2


def draw(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int, bold: Collection[int] = ()
) -> RichTable:
    """A table of text as wide as its cells, labels to the left, figures to the right.

    Args:
        headings: of the columns.
        rows: cells.
        labels: how many columns name the row. Where the first has groups, it is said once, and space parts them.
        bold: rows that the others are compared with.
    """
    drawn = RichTable(box=None, pad_edge=False, width=_width([headings, *rows]))
    for number, heading in enumerate(headings):
        drawn.add_column(heading, justify="left" if number < labels else "right", no_wrap=True)
    outer = None
    for number, row in enumerate(rows):
        repeats = _groups(rows) and row[0] == outer
        if _groups(rows) and outer is not None and not repeats:
            drawn.add_row()
        cells = [Text(cell) for cell in row]
        drawn.add_row(*([Text("")] if repeats else cells[:1]), *cells[1:], style="bold" if number in bold else None)
        outer = row[0]
    return drawn


def _groups(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first column has groups: some value in several rows."""
    return 1 < len({row[0] for row in rows}) < len(rows)
