"""`python -m bench report`: what was measured, on the terminal or as a file. Imports no torch."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import UsageError

if TYPE_CHECKING:
    from bench import results

STDOUT = Path("-")


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="[RUN]...", help="Run files; the newest if none is given.")
    ] = [],  # noqa: B006
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One page with charts and every case; it needs no network.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="The tables in Markdown.")] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A row a record, a column an axis or a figure.")
    ] = None,
    tracking: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON for services that track benchmarks.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Every chart of every scene as a picture.")] = None,
    gate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Verdicts to show on the page: `bench gate --json FILE`.")
    ] = None,
) -> None:
    """Print the tables of a run again, or write them, the page and the pictures; FILE may be - for standard output."""
    from bench import results

    if gate is not None and html is None:
        raise UsageError("--gate shows verdicts on the page: give --html FILE as well")
    forms = ((markdown, _markdown), (csv, _csv), (tracking, _tracked), (html, lambda runs: _page(runs, gate)))
    if [path for path, _ in forms].count(STDOUT) > 1:
        raise UsageError("two forms would run into each other on standard output: give a FILE to all but one")
    read = [results.read(path) for path in runs or newest()]
    for path, form in forms:
        if path is not None:
            _write(path, form(read))
    if png is not None:
        typer.echo(f"{png}: {_pictures(read, png)} pictures", err=True)
    if markdown is csv is tracking is html is png is None:
        from bench.report.terminal import console, show

        for run in read:
            show(run, console())


def newest() -> list[Path]:
    """The run file begun last.

    Raises:
        UsageError: there is none.
    """
    from bench import results

    found = results.newest()
    if found is None:
        raise UsageError(f"no run under {results.RESULTS}: measure one with `nox -s bench`")
    return [found]


def _write(path: Path, text: str) -> None:
    if path == STDOUT:
        sys.stdout.write(text)
        return
    path.write_text(text, encoding="utf-8")
    typer.echo(f"{path}: {len(text.encode()) / 1000:,.0f} kB", err=True)


def _markdown(runs: list["results.Run"]) -> str:
    from bench.report import table

    return "\n".join(table.markdown(run) for run in runs)


def _csv(runs: list["results.Run"]) -> str:
    from bench import results

    return str(results.frame(runs).to_csv(index=False))


def _tracked(runs: list["results.Run"]) -> str:
    import msgspec

    from bench.formats import tracked

    values = [value for run in runs for value in tracked(run)]
    return msgspec.json.format(msgspec.json.encode(values), indent=1).decode() + "\n"


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """What draws is an extra; say so where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"drawing needs {error.name}: install the extra, `pip install -e '.[report]'`") from error


def _page(runs: list["results.Run"], gate: Path | None) -> str:
    with _extra():
        from bench.report import page, verdicts
    judged = None if gate is None else verdicts.read(gate)
    typer.echo("drawing, about 5 s …", err=True)
    return page.html(runs, judged)


def _pictures(runs: list["results.Run"], folder: Path) -> int:
    with _extra():
        from bench.report import pictures
    return pictures.save(runs, folder)


def readme() -> None:
    """Write the generated parts of the READMEs again: pictures, tables, outputs of commands."""
    with _extra():
        from bench.report import readme
    for path in readme.write():
        typer.echo(path.name)


def schema() -> None:
    """Print the schema of a run file in Markdown, from the types and the metrics. Imports torch."""
    from bench.report import schema

    sys.stdout.write(schema.markdown())
