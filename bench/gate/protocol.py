"""What the gate asks of a process, and what it gets back. The process holds other versions of everything else here."""

from typing import Literal

import msgspec


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A job.

    Args:
        job: `probe` one version's deterministic figures, or time a `trial` of two.
        case: id of the case.
        roots: checkouts: one to probe; base and head, in this order, to time.
        together: whether both versions are loaded into one process.
        load: modules that register further implementations.
        cores: CPU cores to share.
        memory_mib: memory that the process may take.
        seed: of the drawn orders.
    """

    job: Literal["probe", "trial"]
    case: str
    roots: tuple[str, ...]
    together: bool = True
    load: tuple[str, ...] = ()
    cores: int = 1
    memory_mib: int
    seed: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Args:
        status: `ok`; `missing`, the version has no such case; `unsupported`; `broken`; `unshareable`, the versions want
            a process each.
        side: whose fault it is, where it is one's: `base` or `head`.
        reason: why it is not `ok`.
        figures: of a probe, by name.
        base_ms: of a trial: durations of a step in base, pair by pair.
        head_ms: in head.
        clock_mhz: SM clock of base and head, pair by pair; empty without a GPU.
        wall_per_cpu: of a trial in one process with one thread; above about 1.1 others had the core.
    """

    status: Literal["ok", "missing", "unsupported", "broken", "unshareable"]
    side: str = ""
    reason: str = ""
    figures: dict[str, float] = {}
    base_ms: tuple[float, ...] = ()
    head_ms: tuple[float, ...] = ()
    clock_mhz: tuple[tuple[float, float], ...] = ()
    wall_per_cpu: float | None = None
