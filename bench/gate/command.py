"""`python -m bench gate`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import UsageError

ANNOTATED = 10


def gate(  # noqa: PLR0913, PLR0917 (one argument an option)
    base: Annotated[str, typer.Option(metavar="REF", help="Commit to compare with, such as origin/main or HEAD^1.")],
    head: Annotated[
        str | None, typer.Option(metavar="REF", help="Commit to judge; the working tree, as it is, if left out.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Which cases; `ci` fits into ten minutes on two cores.")] = "ci",
    case: Annotated[list[str], typer.Option(metavar="ID", help="This case instead of a preset; may be repeated.")] = [],  # noqa: B006
    trials: Annotated[int, typer.Option(min=2, max=1000, help="Trials of a case in the first pass, at least.")] = 4,
    budget: Annotated[str, typer.Option(metavar="SECONDS", help="Until when trials are added.")] = "600",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report with every sample.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report for a comment.")] = None,
    load: Annotated[
        list[str], typer.Option(metavar="MODULE", help="A module that registers more implementations.")
    ] = [],  # noqa: B006
    strict: Annotated[bool, typer.Option("--strict", help="Inconclusive rows do not pass either: status 4.")] = False,  # noqa: FBT002
    kernels: Annotated[bool, typer.Option(help="Compare what the compiler makes of the Triton kernels.")] = True,  # noqa: FBT002
    annotate: Annotated[bool, typer.Option("--annotate", help="Say failures as GitHub annotations too.")] = False,  # noqa: FBT002
) -> None:
    """Measure base and head in one job, interleaved, and fail only on evidence.

    The first pass and the confirming pass are never cut short; --budget bounds the trials that are added for rows that
    are still inconclusive. Memory, FLOPs, graphs and the kernels' compiled resources are compared without statistics.

    Exit status: 0 fine, 1 regression, 2 usage or an expired mute, 3 missing or broken or inaccurate, 4 base differs
    from itself, or an unfit machine (or, with --strict, inconclusive), 5 nothing to compare.
    """
    from bench.gate.decision import Rule
    from bench.gate.driver import Gate
    from bench.gate.screening import Options
    from bench.gate.tell import Teller
    from bench.options import seconds
    from bench.report.terminal import console, error_console

    options = Options(
        base=base,
        head=head,
        preset=preset,
        chosen=tuple(case),
        load=tuple(load),
        rule=Rule(fewest=trials, most=max(4 * trials, Rule().most)),
        budget_s=seconds("--budget", budget),
        strict=strict,
        kernels=kernels,
    )
    for file in (json, markdown):
        _writable(file)
    if head is None and not load:  # another head, or a loaded module, may know what this program does not
        _known(preset, case)
    report = Gate(options, Teller(error_console())).run()

    import msgspec

    from bench.gate import markdown as form
    from bench.gate.terminal import show

    if json is not None:
        json.write_bytes(msgspec.json.encode(report) + b"\n")
    if markdown is not None:
        markdown.write_text(form.markdown(report), encoding="utf-8")
    show(report, console())
    if annotate:
        for row in [*report.regressions, *report.broken][:ANNOTATED]:  # GitHub shows ten of a step
            typer.echo(f"::error title=Performance gate::{form.one_row(row)}")
    raise typer.Exit(report.status)


def _known(preset: str, ids: list[str]) -> None:
    from bench.case import parse_id
    from bench.matrix import cases_of

    cases_of(preset)
    for text in ids:
        parse_id(text)


def _writable(file: Path | None) -> None:
    """Say before ten minutes of measuring that their result could not be written."""
    if file is not None and not (file.parent.is_dir() and os.access(file.parent, os.W_OK) and not file.is_dir()):
        raise UsageError(f"{file}: cannot write a report there: the folder must exist, and the name be a file's")


def calibrate(
    into: Annotated[Path | None, typer.Option(metavar="FILE", help="Replace the table in a Markdown file.")] = None,
    draw: Annotated[bool, typer.Option(help="Draw the gates anew; else the recorded ones are shown.")] = True,  # noqa: FBT002
) -> None:
    """Show how often the gate errs: 1,000 drawn gates for each noise and budget, and the real ones recorded here.

    Writes results/gate/simulated.json; the draws are the same every time. Real gates take half an hour of a machine:
    `python -m tests.bench.real_gates` runs and records them.
    """
    from bench.gate import rates, simulation
    from bench.report.terminal import error_console

    if into is not None:
        rates.around(into)  # before two minutes of drawing
    if draw:
        import msgspec

        console = error_console()
        wanted = [(budget, noise) for budget in simulation.BUDGETS_S for noise in simulation.NOISES]
        drawn = []
        for number, (budget, noise) in enumerate(wanted, start=1):
            console.print(f"{number}/{len(wanted)}: noise {noise:.1%}, budget {budget:.0f} s, about 15 s each")
            drawn.append(simulation.simulate(noise, budget_s=budget))
        rates.FOLDER.mkdir(parents=True, exist_ok=True)
        (rates.FOLDER / rates.SIMULATED).write_bytes(msgspec.json.format(msgspec.json.encode(drawn), indent=1) + b"\n")
    text = rates.table(*rates.read())
    if into is None:
        typer.echo(text)
    else:
        rates.insert(into, text)
