"""A run in the formats of others: pytest-benchmark's JSON, and the JSON that benchmark-tracking services read."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from bench.case import AXES
from bench.machine import slug
from bench.results import Record, Run


def benchmark_json(run: Run) -> Mapping[str, Any]:
    """The run as pytest-benchmark 5 stores one, for `pytest-benchmark compare`. Only `ok` cases are in it."""
    import pytest_benchmark
    from pytest_benchmark.stats import Stats

    def benchmark(record: Record) -> dict[str, Any]:
        stats = Stats()
        for sample in record.samples_ms:
            stats.update(sample / 1000)
        return {
            "group": record.case.task,
            "name": record.case.id,
            "fullname": f"bench/test_unet.py::test_unet[{record.case.id}]",
            "params": {name: getattr(record.case, name) for name in AXES},
            "param": record.case.id,
            "extra_info": record.figures,
            "options": {"disable_gc": False, "timer": "bench.engine", "min_rounds": 1, "warmup": False},
            "stats": {**stats.as_dict(), "data": stats.data, "iterations": 1},
        }

    env = run.header.environment
    return {
        "machine_info": {"node": slug(env.machine), **msgspec.to_builtins(env.machine)},
        "commit_info": {"id": env.commit, "time": env.time.isoformat(), "dirty": bool(env.dirty), "branch": ""},
        "benchmarks": [benchmark(record) for record in run.records if record.status == "ok"],
        "datetime": env.time.isoformat(),
        "version": pytest_benchmark.__version__,
    }


class Tracked(msgspec.Struct, frozen=True, kw_only=True):
    """One value of a benchmark-tracking service, in the form of github-action-benchmark's custom tools.

    Args:
        name: what is tracked: the case's id, and the figure.
        unit: of the value.
        value: the figure; smaller is better for all of them.
        range: half of its 95 % interval with a ± before it; empty where there is none.
    """

    name: str
    unit: str
    value: float
    range: str


def tracked(run: Run) -> Iterator[Tracked]:
    """Median duration and peak memory of every `ok` case. What did not run has no value: a zero would win."""
    for record in run.records:
        if record.status != "ok":
            continue
        for figure, unit in {"p50_ms": "ms", "peak_memory_mib": "MiB"}.items():
            value, low, high = (record.figures.get(name) for name in (figure, "p50_low_ms", "p50_high_ms"))
            if not isinstance(value, float):
                continue
            wide = figure == "p50_ms" and isinstance(low, float) and isinstance(high, float)
            spread = f"± {(high - low) / 2:.4g}" if wide else ""  # type: ignore[operator]  # `wide` has looked
            yield Tracked(name=f"{record.case.id} {figure}", unit=unit, value=value, range=spread)
