"""The commands that start processes and read what they find: this one imports no torch."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer

from bench.errors import UsageError

if TYPE_CHECKING:
    from bench.results import Record

UNFIT = 4
TOLD_S = 5.0

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Only look; measure nothing.")] = False,  # noqa: FBT002
    json: Json = False,  # noqa: FBT002
) -> None:
    """Say what this machine is fit for, what to mend, and how large a difference must be to be one.

    Looks at versions, compilers, GPUs (driver, clocks, power cap, MIG, other processes), load and disks, and measures
    one tiny case again and again for about a minute. Exit status 4 if something is bad.
    """
    from bench import noise
    from bench.doctor import findings
    from bench.environment import environment
    from bench.report.terminal import console, print_json, print_table
    from bench.runner import Runner

    env = environment()
    found = list(findings(env.machine, env.load_average[0]))
    measured = None
    if not quick:
        runner = Runner(env, noise.SETTINGS)
        start = time.monotonic()

        def tell(text: str) -> None:
            if os.isatty(2):
                typer.echo(text, nl=False, err=True)

        def measure() -> "Record":
            tell(f"\rmeasuring the noise: {time.monotonic() - start:.0f} s of about 60")
            return runner.run(noise.CASE)

        measured = noise.noise(measure, time.monotonic)
        tell("\n")
        found.append(noise.about(measured))
    if json:
        print_json({"findings": found, "noise": measured})
    else:
        rows = [(one.level, f"{one.what}\n→ {one.advice}" if one.advice else one.what) for one in found]
        print_table(console(), ("", "this machine"), rows, labels=2, grouped=False)
    if any(one.level == "bad" for one in found):
        raise typer.Exit(UNFIT)


def ceilings(
    precision: Annotated[
        str, typer.Option(metavar="A,B", help="fp32, tf32, bf16, fp16, fp8; all that the device multiplies otherwise.")
    ] = "",
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write them as JSON too.")] = None,
) -> None:
    """Measure what the device does at its best: a large copy, and a large matrix product in each precision.

    On the first GPU, or on the CPU with all cores where there is none.
    """
    from bench.ceilings import Request
    from bench.environment import environment
    from bench.machine import usable_gpus
    from bench.report.table import three_digits
    from bench.report.terminal import console, print_table, print_text
    from bench.results import Settings
    from bench.runner import Runner

    env = environment()
    on_gpu = bool(usable_gpus(env.machine))
    known = ("fp32", "tf32", "bf16", "fp16", "fp8") if on_gpu else ("fp32", "bf16")
    wanted = tuple(precision.split(",")) if precision else known
    if not set(wanted) <= set(known):
        raise UsageError(f"--precision {precision}: allowed on this device: {', '.join(known)}")
    threads = 0 if on_gpu else env.machine.cores
    request = Request(device="gpu" if on_gpu else "cpu", threads=threads, precisions=wanted)
    found = Runner(env, Settings()).ceilings_of(request)
    rates = [("copy, GB/s", three_digits(found[0].gb_per_s))] if found else []
    rates += [(f"product in {one.precision}, TFLOP/s", three_digits(one.tflop_per_s)) for one in found]
    left_out = [name for name in wanted if name not in {one.precision for one in found}]
    rates += [(f"product in {name}, TFLOP/s", "unsupported") for name in left_out]
    on = console()
    print_table(on, (f"at best, {request.device}", "rate"), rates, labels=1)
    if left_out:
        print_text(on, "  unsupported: this device does not multiply it", "dim")
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))


def fit(
    find_max: Annotated[Literal["batch", "size"], typer.Option(help="What to make as large as possible.")] = "batch",
    case: Annotated[str, typer.Option(metavar="ID", help="The case to begin from; the default one otherwise.")] = "",
    axis: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Replace an axis of it.")] = [],  # noqa: B006
    memory_mib: Annotated[int, typer.Option(min=0, help="Memory it may take; 0: all that is free.")] = 0,
    time_limit_s: Annotated[float, typer.Option(min=1, help="Longest a try may take, seconds.")] = 600.0,
    load: Annotated[list[str], typer.Option(metavar="MODULE", help="A module with more implementations.")] = [],  # noqa: B006
    json: Json = False,  # noqa: FBT002
) -> None:
    """Find the largest batch, or the largest square image, that fits a device or a memory limit.

    Every try is a process of its own that takes two steps: by the second, optimizer and gradients are there. On a CPU
    the limit is on the data of the process, on a GPU on what its allocator may hold.
    """
    from bench import implementations
    from bench.case import Case, parse_axes, parse_id, vary
    from bench.environment import environment
    from bench.largest import Try, largest
    from bench.matrix import completed
    from bench.report.table import one_line
    from bench.report.terminal import print_json
    from bench.results import Settings
    from bench.runner import Runner

    implementations.load(load)
    env = environment()
    chosen = vary([parse_id(case) if case else Case()], completed(parse_axes(axis), env.machine))
    if len(chosen) > 1:
        raise UsageError(f"--axis {' '.join(axis)}: {len(chosen)} cases; expected one value an axis")
    runner = Runner(env, Settings(load=tuple(load), time_limit_s=time_limit_s))

    def tell(one: Try) -> None:
        why = f": {one_line(one.outcome.reason)}" if one.outcome.reason else ""
        typer.echo(f"{find_max} {one.number}: {one.outcome.status}{why}", err=True)

    def progress(phase: str, seconds: float) -> None:
        if os.isatty(2) and seconds > TOLD_S:
            typer.echo(f"\r{phase} {seconds:.0f} s\033[K\r", nl=False, err=True)

    found = largest(chosen[0], find_max, lambda one: runner.fits(one, memory_mib, progress), tell)
    if json:
        print_json({**found._asdict(), "tries": [one._asdict() for one in found.tries]})
    elif found.number:
        end = "the next one runs out of memory" if found.bounded else f"not known to be the limit: {found.why}"
        typer.echo(f"largest {find_max}: {found.number} ({end})")
    else:
        typer.echo(f"no {find_max} fits: {one_line(found.tries[0].outcome.reason)}")
    if not found.number:
        raise typer.Exit(3)
