"""`python -m bench campaign`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import UsageError
from bench.processes import Progress

FAILED = 3
UNFINISHED = 4
TOLD_S = 30.0


def campaign(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes; also what to go on with.")],
    steps: Annotated[str, typer.Option(metavar="A,B", help="Only these steps, in their own order.")] = "",
    minutes: Annotated[float, typer.Option(help="Longest that this run takes in all.")] = 9.0,
    toy: Annotated[bool, typer.Option("--toy", help="Tiny networks, on a CPU if need be: that the way works.")] = False,  # noqa: FBT002
) -> None:
    """Test, measure and tune everything on the GPU here, in runs of a few minutes: the same command goes on.

    Steps: tests, ceilings, layers, tune, network, training, compiled, fused_layers, page. A step that has ended is not
    done again; to repeat it remove DIR/<step>. DIR/summary.md says what was found, DIR.tar.gz is one file to send.

    Exit status: 0 fine, 2 usage, 3 a step failed, 4 unfinished: give the command again.
    """
    from bench.campaign import summary
    from bench.campaign.conductor import RESERVE_S, Conductor, last
    from bench.campaign.steps import steps as all_steps
    from bench.environment import environment
    from bench.installed import missing

    if not RESERVE_S < minutes * 60 < float("inf"):
        raise UsageError(f"--minutes {minutes:g}: expected a number above {RESERVE_S / 60:.2g}, to end in order")
    end = time.monotonic() + minutes * 60
    env, lacking = environment(), missing("test")
    everything = all_steps(env.machine, toy=toy)
    names = steps.split(",") if steps else [step.name for step in everything]
    if unknown := set(names) - {step.name for step in everything}:
        known = ", ".join(step.name for step in everything)
        raise UsageError(f"--steps {','.join(sorted(unknown))}: no such step; there are: {known}")
    if lacking:
        typer.echo(f"missing packages: {', '.join(lacking)}: steps that need them will fail; carry them as wheels")
    chosen = [step for step in everything if step.name in names]
    folder = out.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be a folder ({error.strerror})") from error
    try:
        Conductor(folder, env.machine, end - time.monotonic()).run(chosen, typer.echo, _progress)
    finally:
        summary.write(folder, everything, env, lacking)
        typer.echo(f"{folder / 'summary.md'}\n{summary.pack(folder)}: send this file")
    statuses = {outcome.status for step in chosen if (outcome := last(folder, step)) is not None}
    if statuses & {"failed", "timeout"}:
        raise typer.Exit(FAILED)
    if "unfinished" in statuses:
        typer.echo("unfinished: the same command goes on")
        raise typer.Exit(UNFINISHED)


def _progress() -> Progress:
    """Every half minute how long it has been."""
    told = TOLD_S

    def tell(_: str, seconds: float) -> None:
        nonlocal told
        if seconds >= told:
            told += TOLD_S
            typer.echo(f"  {seconds:.0f} s", err=True)

    return tell
