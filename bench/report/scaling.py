"""`python -m bench scaling`: what several devices lost, measured; what more of them would reach, predicted."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import UsageError

if TYPE_CHECKING:
    from bench.results import Record, Run
    from bench.ring import Interconnect, Prediction, Step

MEASURED = {
    "images_per_s": "img/s",
    "scaling_efficiency": "efficiency",
    "lost_to_compute": "lost to compute",
    "lost_to_imbalance": "imbalance",
    "lost_to_allreduce": "all-reduce",
    "data_ms": "data ms",
    "gradient_mib": "gradients MiB",
    "allreduce_ms": "all-reduce ms",
    "allreduce_gb_s": "GB/s",
}
# Left out first where the terminal is narrow.
DISPENSABLE = ("gradients MiB", "data ms", "all-reduce ms", "GB/s")
SHARES = ("scaling_efficiency", "lost_to_compute", "lost_to_imbalance", "lost_to_allreduce")
HEADINGS = ("", "devices", "img/s", "efficiency", "step ms", "all-reduce ms", "exposed ms")


def scaling(
    runs: Annotated[
        list[Path], typer.Argument(metavar="[RUN]...", help="Run files; the newest if none is given.")
    ] = [],  # noqa: B006
    gb_per_s: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of the ring's slowest link, one direction; then predict.")
    ] = None,
    latency_us: Annotated[float, typer.Option(metavar="US", help="Of a message to the next device.")] = 0.0,
    overlap: Annotated[  # noqa: FBT002
        bool, typer.Option("--overlap/--no-overlap", help="Exchange during the backward pass, or after it (CPUs).")
    ] = True,
    devices: Annotated[str, typer.Option(metavar="N,N", help="Numbers of devices.")] = "2,4,8,16,32,64,128,256,512",
    keyword: Annotated[str, typer.Option("-k", metavar="TEXT", help="Only cases with TEXT in their id.")] = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON object a row, `kind` measured or predicted.")] = False,  # noqa: FBT002
) -> None:
    """Show where the time of several devices goes, and predict more of them from one and a stated interconnect."""
    from bench import results
    from bench.report.command import newest
    from bench.ring import predict

    numbers = _numbers(devices)
    interconnect = _interconnect(gb_per_s, latency_us, overlap=overlap)
    read = [results.read(path) for path in runs or newest()]
    found = [(run, record) for run in read for record in run.records if _wanted(record, keyword)]
    many = [(run, record) for run, record in found if record.case.device_count > 1]
    one = [(run, record, step) for run, record in found if (step := _step(record)) is not None]
    if not many and not (one and interconnect):
        where = ", ".join(run.path.name for run in read)
        raise UsageError(f"{where}: {_nothing(keyword, known=bool(one), asked=interconnect is not None)}")
    predicted = [
        (run, record, [predict(step, number, interconnect) for number in numbers] if interconnect else [])
        for run, record, step in one
    ]
    if json:
        _print_json(many, predicted, interconnect)
    else:
        _print(many, predicted, interconnect)


def _numbers(devices: str) -> list[int]:
    parts = devices.split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,5}", part) and int(part) > 1 for part in parts):
        raise UsageError(f"--devices {devices!r}: expected whole numbers from 2, such as 2,8,64")
    return [int(part) for part in parts]


def _interconnect(gb_per_s: float | None, latency_us: float, *, overlap: bool) -> "Interconnect | None":
    from bench.ring import Interconnect

    if gb_per_s is None:
        return None
    if not (0 < gb_per_s < float("inf") and 0 <= latency_us < float("inf")):
        raise UsageError(f"--gb-per-s {gb_per_s:g} --latency-us {latency_us:g}: expected more than 0, and 0 or more")
    return Interconnect(gb_per_s=gb_per_s, latency_us=latency_us, overlap=overlap)


def _wanted(record: "Record", keyword: str) -> bool:
    return record.status == "ok" and record.case.task == "train" and keyword in record.case.id


def _step(record: "Record") -> "Step | None":
    """What a prediction begins from, if this is a record of one device that has it all."""
    from bench.ring import Step

    found = [record.figures.get(name) for name in ("p50_ms", "backward_ms", "gradient_mib")]
    known = [float(figure) for figure in found if isinstance(figure, int | float) and figure > 0]
    if record.case.device_count > 1 or len(known) < len(found):
        return None
    step_ms, backward_ms, gradient_mib = known
    return Step(step_ms=step_ms, backward_ms=backward_ms, gradient_mib=gradient_mib, images=record.case.images)


def _nothing(keyword: str, *, known: bool, asked: bool) -> str:
    named = f" with {keyword!r} in its id" if keyword else ""
    if known and not asked:
        return f"no training case of several devices{named}; to predict from one device state --gb-per-s"
    return (
        f"no training case{named} that tells of several devices, or has `backward_ms` and `gradient_mib` to predict "
        "from: measure with `nox -s bench -- -k train --axis devices=1,2`"
    )


Many = list[tuple["Run", "Record"]]
Predicted = list[tuple["Run", "Record", list["Prediction"]]]


def _print_json(many: Many, predicted: Predicted, interconnect: "Interconnect | None") -> None:
    import msgspec

    from bench.report.terminal import print_json

    rows: list[dict[str, Any]] = [
        {
            "kind": "measured",
            "run": run.path.stem,
            "id": record.case.id,
            "devices": record.case.device_count,
            **{name: record.figures.get(name) for name in MEASURED},
        }
        for run, record in many
    ]
    rows += [
        {"kind": "predicted", "run": run.path.stem, "from": record.case.id, "interconnect": interconnect}
        | msgspec.to_builtins(one)
        for run, record, ones in predicted
        for one in ones
    ]
    print_json(*rows)


def _print(many: Many, predicted: Predicted, interconnect: "Interconnect | None") -> None:
    from bench.report.table import conditions, three_digits
    from bench.report.terminal import console, print_table, print_text

    on = console()
    runs = {run.path: run for run in (*(run for run, _ in many), *(run for run, _, _ in predicted))}
    for run in runs.values():
        print_text(on, conditions(run), "dim")
    if many:
        on.print()
        print_text(on, "measured: a step's time, shares that add up to 1; data in no step", "bold")
        rows = [(record.case.id, *(_cell(record, name) for name in MEASURED)) for _, record in many]
        print_table(on, ("case", *MEASURED.values()), rows, labels=1, dispensable=DISPENSABLE)
    if interconnect is None:
        return
    for _, record, ones in predicted:
        on.print()
        print_text(on, f"predicted, not measured: {_stated(interconnect)}; from {record.case.id}", "bold")
        rows = [
            (
                "predicted",
                str(one.devices),
                three_digits(one.images_per_s),
                f"{one.efficiency:.1%}",
                *map(three_digits, (one.step_ms, one.allreduce_ms, one.exposed_ms)),
            )
            for one in ones
        ]
        print_table(on, HEADINGS, rows, labels=1)


def _cell(record: "Record", name: str) -> str:
    from bench.report.table import DASH, three_digits

    figure = record.figures.get(name)
    if name in SHARES:
        return f"{figure:.1%}" if isinstance(figure, float) else DASH
    return three_digits(figure)


def _stated(interconnect: "Interconnect") -> str:
    when = "during" if interconnect.overlap else "after"
    return (
        f"all-reduce in a ring, {interconnect.gb_per_s:g} GB/s and {interconnect.latency_us:g} µs a message, "
        f"{when} the backward pass"
    )
