"""Records and run files: one JSON Lines file a run, written record by record (`bench.runfile`), never edited.

The first line says where, when and on which sources the run was measured; each further line is a `Record`. The schema
is explained in `results/README.md`.
"""

import contextlib
import inspect
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench.case import AXES, Case
from bench.derive import derived
from bench.environment import ROOT, Environment, environment_hash
from bench.errors import UsageError
from bench.machine import slug
from bench.readings import Block, Ceiling, Stage
from bench.weights import Weights

SCHEMA = 2
RESULTS = ROOT / "results"
SUFFIX = ".jsonl"

Status = Literal["ok", "oom", "timeout", "crash", "inaccurate", "unsupported"]
Value = float | int | str | bool | None


class ResultsError(UsageError):
    """A results file that cannot be read or written: one line with the file and what is wrong."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How a run measures.

    Args:
        measure_s: seconds of timed steps a case.
        warmup_s: seconds of untimed steps at least, before.
        warmup_extra_s: seconds more at most, until three windows agree.
        sustained_s: seconds of timed steps of a case of the regime `sustained`, at least.
        energy_s: seconds of steps whose energy is read, at least 5: NVML's counter moves about every 100 ms (GPU).
        time_limit_s: a case that takes longer, first call included, is `timeout`.
        rank_timeout_s: a rank that waits longer for another within a step reports it; half of `time_limit_s` at most.
        join_timeout_s: the same before the first step, for ranks that have not come yet, and before the first case for
            machines.
        cold_start: whether a second process starts with the compiler cache of the first, and a second size is tried.
        stages: whether the blocks of the network are timed one by one.
        load: modules that register further implementations.
        weights: a checkpoint of one's own in place of the fitted weights.
    """

    measure_s: float = 5.0
    warmup_s: float = 1.0
    warmup_extra_s: float = 5.0
    sustained_s: float = 30.0
    energy_s: float = 5.0
    time_limit_s: float = 600.0
    rank_timeout_s: float = 120.0
    join_timeout_s: float = 120.0
    cold_start: bool = False
    stages: bool = False
    load: tuple[str, ...] = ()
    weights: Weights | None = None


