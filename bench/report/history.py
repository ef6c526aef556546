"""`python -m bench history`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import UsageError

if TYPE_CHECKING:
    from bench.history.series import Series
    from bench.history.steps import Step
    from bench.results import Run

BARS = "▁▂▃▄▅▆▇█"
SHOWN = 40
SERIES = ("case", "over the runs", "first", "last", "runs", "failed")
MACHINE = "MACHINE"
STEPS = ("case", "step", "commits", "first run", "change", "runs since", "p")


def history(
    results: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of all results, if not ours.")] = None,
    metric: Annotated[str, typer.Option(help="Figure to follow, as results/README.md names it.")] = "p50_ms",
    keyword: Annotated[str, typer.Option("-k", metavar="TEXT", help="Only cases and machines with TEXT in them.")] = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON object a series, with its steps.")] = False,  # noqa: FBT002
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the steps as Markdown.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Only what the newest run confirms; status 1 if worse.")] = False,  # noqa: FBT002
) -> None:
    """Follow a figure over the commits of a machine, and show where its level changed."""
    from bench.history.series import series
    from bench.history.steps import FEWEST, steps
    from bench.results import RESULTS

    results = results or RESULTS
    runs = list(_runs(results))
    found = [one for one in series(runs, metric) if keyword in f"{one.machine}/{one.case}"]
    if not found:
        known = sorted({name for run in runs for record in run.records for name in record.figures})
        raise UsageError(
            f"no run under {results} has {metric!r}{f' of a case with {keyword!r}' if keyword else ''}; "
            f"its figures are {', '.join(known) or 'none: measure with `nox -s bench`'}"
        )
    every = [
        (one, [step for step in steps(one) if not new or (step.last and step.runs_after == FEWEST)]) for one in found
    ]
    if json:
        import msgspec

        for one, mine in every:
            row = {**msgspec.to_builtins(one), "steps": [{**msgspec.to_builtins(s), "worse": s.worse} for s in mine]}
            typer.echo(msgspec.json.encode(row).decode())
    else:
        _print(every, left_out=sum(run.header.environment.dirty is not False for run in runs), only_steps=new)
    if markdown is not None:
        markdown.write_text(_markdown([step for _, mine in every for step in mine]), encoding="utf-8")
    raise typer.Exit(int(new and any(step.worse for _, mine in every for step in mine)))


def _runs(results: Path) -> Iterator["Run"]:
    from bench.results import SUFFIX, ResultsError, read

    if not results.is_dir():
        raise UsageError(f"{results}: no such folder of results")
    for path in sorted(results.glob(f"*/*{SUFFIX}")):
        try:
            yield read(path)
        except ResultsError as error:
            typer.echo(f"left out: {error}", err=True)


def _print(every: Sequence[tuple["Series", list["Step"]]], *, left_out: int, only_steps: bool) -> None:
    from bench.report.terminal import console, print_table, print_text

    on = console()
    for machine in dict.fromkeys(one.machine for one, _ in every):
        here = [(one, mine) for one, mine in every if one.machine == machine and (mine or not only_steps)]
        print_text(on, f"{machine} · {every[0][0].metric}", "bold")
        if here:
            print_table(on, SERIES, [_row(one) for one, _ in here], labels=2, dispensable=("failed",))
        for one, _ in here:
            for stretch in one.stretches[1:]:
                since = f"from {stretch.points[0].run} on not comparable with before: {stretch.changed}"
                print_text(on, f"  {one.case}: {since}", "dim")
        steps = [_step(step) for _, mine in here for step in mine]
        if steps:
            on.print()
            print_table(on, STEPS, steps, labels=4, dispensable=("first run", "p"))
            for line in _meaning([step for _, mine in here for step in mine]):
                print_text(on, line, "dim")
        on.print()
    if left_out:
        typer.echo(f"{left_out} runs of changed sources (-dirty) do not count", err=True)


def _row(one: "Series") -> tuple[str, ...]:
    from bench.report.table import three_digits

    values = [point.value for stretch in one.stretches for point in stretch.points]
    first, last = (three_digits(value) for value in (values[:1] + values[-1:] or (None, None)))
    return one.case, _sparks(one), first, last, str(len(values)), str(one.failed)


def _step(step: "Step") -> tuple[str, ...]:
    change = f"{step.change * 100:+.1f} %"
    return step.case, _sign(step), step.commits, step.after.run, change, str(step.runs_after), f"{step.p:.2g}"


def _sparks(one: "Series") -> str:
    """The newest points as bars from the lowest to the highest; `|` where conditions changed."""
    values = [point.value for stretch in one.stretches for point in stretch.points][-SHOWN:]
    if not values:
        return ""
    low, high = min(values), max(values)
    bars = [BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[3] for value in values]
    behind = 0
    for stretch in one.stretches[:0:-1]:
        behind += len(stretch.points)
        if behind < len(values):
            bars[-behind] = "|" + bars[-behind]
    return "".join(bars)


def _sign(step: "Step") -> str:
    return MACHINE if step.machine_change is not None else "WORSE" if step.worse else "BETTER"


def _meaning(steps: Sequence["Step"]) -> list[str]:
    """What `MACHINE` means, where it stands."""
    found = [step.machine_change for step in steps if step.machine_change is not None]
    if not found:
        return []
    most = max(found, key=abs)
    return [
        f"{MACHINE}: its own best, a large product or copy, changed as much ({most * 100:+.0f} %); not the commits."
    ]


def _markdown(steps: Sequence["Step"]) -> str:
    if not steps:
        return "No step.\n"
    lines = ["| | machine | case | metric | change | commits | runs since | p |", "|:--|:--|:--|:--|--:|:--|--:|--:|"]
    lines += [
        f"| {_sign(step)} | {step.machine} | `{step.case}` | {step.metric} | {step.change * 100:+.1f} % "
        f"| `{step.commits}` | {step.runs_after} | {step.p:.2g} |"
        for step in steps
    ]
    lines += [f"\n{line}" for line in _meaning(steps)]
    lines += ["", "What came with them: " + ", ".join(f"`git log {one}`" for one in {s.commits: s for s in steps}), ""]
    return "\n".join(lines)
