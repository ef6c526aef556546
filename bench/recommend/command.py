"""`python -m bench recommend`: from run files and limits to the answer. Imports no torch: what measures is a child."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from bench.errors import UsageError
from bench.statistics import ENOUGH

if TYPE_CHECKING:
    from bench.recommend.limits import Limits

NOTHING_FITS = 3


def recommend(  # noqa: PLR0913, PLR0917 (an option each, as typer reads them)
    runs: Annotated[
        list[Path], typer.Argument(metavar="[RUN]...", help="Run files; the newest if none is given.")
    ] = [],  # noqa: B006
    max_latency_ms: Annotated[float | None, typer.Option(help="Longest step, at --percentile.")] = None,
    percentile: Annotated[int, typer.Option(help="Of a step's duration: 10, 50, 90 or 99.")] = 50,
    max_memory_mib: Annotated[float | None, typer.Option(help="Most memory of a process, as measured.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of pixels with fp32 eager's class.")] = None,
    max_joules: Annotated[float | None, typer.Option(help="Most energy an image.")] = None,
    objective: Annotated[str, typer.Option(help="throughput, latency, memory or energy.")] = "throughput",
    task: Annotated[str, typer.Option(help="infer or train.")] = "infer",
    size: Annotated[str | None, typer.Option(help="Only this image size, such as 512x512.")] = None,
    axis: Annotated[list[str], typer.Option(metavar="NAME=A,B", help="Only these values of an axis.")] = [],  # noqa: B006
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Only runs with this checkpoint.")] = None,
    load: Annotated[list[str], typer.Option(metavar="MODULE", help="A module that registers implementations.")] = [],  # noqa: B006
    measure: Annotated[bool, typer.Option("--measure", help="First measure what the runs lack, and save it.")] = False,  # noqa: FBT002
    measure_s: Annotated[
        str, typer.Option(metavar="SECONDS", help="With --measure: seconds of timed steps a case.")
    ] = "5",
    into: Annotated[Path | None, typer.Option("--results", metavar="DIR", help="Folder of results.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a question.")] = False,  # noqa: FBT002
) -> None:
    """Say which configuration to deploy, why the others lost, and how sure that is.

    A question is a machine, a network, a task and an image size; each that the runs speak of is answered by itself,
    for exactly what was measured. More runs of the same sources make the answer surer: a process is a sample.
    Exit status 3: no case keeps every limit.
    """
    from bench import implementations, results
    from bench.case import parse_axes
    from bench.options import seconds
    from bench.recommend import answer, say
    from bench.report.terminal import console, print_json
    from bench.weights import digest, look

    limits = _limits(
        max_latency_ms=max_latency_ms,
        percentile=percentile,
        max_memory_mib=max_memory_mib,
        min_agreement=min_agreement,
        max_joules=max_joules,
        objective=objective,
    )
    timed_s = seconds("--measure-s", measure_s)
    folder = into or results.RESULTS
    implementations.load(load)
    axes = parse_axes([*axis, f"task={task}", *([f"size={size}"] if size else [])])
    sha256 = digest(weights) if weights is not None else None
    if not runs and (newest := results.newest(folder)) is not None:
        runs = [newest]
    found = answer.answers([results.read(path) for path in runs], limits, axes=axes, weights=sha256)
    if measure:
        own = look(weights) if weights is not None else None
        settings = results.Settings(load=tuple(load), weights=own, measure_s=timed_s)
        new = answer.measure(found, console(sys.stderr), axes=axes, settings=settings, results=folder)
        runs = [*runs, new.path] if new is not None else runs
        found = answer.answers([results.read(path) for path in runs], limits, axes=axes, weights=sha256)
    if not found:
        said = ", ".join(f"{name}={','.join(map(str, values))}" for name, values in axes.items())
        raise UsageError(
            f"no record of {said}{' with these weights' if sha256 else ''} in {', '.join(map(str, runs)) or folder}"
            + (", and this machine supports none" if measure else ": measure with `nox -s bench`, or add --measure")
        )
    for one in found:
        if json:
            print_json(one)
        else:
            say.say(one, console())
    raise typer.Exit(0 if all(one.decision.winner is not None for one in found) else NOTHING_FITS)


def _limits(**given: float | str | None) -> "Limits":
    from bench.recommend.limits import Limits

    objectives = ("throughput", "latency", "memory", "energy")
    if given["objective"] not in objectives:
        raise UsageError(f"--objective {given['objective']}: allowed: {', '.join(objectives)}")
    if given["percentile"] not in ENOUGH:
        raise UsageError(f"--percentile {given['percentile']}: allowed: {', '.join(map(str, ENOUGH))}")
    for name, value in given.items():
        if isinstance(value, float) and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
    share = given["min_agreement"]
    if isinstance(share, float) and share > 1:
        raise UsageError(f"--min-agreement {share:g}: expected a share, 1 at most")
    return msgspec.convert(given, Limits)
