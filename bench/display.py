"""What a person sees of a case: what is happening and how long all will take while it is measured, then a line."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from bench import estimate
from bench.case import Case
from bench.processes import Progress
from bench.report.table import one_line, three_digits
from bench.results import Record

SILENCE_S = 60.0
"""How long a case may take without a word where there is no bar: fitting a large network takes minutes."""


@contextlib.contextmanager
def shown(case: Case, console: Console, *, done: int, total: int, left_s: float) -> Iterator[Progress]:
    """Show how far a case is: with a bar on a terminal, elsewhere with a line a minute.

    Args:
        case: the case.
        console: where.
        done: cases before it.
        total: all cases.
        left_s: seconds that it and those after it will take.
    """
    said = time.monotonic()
    with Bar(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=total, completed=done)

        def tell(phase: str, seconds: float) -> None:
            nonlocal said
            now = f"{case.id} · {phase} {seconds:.0f} s"
            if bar.disable and time.monotonic() - said > SILENCE_S:
                said = time.monotonic()
                console.print(Text(now), soft_wrap=True)
            bar.update(task, description=f"{estimate.words(max(0.0, left_s - seconds))} left · {now}")

        yield tell


def line(record: Record, number: str, *, kept: bool) -> Text:
    """The case in a line: its number, its figures or why there are none, and how long it took."""
    figures = record.figures
    style = {"ok": "", "unsupported": "dim"}.get(record.status, "bold red")
    if record.status == "ok":
        words = (
            f"{three_digits(figures.get('p50_ms'))} ms · {three_digits(figures.get('images_per_s'))} img/s · "
            f"{three_digits(figures.get('peak_memory_mib'))} MiB · rel. L2 {three_digits(figures.get('rel_l2'))}"
        )
    else:
        words = f"{record.status}: {one_line(record.reason)}"
    took = "measured before" if kept else f"{record.wall_s:.0f} s"
    return Text(f"{number} {record.case.id}  {words}  ({took})", style=style)
