"""What a command prints: one look for every table, and for the prose around it.

A terminal gets what fits it; a pipe gets whole lines, for whom searches or cuts them, and tables as wide as `COLUMNS`
where that is set. No colour and no other escape code is in a pipe, or anywhere with `NO_COLOR`.
"""

import io
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import IO, Literal

import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bench.report.stages import HEADINGS, stage_rows
from bench.report.table import conditions, one_line, tables
from bench.results import Run

WHOLE = 10_000
"""Columns of a pipe."""
NARROWEST = 16
"""Columns below which a label is not folded."""
GAP = 2
# Left out first where the terminal is narrow; what is left decides.
DISPENSABLE = ("95 %, this process", "p90 ms", "first call s", "same class", "rel. L2", "peak MiB", "img/s")
# Between words, and behind the parts of a case's id or of a layer's name.
_PIECE = re.compile(r".+?(?:[\s-]+|\.(?=[a-z])|$)")


def console(file: IO[str] | None = None, *, terminal: bool | None = None, plain: bool = False) -> Console:
    """A console on standard output or `file`.

    Args:
        file: where to.
        terminal: whether that ends on a terminal, where the file cannot tell.
        plain: without colours, whatever the terminal can.
    """
    stream = file or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal without × and … is no reason to fail
    found = Console(file=file, highlight=False, force_terminal=terminal, color_system=None if plain else _colours())
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = WHOLE
    return found


def error_console() -> Console:
    """The console on standard error, for progress: what a command prints can be piped on."""
    return Console(stderr=True, highlight=False, color_system=_colours())


def _colours() -> Literal["auto"] | None:
    """Of itself rich takes `NO_COLOR` to allow bold and dim."""
    return None if os.environ.get("NO_COLOR") else "auto"


def show(run: Run, on: Console) -> None:
    """Print the tables of a run."""
    print_text(on, conditions(run), "dim")
    if run.damaged:
        print_text(on, f"{run.damaged} line(s) of {run.path} cannot be read; the others are whole.", "yellow")
    for table in tables(run):
        on.print()
        print_text(on, table.title, "bold")
        print_table(on, table.headings, table.rows, labels=table.labels, bold=table.baselines, dispensable=DISPENSABLE)
        for note in table.notes:
            print_text(on, f"  {note}", "dim")
    for record in run.records:
        if record.stages:
            on.print()
            print_text(on, f"stages of {record.case.id}", "bold")
            print_table(on, HEADINGS, list(stage_rows(run, record)), labels=1, dispensable=("GB", "GFLOP"))


def print_json(*rows: object) -> None:
    """Print structs, dataclasses and plain data as JSON on standard output, one a line."""
    for row in rows:
        sys.stdout.write(f"{msgspec.json.encode(row).decode()}\n")


def print_text(on: Console, text: str, style: str = "") -> None:
    """Print a line of prose, on a terminal in several where it is too long; a command stays whole, to be copied."""
    text = _harmless(text)
    if on.is_terminal and "python -m " not in text:
        indent = " " * (len(text) - len(text.lstrip()) + 2)
        lines = textwrap.wrap(text, on.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(lines)
    on.print(Text(text), style=style, soft_wrap=True)


def print_table(
    on: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    labels: int,
    grouped: bool = True,
    bold: Collection[int] = (),
    dispensable: Sequence[str] = (),
) -> None:
    """Print a table of text as wide as its cells, labels to the left, figures to the right.

    Where the console is too narrow, long headings take several lines, then `dispensable` columns are left out one by
    one, then labels take several lines. A figure is never cut off.

    Args:
        on: where to.
        headings: of the columns.
        rows: cells.
        labels: how many columns name the row.
        grouped: whether a first column with groups says each once, and space parts them.
        bold: rows that the others are compared with.
        dispensable: headings of columns that one can do without, the first to go first.
    """
    headings, *rows = ([_harmless(cell) for cell in row] for row in (headings, *rows))
    columns, widths = _fitting([headings, *rows], labels, dispensable, on.width)
    grid = [[_folded(row[column], widths[column]) for column in columns] for row in (headings, *rows)]
    across = [_widest(cells) for cells in zip(*grid, strict=True)]
    left = sum(column < labels for column in columns)
    highest = max(cell.count("\n") for cell in grid[0])
    sunk = ["\n" * (highest - cell.count("\n")) + cell for cell in grid[0]]
    for line in _lines(sunk, across, left):
        on.print(Text(line), style="bold", soft_wrap=True)
    outer = None
    groups = grouped and 1 < len({row[0] for row in rows}) < len(rows)
    for number, (row, cells) in enumerate(zip(rows, grid[1:], strict=True)):
        repeats = groups and row[0] == outer
        if groups and outer is not None and not repeats:
            on.print()
        for line in _lines(["", *cells[1:]] if repeats else cells, across, left):
            on.print(Text(line), style="bold" if number in bold else "", soft_wrap=True)
        outer = row[0]


def _harmless(text: str) -> str:
    """The text without what would move or colour a terminal; its lines stay."""
    return "\n".join(map(one_line, text.split("\n")))


def _lines(cells: Sequence[str], widths: Sequence[int], left: int) -> Iterator[str]:
    """The row, in as many lines as its highest cell, its first cells to the left; without blanks at the end."""
    for parts in zip_longest(*(cell.split("\n") for cell in cells), fillvalue=""):
        blanks = [" " * (width - cell_len(part)) for part, width in zip(parts, widths, strict=True)]
        padded = [
            part + blank if column < left else blank + part
            for column, (part, blank) in enumerate(zip(parts, blanks, strict=True))
        ]
        yield (" " * GAP).join(padded).rstrip()


def _fitting(
    grid: Sequence[Sequence[str]], labels: int, dispensable: Sequence[str], room: int
) -> tuple[list[int], list[int]]:
    """Which columns of the grid, headings first, are shown in `room`, and the width of every one."""
    headings, *rows = grid
    columns = list(range(len(headings)))
    widths = [_widest(row[column] for row in grid) for column in columns]
    least = [_widest([*headings[column].split(), *(row[column] for row in rows)]) for column in columns]
    for name in dispensable:
        if _total(least[column] for column in columns) > room:
            columns = [column for column in columns if headings[column] != name]

    def over() -> int:
        return _total(widths[column] for column in columns) - room

    while over() > 0 and any(widths[column] > least[column] for column in columns):
        widths[max(columns, key=lambda column: widths[column] - least[column])] -= 1
    for column in reversed([column for column in columns if column < labels]):
        if over() > 0:
            pieces = [piece.rstrip() for row in grid for piece in _PIECE.findall(row[column])]
            widths[column] = max(_widest(pieces), min(NARROWEST, widths[column]), widths[column] - over())
    return columns, widths


def _widest(cells: Iterable[str]) -> int:
    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


def _total(widths: Iterable[int]) -> int:
    """Of columns so wide, and the gaps between them."""
    return sum(width + GAP for width in widths) - GAP


def _folded(cell: str, width: int) -> str:
    """The cell in lines of `width` at most, parted between words or behind a hyphen."""
    lines: list[str] = []
    for given in cell.split("\n"):
        lines.append("")
        for piece in _PIECE.findall(given):
            if cell_len((lines[-1] + piece).rstrip()) > width and lines[-1]:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
