"""The look of everything that is printed: real commands, in real pipes and real terminals of a known width."""

import contextlib
import fcntl
import io
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench.case import Case
from bench.report.terminal import console, print_table, print_text
from bench.results import Header, Record
from bench.runfile import RunFile

from .conftest import ROOT, TINY, Bench
from .pages import gpus, record

MakeRecord = Callable[..., Record]
RUN, HISTORY = "RUN", "HISTORY"
COMMANDS = [
    ["list"],
    ["list", "--axes"],
    ["report", RUN],
    ["recommend", RUN, "--max-latency-ms", "9"],
    ["scaling", RUN, "--gb-per-s", "300", "-k", "train"],
    ["history", "--results", HISTORY],
    ["doctor", "--quick"],
    pytest.param(["model", "--size", "512x512"], marks=pytest.mark.slow),
    pytest.param(["model", "--fused"], marks=pytest.mark.slow),
    pytest.param(["ceilings"], marks=pytest.mark.slow),
]
ESCAPE = "\x1b"
CELL = re.compile(r"\S+(?: \S+)*")
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]\d+)?( ?%|×)?")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("printed")


@pytest.fixture
def told(header: Header, make_record: MakeRecord, places: Path) -> Callable[..., str]:
    """What a command prints: into a pipe, or onto a terminal of so many columns."""
    files = _files(header, make_record, places)

    def run(arguments: Sequence[str], columns: int | None = None, **variables: str) -> str:
        words = [files.get(word, word) for word in arguments]
        kept = {
            name: value
            for name, value in Bench(places, places).variables.items()
            if name not in {"COLUMNS", "NO_COLOR"}
        }
        command = [sys.executable, "-m", "bench", *words]
        return printed(command, columns, {**kept, "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm-256color", **variables})

    return run


def _files(header: Header, make_record: MakeRecord, places: Path) -> dict[str, str]:
    """A run of everything, and nine runs of a machine that became slower."""
    found = sorted((places / "run").glob("*/*.jsonl"))
    if not found:
        made = gpus(header, make_record)
        file = RunFile.create(made.header, places / "run")
        for one in made.records:
            file.append(one)
        found = [file.path]
        for day, speed in enumerate([100.0, 101, 99, 100, 101, 100, 90, 91, 89]):
            env = header.environment
            later = msgspec.structs.replace(env, time=env.time + timedelta(days=day), commit=f"{day:040x}")
            file = RunFile.create(msgspec.structs.replace(header, environment=later), places / "history")
            file.append(record(make_record, Case(), float(speed)))
    return {RUN: str(found[0]), HISTORY: str(places / "history")}


def printed(command: Sequence[str], columns: int | None, variables: dict[str, str]) -> str:
    if columns is None:
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False).stdout
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs)
        parts = []
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while part := os.read(ours, 65_536):
                parts.append(part)
        os.close(ours)
    assert process.returncode in {0, 3, 4}
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_pipe_gets_plain_text_whole_rows_and_figures_to_the_right(
    told: Callable[..., str], arguments: list[str]
) -> None:
    text = told(arguments)
    assert ESCAPE not in text
    assert text.strip()
    ends: set[int] = set()
    for line in text.splitlines():
        cells = list(CELL.finditer(line))
        figures = {cell.end() for cell in cells if NUMBER.fullmatch(cell.group())}
        if len(cells) > 1 and not figures:  # headings, or a row of words that stand where figures would
            ends = {cell.end() for cell in cells}
        elif len(cells) > 1:
            assert figures <= ends, line


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_narrow_terminal_gets_lines_that_fit_and_with_no_color_no_escape_code(
    told: Callable[..., str], arguments: list[str]
) -> None:
    text = told(arguments, 80, NO_COLOR="1")
    assert ESCAPE not in text
    assert text.strip()
    # A command stays whole, to be copied.
    assert [line for line in text.splitlines() if len(line.rstrip()) > 80 and "python -m " not in line] == []


def test_a_terminal_may_be_coloured_and_a_pipe_takes_the_width_it_is_told(told: Callable[..., str]) -> None:
    assert ESCAPE in told(["report", RUN], 200)
    assert max(map(len, told(["list", "--axes"], COLUMNS="80").splitlines())) <= 80
    assert max(map(len, told(["list", "--axes"]).splitlines())) > 200


