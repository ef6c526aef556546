"""The commands that build something instead of reading records: they import torch, each when it is called."""

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bench.errors import UsageError
from bench.processes import died

if TYPE_CHECKING:
    from torch import Tensor, nn

PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
MOST_LOST = 20
"""Processes that tuning may lose to its launches before it gives up."""
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def model(  # noqa: PLR0913, PLR0917 (one argument for each option)
    size: Annotated[str, typer.Option(help="Height and width of the image, such as 512x512.")] = "256x256",
    batch: Annotated[str, typer.Option(help="Images.")] = "1",
    upsampling: Annotated[str, typer.Option(help="bilinear or transposed.")] = "transposed",
    width: Annotated[str, typer.Option(help="Channels of the first level.")] = "64",
    depth: Annotated[str, typer.Option(help="Levels below the first.")] = "4",
    channels: Annotated[int, typer.Option(min=1, max=4096, help="Channels of the image.")] = 3,
    classes: Annotated[int, typer.Option(min=1, max=4096, help="Classes.")] = 2,
    fused: Annotated[bool, typer.Option("--fused", help="Kernels of the fused network instead of layers.")] = False,  # noqa: FBT002
    fold: Annotated[  # noqa: FBT002
        bool,
        typer.Option("--fold-transposed", help="With --fused: transposed convolutions inside the ones behind them."),
    ] = False,
    json: Json = False,  # noqa: FBT002
) -> None:
    """Print the network layer by layer: output shape, parameters, multiply-accumulates, size of the activation.

    With --fused, kernel by kernel in bf16: what each computes, the bytes it must move, and at the end the most
    activations alive at once, beside those of the network as it is. Counted exactly; no GPU is needed.
    """
    if fold and not fused:
        raise UsageError("--fold-transposed is one way to fuse: give --fused too")
    from bench.case import Case, value
    from bench.report.table import three_digits
    from bench.report.terminal import print_json
    from bench.support import image_too_small

    given = {"size": size, "batch": batch, "upsampling": upsampling, "width": width, "depth": depth}
    case = Case(**{name: value(name, text) for name, text in given.items()})  # type: ignore[arg-type]  # checked
    if (why := image_too_small(case)) is not None:
        raise UsageError(why)

    import torch

    from unet import UNet
    from unet.summary import summarize

    with torch.device("meta"):
        network = UNet(channels, classes, bilinear=case.upsampling == "bilinear", width=case.width, depth=case.depth)
        image = torch.empty(case.batch, channels, case.height, case.breadth)
        if fused:
            _fused(network.eval().bfloat16(), image.bfloat16(), fold=fold, json=json)
            return
        rows = summarize(network.eval(), image)
    if json:
        print_json(*rows)
        return
    cells = [
        (
            row.layer,
            row.kind,
            "×".join(map(str, row.output_shape)),
            f"{row.parameters:,}" if row.parameters else "–",
            three_digits(row.macs / 1e9) if row.macs else "–",
            three_digits(row.activation_bytes / 2**20) if row.activation_bytes else "in place",
        )
        for row in rows
    ]
    total = (
        *("total", "", ""),
        f"{sum(row.parameters for row in rows):,}",
        f"{sum(row.macs for row in rows) / 1e9:,.3f}",
        three_digits(sum(row.activation_bytes for row in rows) / 2**20),
    )
    _print(
        ("layer", "kind", "output (N×C×H×W)", "parameters", "GMAC", "output MiB (fp32)"),
        [*cells, total],
        labels=3,
        dispensable=("kind",),
    )


