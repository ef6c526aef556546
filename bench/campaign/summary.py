"""What a campaign has found so far, in Markdown, and everything in one file to send."""

import json
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import results
from bench.campaign.conductor import last
from bench.campaign.steps import Step
from bench.environment import Environment
from bench.report.table import DASH, markdown, markdown_rows, one_line, three_digits

# Two folders down and no further: below are the compilers' caches.
PACKED = ("*.md", "*.json", "*/log*", "*/*.json", "*/*.xml", "*/*/*.json*")


def write(folder: Path, steps: Sequence[Step], environment: Environment, missing: Sequence[str]) -> None:
    """`DIR/environment.json` and `DIR/summary.md`."""
    (folder / "environment.json").write_bytes(msgspec.json.format(msgspec.json.encode(environment), indent=1))
    machine = environment.machine
    device = ", ".join(gpu.name for gpu in machine.gpus) or f"{machine.cpu}, {machine.cores} cores"
    where = f"torch {machine.torch_version}, triton {machine.triton_version}, Python {machine.python}"
    parts = [f"# Campaign on {device}", f"{where} · commit {environment.commit[:7]}"]
    parts += [f"missing packages: {', '.join(missing)}"] if missing else []
    parts += [_table(("step", "what", "status", "s"), _steps(folder, steps))]
    for title, found in (
        ("Tests", _tests(folder)),
        ("Ceilings", _ceilings(folder)),
        ("Launch settings", _tuned(folder)),
    ):
        if lines := list(found):
            parts += [f"## {title}", "\n".join(lines)]
    for path in sorted(folder.glob("*/*/*.jsonl")):
        run = results.read(path)
        if run.records:
            parts += [f"## {path.relative_to(folder)}", markdown(run)]
    commands = [outcome.command for step in steps if (outcome := last(folder, step)) is not None]
    parts += ["## The commands, in the order of the steps", "\n".join(["```sh", *commands, "```"])]
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def pack(folder: Path) -> Path:
    """`DIR.tar.gz` with all that was found; unpacked beside the checkout it lets a campaign go on elsewhere."""
    packed = folder.with_name(f"{folder.name}.tar.gz")
    part = packed.with_suffix(".part")
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted({path for pattern in PACKED for path in folder.glob(pattern) if path.is_file()}):
            archive.add(path, arcname=str(path.relative_to(folder.parent)))
    part.replace(packed)
    return packed


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown_rows(headings, [[cell.replace("|", "/") for cell in row] for row in rows], len(headings))


def _steps(folder: Path, steps: Sequence[Step]) -> Iterator[Sequence[str]]:
    for step in steps:
        outcome = last(folder, step)
        if outcome is None:
            yield step.name, step.what, "not begun", DASH
        else:
            status = f"{outcome.status}: {one_line(outcome.reason)}" if outcome.reason else outcome.status
            yield step.name, step.what, status, f"{outcome.seconds:.0f}"


def _tests(folder: Path) -> Iterator[str]:
    file = folder / "tests" / "tests.xml"
    if not file.exists():
        return
    cases = list(ET.parse(file).getroot().iter("testcase"))  # noqa: S314 (pytest has just written it)
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    yield f"{len(cases) - skipped - len(failed)} passed, {len(failed)} failed, {skipped} skipped"
    for case in failed:
        why = next(fault for fault in (case.find("failure"), case.find("error")) if fault is not None)
        yield f"- `{case.get('classname')}::{case.get('name')}`: {one_line(why.get('message') or '')[:200]}"


def _ceilings(folder: Path) -> Iterator[str]:
    file = folder / "ceilings" / "ceilings.json"
    if file.exists():
        rows = json.loads(file.read_bytes())
        cells = ([row["precision"], *(three_digits(row[name]) for name in ("tflop_per_s", "gb_per_s"))] for row in rows)
        yield _table(("precision", "product TFLOP/s", "copy GB/s"), cells)


def _tuned(folder: Path) -> Iterator[str]:
    for file in sorted((folder / "tune").glob("nvidia*.json")):
        yield f"`{file.name}`\n"
        headings = ("kernel", "problem", "settings", "ms", "shipped ms", "shipped / tuned", "tried", "failed")
        yield _table(headings, map(_setting, json.loads(file.read_bytes())["rows"]))


def _setting(row: dict[str, Any]) -> Sequence[str]:
    ms, shipped = row["ms"], row["shipped_ms"]
    problem, settings = (
        " ".join(f"{name}={value}" for name, value in (row[part] or {}).items() if value)
        for part in ("problem", "settings")
    )
    gain = f"{shipped / ms:.2f}" if ms and shipped else DASH
    none = "none was right" if ms is None else f"none: PyTorch's own takes {three_digits(row['rival_ms'])} ms"
    told = row["kernel"], problem, settings or none
    return (*told, three_digits(ms), three_digits(shipped), gain, str(row["tried"]), str(row["failed"]))
