"""Cases and records of them, to decide over."""

from datetime import UTC, datetime

from bench.case import Case
from bench.results import Record, Status

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def record(
    case: Case, status: Status = "ok", p50: float = 10.0, width: float = 0.0, **figures: float | str | bool
) -> Record:
    """A record whose median is `p50` ± `width`."""
    known = {
        "p50_ms": p50,
        "p50_low_ms": p50 - width,
        "p50_high_ms": p50 + width,
        "images_per_s": case.images * 1000 / p50,
        "samples": 50,
        "peak_memory_mib": 700.0,
        "class_agreement": 1.0,
        "agreement_meaningful": True,
        "load_ms": 400.0,
        "first_call_ms": p50,
    }
    reason = "" if status == "ok" else "for a reason"
    return Record(case=case, status=status, reason=reason, figures={**known, **figures}, started=NOON)


def case(implementation: str = "eager", precision: str = "fp32", batch: int = 1, **axes: str | int) -> Case:
    return Case(implementation=implementation, precision=precision, batch=batch, **axes)  # type: ignore[arg-type]