def _fused(network: "nn.Module", image: "Tensor", *, fold: bool, json: bool) -> None:
    import kernels
    from bench.report.table import three_digits
    from bench.report.terminal import print_json

    both = (network, kernels.fuse(network, fold_transposed=fold))
    eager, fused = (kernels.account_for(one, image) for one in both)
    peaks = {"eager_peak_mib": eager.peak_bytes / 2**20, "fused_peak_mib": fused.peak_bytes / 2**20}
    if json:
        print_json(*fused.calls, {"kernels": len(fused.calls), "others": fused.others} | peaks)
        return
    cells = [
        (
            *(str(call.problem), call.kernel, " ".join("×".join(map(str, shape)) for shape in call.shapes)),
            *(three_digits(call.flops / 1e9), three_digits(call.bytes / 1e6)),
        )
        for call in fused.calls
    ]
    flops, moved = sum(call.flops for call in fused.calls) / 1e9, sum(call.bytes for call in fused.calls) / 1e6
    total = (f"{len(cells)} kernels", f"{len(fused.others)} others", "", f"{flops:,.1f}", f"{moved:,.1f}")
    _print(("what is computed", "kernel", "outputs (N×C×H×W)", "GFLOP", "MB moved"), [*cells, total], labels=3)
    ratio = fused.peak_bytes / eager.peak_bytes
    told = ", ".join(f"{name.split('_')[0]} {three_digits(mib)} MiB" for name, mib in peaks.items())
    typer.echo(f"activations alive at once, at most: {told} ({ratio:.3f}×)")
    if not fold and any(call.kernel == "conv_transpose" for call in fused.calls):
        other = kernels.account_for(kernels.fuse(network, fold_transposed=True), image)
        megabytes = sum(call.bytes for call in other.calls) / 1e6
        peak = f"{three_digits(other.peak_bytes / 2**20)} MiB ({other.peak_bytes / eager.peak_bytes:.3f}×)"
        typer.echo(f"with --fold-transposed: {len(other.calls)} kernels, {megabytes:,.1f} MB, {peak}")


def resources(
    target: Annotated[
        str, typer.Option(help="GPUs to compile for, parted by commas.")
    ] = "sm_80,sm_89,sm_90,sm_100,sm_120",
    kernel: Annotated[str | None, typer.Option(help="Only the kernel of this name.")] = None,
    json: Json = False,  # noqa: FBT002
) -> None:
    """Compile every kernel with its shipped settings for GPUs that are not here, and print what it uses."""
    from bench.report.terminal import print_json
    from kernels.resources import rows

    shown = sys.stderr.isatty()

    def tell(done: int, of: int) -> None:
        typer.echo(f"\rcompiled {done}/{of}", nl=done == of, err=True)

    try:
        found = rows(target.split(","), kernel, progress=tell if shown else None)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if json:
        print_json(*found)
        return
    headings = (
        "target",
        "kernel and configuration",
        "registers",
        "spilled B",
        "shared KiB",
        "tensor core",
        "async copies",
        "instructions",
    )
    cells = [
        (
            *(row.target, f"{row.kernel} {row.config}", f"{row.registers}", f"{row.spill_bytes}"),
            *(f"{row.shared_bytes / 1024:.0f}", f"{row.tensor_core}", f"{row.async_copies}", f"{row.instructions}"),
        )
        for row in found
    ]
    _print(headings, cells, labels=2, dispensable=("async copies", "tensor core"))


def tune(
    batch: Annotated[str, typer.Option(help="Batch sizes to tune for, parted by commas.")] = "1,16",
    precision: Annotated[str, typer.Option(help="bf16, fp16, tf32, fp32, parted by commas.")] = "bf16",
) -> None:
    """Measure launch settings of the kernels on the GPU here; go on where it was stopped.

    Each candidate is checked numerically before its time counts. The fastest of each layer goes into
    kernels/tuned/<gpu>.json as soon as it is known, so Ctrl-C loses the layer in hand alone.
    """
    from bench.machine import machine, usable_gpus

    wanted = batch.split(","), precision.split(",")
    if not all(re.fullmatch("[1-9][0-9]{0,5}", one) for one in wanted[0]) or not set(wanted[1]) <= set(PRECISIONS):
        raise UsageError(
            f"--batch {batch} --precision {precision}: allowed: whole numbers from 1, and {', '.join(PRECISIONS)}"
        )

    if not usable_gpus(machine()):
        raise UsageError("unsupported: no CUDA device; tuning measures on the GPU at hand")
    from bench import tuning

    # A process of its own: this one stays free of CUDA, as every driver here, and begins another where one is lost.
    command = [sys.executable, "-m", "bench.tuning", batch, precision]
    for _ in range(MOST_LOST):
        status = subprocess.run(command, check=False).returncode  # noqa: S603 (this Python, our own module)
        if status not in tuning.LOST:
            raise typer.Exit(status)
        typer.echo(f"{died(status)} in a launch; another one goes on", err=True)
    raise typer.Exit(status)


def _print(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int, dispensable: Sequence[str] = ()
) -> None:
    from bench.report.terminal import console, print_table

    print_table(console(), headings, rows, labels=labels, dispensable=dispensable)
