"""The door that reads: `python -m bench`. It measures nothing; `pytest bench` does. Readers import no torch."""

import io
import os
import signal
import sys
from typing import Annotated

import msgspec
import typer

from bench import builders, drivers
from bench.campaign.command import campaign
from bench.errors import UsageError
from bench.export.command import export
from bench.gate import command as gate_command
from bench.recommend.command import recommend
from bench.report import command as reading
from bench.report import history as follow
from bench.report.scaling import scaling

app = typer.Typer(
    name="bench",
    help="Read what `pytest bench` measured, and see what it would measure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
USAGE = 2

Load = Annotated[list[str], typer.Option(metavar="MODULE", help="A module that registers more implementations.")]


@app.callback()
def _root() -> None:
    """Keep the commands named, however few they are."""


@app.command(
    "list", epilog="Examples:  python -m bench list --preset full --axis batch=1,8 | python -m bench list --json"
)
def list_(
    preset: Annotated[str, typer.Option(help="smoke, quick, full, ci or h200.")] = "quick",
    axis: Annotated[list[str], typer.Option(metavar="NAME=A,B", help="Replace an axis of the preset.")] = [],  # noqa: B006
    load: Load = [],  # noqa: B006
    axes: Annotated[bool, typer.Option("--axes", help="Print the axes and their values instead.")] = False,  # noqa: FBT002
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,  # noqa: FBT002
) -> None:
    """Print the cases of a preset, and which this machine does not support and why."""
    from bench import implementations, matrix
    from bench.case import AXES, allowed, parse_axes
    from bench.machine import machine
    from bench.report.table import counted
    from bench.report.terminal import console, print_json, print_table
    from bench.support import unsupported

    implementations.load(load)
    if axes:
        every = [(name, axis.help, allowed(name)) for name, axis in AXES.items()]
        print_table(console(), ("axis", "what it is", "values"), every, labels=3)
        return
    here = machine()
    cases = matrix.cases(here, preset=preset, axes=parse_axes(axis))
    reasons = [unsupported(case, here) for case in cases]
    if json:
        for case, reason in zip(cases, reasons, strict=True):
            print_json({"id": case.id, **msgspec.structs.asdict(case), "unsupported": reason})
        return
    rows = [
        (case.id, f"unsupported: {reason}" if reason else "runs") for case, reason in zip(cases, reasons, strict=True)
    ]
    print_table(console(), ("case", "on this machine"), rows, labels=2)
    left_out = sum(reason is not None for reason in reasons)
    typer.echo(f"{counted(len(cases), 'case')}, {len(cases) - left_out} supported here", err=True)


app.command(
    epilog="Examples:  python -m bench report | python -m bench report RUN RUN --html page.html | "
    "python -m bench report results/*/*.jsonl --csv - > all.csv"
)(reading.report)
app.command(epilog="Example:  python -m bench readme")(reading.readme)
app.command(epilog="Example:  python -m bench schema")(reading.schema)
app.command(
    epilog="Examples:  python -m bench recommend --max-latency-ms 150 --min-agreement 0.999 | "
    "python -m bench recommend --objective latency --percentile 90 --axis batch=1 --measure"
)(recommend)
app.command(
    epilog="Examples:  python -m bench export infer-openvino-amp_bf16-nchw-bilinear-b1-256x256-1cpu --out shipped | "
    "python -m bench export infer-onnx-fp32-nchw-transposed-b1-256x256-1cpu-w32 --weights mine.pt --out shipped"
)(export)
app.command(
    epilog="Examples:  python -m bench model --upsampling bilinear | python -m bench model --fused --fold-transposed"
)(builders.model)
app.command(epilog="Example:  python -m bench resources --target sm_90 --json")(builders.resources)
app.command(epilog="Examples:  python -m bench doctor | python -m bench doctor --quick --json")(drivers.doctor)
app.command(epilog="Example:  python -m bench ceilings --precision bf16,fp8 --json ceilings.json")(drivers.ceilings)
app.command(
    epilog="Examples:  python -m bench fit --find-max batch --axis task=train --axis devices=1gpu | "
    "python -m bench fit --find-max size --memory-mib 4000"
)(drivers.fit)
app.command(
    epilog="Examples:  python -m bench history -k compile | python -m bench history --metric images_per_s --json"
)(follow.history)
app.command(
    epilog="Examples:  python -m bench scaling | "
    "python -m bench scaling RUN --gb-per-s 300 --latency-us 5 --devices 2,8,64,512 -k train-eager"
)(scaling)
app.command(
    epilog="Examples:  python -m bench gate --base origin/main | "
    "python -m bench gate --base v1.2 --head HEAD --markdown gate.md --json gate.json --strict"
)(gate_command.gate)
app.command(epilog="Example:  python -m bench calibrate --into bench/README.md")(gate_command.calibrate)
app.command(
    epilog="Examples:  python -m bench campaign --out found | "
    "python -m bench campaign --out found --steps tests,ceilings --minutes 5"
)(campaign)
app.command(epilog="Example:  python -m bench tune --batch 16 --precision bf16,fp16")(builders.tune)


def main() -> None:
    """Run a command. Exit status 0 fine, 2 usage; an error is one line without a traceback."""
    # `… | head` ends this process without a word, as it ends every other.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without × and … is no reason to fail
    status: object = 0
    try:
        status = app(standalone_mode=False)
        if sys.stdout is not None:  # `>&-`
            sys.stdout.flush()
    except (UsageError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        typer.echo(f"bench: {message}", err=True)
        sys.exit(USAGE)
    except typer.Abort:
        sys.exit(130)
    except OSError as error:
        typer.echo(f"bench: {error}", err=True)
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (what could not be written is not tried again at exit)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