@pytest.mark.slow
def test_the_table_after_a_run_fits_its_terminal_too(bench: Bench) -> None:
    command = bench.command(Case(**TINY), options=("-p", "no:cacheprovider"))  # type: ignore[arg-type]
    variables = {name: value for name, value in bench.variables.items() if name != "COLUMNS"}
    text = printed(command, 80, {**variables, "TERM": "xterm-256color", "NO_COLOR": "1"})
    table = text[text.index("infer · batch 1") : text.index("saved: ")]
    assert ESCAPE not in table
    assert "1.00×" in table
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
    text = printed(command, 200, {**variables, "TERM": "xterm-256color"})
    assert f"{ESCAPE}[1m" in text[text.index("infer · batch 1") :]


def drawn(width: int, headings: Sequence[str], rows: Sequence[Sequence[str]], **options: object) -> list[str]:
    out = io.StringIO()
    print_table(Console(file=out, width=width), headings, rows, **options)  # type: ignore[arg-type]
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_what_is_too_wide_gives_way_in_order_headings_then_columns_then_labels() -> None:
    headings = ("case", "a heading of words", "to spare")
    rows = [("infer-eager-fp32-b1-256x256", "1,234", "5")]
    assert drawn(60, headings, rows, labels=1, dispensable=("to spare",)) == [
        "case                         a heading of words  to spare",
        "infer-eager-fp32-b1-256x256               1,234         5",
    ]
    assert drawn(48, headings, rows, labels=1, dispensable=("to spare",)) == [
        "                             a heading",
        "case                          of words  to spare",
        "infer-eager-fp32-b1-256x256      1,234         5",
    ]
    assert drawn(40, headings, rows, labels=1, dispensable=("to spare",)) == [
        "                             a heading",
        "case                          of words",
        "infer-eager-fp32-b1-256x256      1,234",
    ]
    folded = drawn(26, headings, rows, labels=1, dispensable=("to spare",))
    assert [line.split() for line in folded[-2:]] == [["infer-eager-fp32-", "1,234"], ["b1-256x256"]]


def test_a_figure_is_never_cut_off() -> None:
    assert "1,234,567" in " ".join(drawn(5, ("case", "figure"), [("infer-eager", "1,234,567")], labels=1))


@pytest.mark.parametrize(("text", "lines"), [("  one two three", 2), ("  python -m bench list --axes", 1)])
def test_prose_is_parted_between_words_and_a_command_never(text: str, lines: int) -> None:
    out = io.StringIO()
    print_text(Console(file=out, width=12, force_terminal=True, color_system=None), text)
    found = out.getvalue().splitlines()
    assert len(found) == lines
    assert all(line.startswith("    ") for line in found[1:])


def test_no_color_and_a_file_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    print_text(console(out, terminal=True), "bold", "bold red")
    assert out.getvalue() == "bold\n"


HOSTILE = "a \x1b[31mred\x1b]0;title\x07[bold]x[/] [/none]\x9b2J\u202e\rb"
HARMLESS = "a �[31mred�]0;title�[bold]x[/] [/none]�2J��b"


def test_text_of_anybodys_file_moves_and_colours_no_terminal() -> None:
    out = io.StringIO()
    on = Console(file=out, width=200, force_terminal=True, color_system=None)
    print_text(on, HOSTILE)
    print_table(on, ("case", HOSTILE), [(HOSTILE, "1")], labels=1)
    text, _, row = out.getvalue().splitlines()
    assert text == HARMLESS
    assert row.startswith(HARMLESS)
    assert "\x1b" not in out.getvalue()


def test_no_line_of_a_table_ends_in_blanks() -> None:
    out = io.StringIO()
    rows = [("a", "short"), ("a", ""), ("b", "a long one\nin two lines")]
    print_table(Console(file=out, width=200), ("case", "words that say"), rows, labels=2)
    lines = out.getvalue().splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert lines[-2:] == ["b     a long one", "      in two lines"]
