"""How long a case will take, before it has been measured."""

from bench.case import Case
from bench.implementations import IMPLEMENTATIONS
from bench.machine import Machine
from bench.results import Settings
from bench.support import unsupported

# Seconds of a case beyond its timed steps, until some are seen: import, build, warm-up, accuracy; and a compilation.
USUAL_S = 12.0
COMPILE_S = 40.0
# A process that only builds and takes two steps.
BEGIN_S = 8.0
STAGES_S = 2.0


def prior_s(case: Case, settings: Settings, machine: Machine) -> float:
    """Seconds that a case takes on a machine like those seen so far; 0 for one that is not supported."""
    if unsupported(case, machine):
        return 0.0
    compiles = IMPLEMENTATIONS[case.implementation].compiles
    seconds = USUAL_S + settings.measure_s + (COMPILE_S if compiles else 0.0)
    if case.regime == "sustained":
        seconds += settings.sustained_s
    if case.on_gpu:
        seconds += settings.energy_s
    if settings.stages:
        seconds += STAGES_S
    if settings.cold_start:  # once with the compiler's cache, once for another size
        seconds += BEGIN_S + (COMPILE_S if compiles else 0.0)
    return seconds


def words(seconds: float) -> str:
    """`about 12 min`, or in seconds where that is less than a minute and a half."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(5, round(seconds / 5) * 5)} s"  # noqa: PLR2004
