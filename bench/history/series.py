"""Run files → series: one case and metric on one machine over commits, parted wherever the conditions changed.

Runs of unlike machines, drivers, versions or harnesses are never joined: a series is a list of stretches, each of one
kind, and each stretch says what changed before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from bench.derive import ceiling_of
from bench.environment import ROOT, git
from bench.machine import slug
from bench.readings import Ceiling
from bench.results import Run

# What decides how a step is measured; a run whose commit had other ones was measured by another harness.
HARNESS = (
    *("bench/engine", "bench/subject.py", "bench/precision.py", "bench/frame.py", "bench/layers.py"),
    *("bench/strategies.py", "bench/distributed.py", "bench/pinning.py", "bench/ceilings.py"),
    *("bench/fitted.py", "bench/fitting.py", "bench/loss.py", "bench/picture.py", "bench/statistics.py"),
)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One run's figure.

    Args:
        run: stem of the run's file.
        commit: full hash.
        time: of the run.
        value: the figure.
        ceiling: what the machine did at its best in the same run (`--ceilings`), for a case like this one.
    """

    run: str
    commit: str
    time: datetime
    value: float
    ceiling: Ceiling | None = None


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """Points that may be compared with one another.

    Args:
        changed: what differs from the stretch before, in words; empty for the first.
        points: in the order of their commits.
    """

    changed: str
    points: tuple[Point, ...]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One case and metric on one machine.

    Args:
        machine: its folder under results/.
        case: id.
        metric: name of the figure.
        stretches: in order.
        failed: runs in which the case was not `ok`.
    """

    machine: str
    case: str
    metric: str
    stretches: tuple[Stretch, ...]
    failed: int = 0


def series(runs: Iterable[Run], metric: str, *, repository: Path = ROOT) -> list[Series]:
    """Every series of a metric, by machine and case; runs of changed sources (`-dirty`) do not count.

    Args:
        runs: as read.
        metric: name of a figure of `results/README.md`.
        repository: where the commits are; one that is not known there is taken by its run's time, and its harness by
            the hash of its sources.
    """
    clean = [run for run in runs if run.header.environment.dirty is False]
    commits = [run.header.environment.commit for run in clean]
    ages, harness = _ages(repository), _harness(repository, commits)

    def age(run: Run) -> tuple[datetime, datetime]:
        env = run.header.environment
        return ages.get(env.commit, env.time), env.time

    # By when the run began: a copy of its file is no further run.
    found: dict[tuple[str, str], dict[datetime, tuple[dict[str, Any], Point | None]]] = {}
    for run in sorted(clean, key=age):
        env = run.header.environment
        conditions = _conditions(run, harness.get(env.commit, env.source_hash))
        for record in run.records:
            value = record.figures.get(metric)
            number = isinstance(value, int | float) and not isinstance(value, bool) and record.status == "ok"
            told = {"run": run.path.stem, "commit": env.commit, "time": env.time, "ceiling": ceiling_of(run, record)}
            point = Point(**told, value=float(value)) if number else None  # type: ignore[arg-type]
            if number or record.status not in {"ok", "unsupported"}:
                found.setdefault((slug(env.machine), record.case.id), {})[env.time] = (conditions, point)
    return [
        Series(
            machine=machine,
            case=case,
            metric=metric,
            stretches=_stretches([(conditions, point) for conditions, point in points.values() if point is not None]),
            failed=sum(point is None for _, point in points.values()),
        )
        for (machine, case), points in found.items()
    ]


def _stretches(points: Sequence[tuple[dict[str, Any], Point]]) -> tuple[Stretch, ...]:
    parts: list[tuple[str, list[Point]]] = []
    before: dict[str, Any] | None = None
    for conditions, point in points:
        if before is None or conditions != before:
            parts.append((_difference(before, conditions) if before else "", []))
            before = conditions
        parts[-1][1].append(point)
    return tuple(Stretch(changed=changed, points=tuple(mine)) for changed, mine in parts)


def _conditions(run: Run, harness: str) -> dict[str, Any]:
    """What must be equal, flat: the machine but for the size of its memory, which varies from boot to boot."""
    flat: dict[str, Any] = {}

    def flatten(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{name}.{key}" if name else key, inner)
        elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
            for number, inner in enumerate(value):
                flatten(f"{name}[{number}]", inner)
        else:
            flat[name] = value

    flatten("", msgspec.to_builtins(msgspec.structs.replace(run.header.environment.machine, memory_mib=0)))
    flatten("settings", msgspec.to_builtins(run.header.settings))
    return {**flat, "harness": harness}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    told = ["the harness" if name == "harness" else f"{name} {before.get(name)} → {after.get(name)}" for name in names]
    return ", ".join(told)


def _ages(repository: Path) -> Mapping[str, datetime]:
    """Commit → when it was committed."""
    lines = (git(repository, "log", "--all", "--format=%H %ct") or "").splitlines()
    pairs = (line.split() for line in lines)
    return {commit: datetime.fromtimestamp(int(seconds), UTC) for commit, seconds in pairs}


def _harness(repository: Path, commits: Iterable[str]) -> Mapping[str, str]:
    """Commit → the names that git has for what measured it."""
    known = list(dict.fromkeys(commit for commit in commits if commit != "unknown"))
    asked = "".join(f"{commit}:{path}\n" for commit in known for path in HARNESS)
    lines = (git(repository, "cat-file", "--batch-check=%(objectname)", text=asked) or "").splitlines()
    if len(lines) != len(known) * len(HARNESS):
        return {}
    found = {}
    for number, commit in enumerate(known):
        mine = lines[number * len(HARNESS) : (number + 1) * len(HARNESS)]
        if not all(line.endswith("missing") for line in mine):  # a commit that this repository does not have
            found[commit] = " ".join(line.partition(" ")[0] if " " not in line else "-" for line in mine)
    return found
