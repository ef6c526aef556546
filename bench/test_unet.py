"""What `nox -s bench` collects: one test a case. Which cases there are is the options' business (`bench/plugin.py`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.case import Case


def test_unet(case: "Case", measure: "Callable[[Case], None]") -> None:
    """Measure a case; its record says how fast, how much memory, how exact."""
    measure(case)
