"""How far a gate is, on standard error: a line a verdict, and on a terminal what it waits for."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from bench.gate.markdown import one_row
from bench.gate.report import Row

# A log wants to show that something goes on, and not much more.
SELDOM_S = 20.0
STYLES = {"SLOWER": "bold red", "MISSING": "bold red", "BROKEN": "bold red", "FASTER": "green", "SAME": "dim"}


class Teller:
    """Says it.

    Args:
        console: where.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._said = time.monotonic()

    def line(self, text: str) -> None:
        """Say something that stays."""
        self.console.print(Text(text), soft_wrap=True)

    def row(self, row: Row) -> None:
        """Say a verdict."""
        self.console.print(Text(one_row(row), style=STYLES.get(row.word, "")), soft_wrap=True)

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[Callable[[str], None]]:
        """Say what is waited for; the function inside adds to it. Where there is no terminal, a line now and then."""
        if not self.console.is_terminal:
            if time.monotonic() - self._said > SELDOM_S:
                self.line(f"… {what}")
                self._said = time.monotonic()
            yield lambda _: None
            return
        with self.console.status(Text(what)) as status:
            yield lambda more: status.update(Text(f"{what} · {more}"))
