"""`python -m bench export`: a configuration becomes a folder to ship."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.case import Case
    from bench.export.manifest import Measured
    from bench.results import Run
    from bench.weights import Weights


def export(
    case: Annotated[str, typer.Argument(metavar="CASE", help="Id of the case, as `recommend` names it.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make.")],
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A U-Net's checkpoint; the suite's fitted weights if not given.")
    ] = None,
    run: Annotated[
        list[Path], typer.Option(metavar="RUN", help="Run files with the case's figures; the newest if none is given.")
    ] = [],  # noqa: B006
    replace: Annotated[bool, typer.Option("--replace", help="Replace DIR if it is there.")] = False,  # noqa: FBT002
) -> None:
    """Make a folder to ship: artefact, manifest and serve.py, seen to give the right answer in a fresh process."""
    from bench import results
    from bench.case import parse_id
    from bench.machine import machine
    from bench.support import unsupported
    from bench.weights import look

    wanted = parse_id(case)
    own = look(weights) if weights is not None else None
    if own is not None:
        own.asked_for({}, [wanted])
    if not run and (newest := results.newest()) is not None:
        run = [newest]
    read = [results.read(path) for path in run]
    if (why := _not_to_be_shipped(wanted) or unsupported(wanted, machine())) is not None:
        raise UsageError(f"{wanted.id}: {why}")

    def tell(what: str) -> None:
        typer.echo(f"{what} …", err=True)

    from bench.export.bundle import SERVE, in_the_way, write
    from bench.subject import prepare_process

    if (why := in_the_way(out, replace=replace)) is not None:
        raise UsageError(why)
    measured = _measured(wanted, read, own)
    prepare_process(wanted, machine().cores)
    manifest = write(
        wanted,
        out,
        weights=own,
        weights_file=Path(own.path) if own is not None else _fitted(wanted, tell),
        measured=measured,
        replace=replace,
        tell=tell,
    )
    typer.echo(f"{out}: {', '.join([*manifest.files, 'manifest.json', SERVE])}")
    typer.echo(f"relative L2 of its logits to fp32 eager's: {manifest.rel_l2:.3g}, {manifest.tolerance:.3g} allowed")
    if measured is None:
        typer.echo(
            f"not measured yet: python -m pytest bench --case {wanted.id}"
            + (f" --weights {weights}" if weights else "")
        )
    typer.echo(f"to run it: python {out / SERVE} PICTURE.png CLASSES.png")


def _not_to_be_shipped(case: "Case") -> str | None:
    if case.task != "infer":
        return "a training step is nothing to ship; name a case of the task infer"
    if case.device_count > 1:
        return "a bundle runs in one process: export the case of one device, and serve several"
    if case.frame != "whole":
        return "a bundle takes whole images: export the case of the frame whole"
    if case.container != "unet" or case.modification != "none":
        return "a bundle is of the plain network"
    return None


def _fitted(case: "Case", tell: "Callable[[str], None]") -> Path:
    """The file of the fitted weights that the case wants, made if it is not there."""
    from bench import fitted
    from bench.subject import recipe

    wanted = recipe(case)
    if not fitted.cached(wanted):
        tell("fitting the network to a picture, once")
        fitted.fit(wanted)
    return fitted.path(wanted)


def _measured(case: "Case", runs: "list[Run]", weights: "Weights | None") -> "Measured | None":
    """What the runs say of the case with these weights; the last word counts."""
    from bench.export.manifest import Measured
    from bench.report.table import conditions

    sha256 = weights.sha256 if weights is not None else None
    found = None
    for run in runs:
        theirs = run.header.settings.weights
        if (theirs.sha256 if theirs is not None else None) != sha256:
            continue
        for record in run.records:
            if record.case == case and record.status == "ok":
                found = Measured(run=run.path.name, conditions=conditions(run), figures=record.figures)
    return found
