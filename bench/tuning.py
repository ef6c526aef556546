"""`python -m bench tune`'s process: every layer of the U-Net, every candidate, on the GPU at hand.

Candidates are compiled first, one process a core, and then tried. A launch can end the process: with a CUDA error that
the context does not survive, or by never returning. `LOST` has the exit statuses after which another process goes on;
it does not try the same candidate for ever (`kernels.tune`).
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kernels
from bench.lifeline import stop_with_parent
from kernels.launch import place
from kernels.resources import compile_candidates
from kernels.tune import tune

if TYPE_CHECKING:
    from kernels.problem import Problem
    from kernels.spec import Kernel

AGAIN = 75
LOST = (AGAIN, *(-number for number in (signal.SIGALRM, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)))
PATIENCE_S = 120
"""Longest from one candidate to the next."""


def main(batches: str, precisions: str) -> None:
    """Tune the kernels of the registry for the given batch sizes and precisions, each parted by commas."""
    stop_with_parent()
    console = Console(stderr=True)
    wanted_batches = {int(batch) for batch in batches.split(",")}
    wanted_precisions = set(precisions.split(","))
    capability, _ = place(torch.device("cuda"))
    torch.backends.cudnn.benchmark = True  # a kernel's rival runs as it does in every measured case
    with Progress(
        TextColumn("{task.description}", markup=False),
        *(BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()),
        console=console,
    ) as bar:
        for kernel in kernels.KERNELS:
            problems = [p for p in kernel.layers if p.batch in wanted_batches and p.precision in wanted_precisions]
            try:
                _compile(kernel, problems, capability, bar)
                _try(kernel, problems, bar)
            except RuntimeError as error:
                console.print(f"{type(error).__name__}: {error}".splitlines()[0], markup=False)
                sys.exit(AGAIN)


def _compile(kernel: Kernel, problems: list[Problem], capability: int, bar: Progress) -> None:
    task = bar.add_task(f"compiling {kernel.name}", total=None)
    compile_candidates(kernel, problems, capability, lambda done, of: bar.update(task, completed=done, total=of))


def _try(kernel: Kernel, problems: list[Problem], bar: Progress) -> None:
    task = bar.add_task(kernel.name, total=len(problems))
    best: dict[Problem, float] = {}
    seen: list[Problem] = []
    # Nothing in Python can end a launch that does not: the alarm ends the process.
    signal.alarm(PATIENCE_S)
    for trial in tune(kernel, problems, torch.device("cuda")):
        signal.alarm(PATIENCE_S)
        if trial.problem not in seen:
            seen.append(trial.problem)
            bar.update(task, completed=len(seen) - 1, description=f"{kernel.name} {trial.problem}")
        if trial.ms is not None and trial.ms < best.get(trial.problem, float("inf")):
            best[trial.problem] = trial.ms
            bar.console.print(f"{trial.problem}: {trial.ms:.4f} ms with {trial.settings}", markup=False)
        elif trial.reason and trial.settings is not None:
            bar.console.print(f"{trial.problem}: {trial.settings}: {trial.reason}", markup=False)
    signal.alarm(0)
    bar.update(task, completed=len(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