def explained(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Field → what it means, by the docstring: `name: what it means` under `Args:` or `Attributes:`, lines joined."""
    section = re.search(r"^(?:Args|Attributes):\n((?:(?: .*)?\n?)*)", inspect.getdoc(struct) or "", flags=re.MULTILINE)
    found = re.finditer(r"^    (\w+): ((?:.|\n {8})*)", section[1] if section else "", flags=re.MULTILINE)
    return {match[1]: " ".join(match[2].split()) for match in found}


def option_of(setting: str) -> str:
    """The option of `pytest bench` that sets a field of `Settings`."""
    return f"--{setting.replace('_', '-')}"


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the processes of a case found out for itself.

    Args:
        rank: which, from 0.
        node: name of its machine.
        figures: as in `Record`, of this process.
        samples_ms: its own duration of every timed step.
    """

    rank: int
    node: str
    figures: dict[str, Value] = {}
    samples_ms: tuple[float, ...] = ()


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What one process found out about one case.

    Args:
        case: the case.
        status: `ok`, `oom`, `timeout`, `crash`, `inaccurate` (beyond its limits: never ranked) or `unsupported`.
        reason: why it is not `ok`; empty if it is.
        figures: scalar results by name, the unit in the name; absent where they do not apply, never zero for a failure.
        samples_ms: duration of every timed step in the order they ran; nothing is left out.
        blocks: how those steps were grouped, and how the GPU was after each group; none on a CPU.
        stages: the blocks of the network one by one, where that was asked for.
        spent_s: where the time of the case went, by phase.
        ranks: of a case of several processes, each one's own findings.
        started: when, in UTC.
        wall_s: from the start of the process to its end, as the parent saw it.
        repeat: the command that measures this case alone.
    """

    case: Case
    status: Status
    reason: str = ""
    figures: dict[str, Value] = {}
    samples_ms: tuple[float, ...] = ()
    blocks: tuple[Block, ...] = ()
    stages: tuple[Stage, ...] = ()
    spent_s: dict[str, float] = {}
    ranks: tuple[Rank, ...] = ()
    started: datetime
    wall_s: float = 0.0
    repeat: str = ""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First line of a run file.

    Args:
        schema: number of the schema; a program refuses a newer one than it knows.
        environment: where, when and on which sources the run was measured.
        settings: how it measured.
        preset: name of the preset that the cases came from.
        seed: of the order in which the cases ran; None where it was given case by case.
        ceilings: what the device did at its best just before, where that was asked for.
    """

    schema: int = SCHEMA
    environment: Environment
    settings: Settings
    preset: str
    seed: int | None = None
    ceilings: tuple[Ceiling, ...] = ()


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A run file as read.

    Args:
        path: the file.
        header: its first line.
        records: the last record of each case, in the order the cases were first measured.
        damaged: lines that could not be read: the tail of a run that was cut off.
    """

    path: Path
    header: Header
    records: tuple[Record, ...]
    damaged: int = 0


def read(path: Path) -> Run:
    """Read a run file.

    Raises:
        ResultsError: no such file, not a run file, or one of a newer schema.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ResultsError(f"{path}: cannot read results ({error.strerror})") from error
    header = _header(path, lines[0] if lines else b"")
    records: dict[Case, Record] = {}
    damaged = 0
    decoder = msgspec.json.Decoder(Record)
    for line in lines[1:]:
        try:
            record = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            damaged += bool(line.strip())
        else:
            records[record.case] = record
    return Run(path=path, header=header, records=tuple(records.values()), damaged=damaged)


def _header(path: Path, line: bytes) -> Header:
    try:
        schema = msgspec.json.decode(line, type=dict[str, Any]).get("schema")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: not a run file (its first line is not a JSON object)") from error
    if not isinstance(schema, int):
        raise ResultsError(f"{path}: not a run file (its first line has no schema number)")
    if schema > SCHEMA:
        raise ResultsError(f"{path}: schema {schema} is newer than this program's {SCHEMA}; update the program")
    try:
        return msgspec.json.decode(line, type=Header)
    except msgspec.DecodeError as error:
        raise ResultsError(f"{path}: damaged first line ({error})") from error


def newest(results: Path = RESULTS, machine: str = "*") -> Path | None:
    """The run file begun last, of all machines or of one."""
    return max(results.glob(f"{machine}/*{SUFFIX}"), key=lambda path: path.name, default=None)


def resumable(header: Header, results: Path = RESULTS) -> Run | None:
    """The newest run that a run with this header may continue: same machine, sources, preset and settings."""
    found = newest(results, slug(header.environment.machine))
    if found is None:
        return None
    with contextlib.suppress(ResultsError):
        run = read(found)
        if _identity(run.header) == _identity(header):
            return run
    return None


def _identity(header: Header) -> tuple[object, ...]:
    env = header.environment
    return environment_hash(env), env.commit, env.source_hash, header.preset, header.settings


def rows(run: Run) -> Iterator[dict[str, Value]]:
    """One flat row a record: id, axes, status, reason, figures, and what follows from them within the run."""
    for record, follows in zip(run.records, derived(run), strict=True):
        axes = {name: getattr(record.case, name) for name in AXES}
        yield {
            "run": run.path.stem,
            "machine": slug(run.header.environment.machine),
            "id": record.case.id,
            **axes,
            "status": record.status,
            "reason": record.reason,
            **record.figures,
            **follows,
            "wall_s": record.wall_s,
            **axes,  # where they stood; files of schema 1 and early 2 have a figure called `threads`, which is an axis
        }


def frame(runs: Iterable[Run]) -> Any:  # noqa: ANN401 (pandas is imported where it is used)
    """A tidy `pandas.DataFrame`: one row a record, one column an axis and a figure."""
    import pandas as pd

    return pd.DataFrame([row for run in runs for row in rows(run)])
