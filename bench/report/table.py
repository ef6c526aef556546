"""The comparison as a table: implementation × upsampling × precision, the baseline first at 1.00×."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from bench.case import AXES, Case, rank, rank_of
from bench.machine import slug
from bench.results import Record, Run

# What the rows of a table compare, outermost first; everything else that varies makes a table of its own.
COMPARED = (
    *("upsampling", "devices", "strategy", "scaling", "batchnorm"),
    *("container", "modification", "activations", "frame", "layout", "precision", "implementation"),
)
EXACTNESS = ("fp32", "tf32", "amp_fp16", "amp_bf16", "fp16", "bf16")
DASH = "–"
DISTURBED = "*"


class Table(NamedTuple):
    """One table, in words.

    Args:
        title: what all its rows share.
        headings: of the columns; the first `labels` of them name the case, the others are figures.
        labels: how many.
        rows: one a case.
        baselines: which rows the others' speed is told against.
        notes: what the figures mean here, and the reasons of cases that are not `ok`.
    """

    title: str
    headings: tuple[str, ...]
    labels: int
    rows: tuple[tuple[str, ...], ...]
    baselines: frozenset[int]
    notes: tuple[str, ...]


def conditions(run: Run) -> str:
    """Where, when and on what a run was measured, in a line."""
    env = run.header.environment
    sources = f"commit {env.commit[:7]}"
    if env.dirty:
        changed = "with changes" if env.dirty is True else "(not a git checkout, or git does not tell)"
        sources += f" {changed}: these results do not count"
    versions = f"torch {env.machine.torch_version}, triton {env.machine.triton_version}, Python {env.machine.python}"
    device = ", ".join(gpu.name for gpu in env.machine.gpus) or f"{env.machine.cpu}, {env.machine.cores} cores"
    device = f"{env.machine.nodes} nodes of {device}" if env.machine.nodes > 1 else device
    return f"{device} · {versions} · {sources} · {env.time:%Y-%m-%d %H:%M} UTC"


def tables(run: Run) -> Iterator[Table]:
    """The records of a run as tables: one for each setting of the axes that are not compared."""
    yield from map(_table, _groups(run))


def cells(run: Run) -> dict[Case, dict[str, str]]:
    """What the tables say of each case: heading → words, speed against the baseline of the case's own table."""
    return {record.case: _cells(record, _baseline(record, records)) for records in _groups(run) for record in records}


def _groups(run: Run) -> Iterable[list[Record]]:
    """The records of a run, parted by the axes that are not compared."""
    groups: dict[Case, list[Record]] = {}
    blank = {name: getattr(Case(), name) for name in COMPARED}
    for record in run.records:
        groups.setdefault(msgspec.structs.replace(record.case, **blank), []).append(record)
    return [groups[shared] for shared in sorted(groups, key=rank)]


def _table(records: Sequence[Record]) -> Table:
    first = records[0].case
    varied = [name for name in COMPARED if len({getattr(record.case, name) for record in records}) > 1]
    labels = varied or ["implementation"]
    ordered = _ordered(records)
    baselines = [_baseline(record, records) for record in ordered]
    cells = [_cells(record, baseline) for record, baseline in zip(ordered, baselines, strict=True)]
    # A column that no row has anything to say in is left out.
    columns = [name for name in FIGURES if any(row[name] != DASH for row in cells)] or ["p50 ms"]
    rows = tuple(
        (*(str(getattr(record.case, name)) for name in labels), *(row[name] for name in columns))
        for record, row in zip(ordered, cells, strict=True)
    )
    title = " · ".join(
        [first.task, f"batch {first.batch}", first.size, *in_words(first, ("task", "batch", "size", *labels))]
    )
    return Table(
        title,
        (*labels, *columns),
        len(labels),
        rows,
        frozenset(map(ordered.index, filter(None, baselines))),
        tuple(_notes(ordered, baselines)),
    )


def in_words(case: Case, besides: Collection[str]) -> Iterator[str]:
    """A case's value of each axis but those named in `besides`; a rare axis only where it is not at its default."""
    for name, axis in AXES.items():
        if name not in besides and (not axis.rare or case.changed(name)):
            yield f"{name} {getattr(case, name)}" if axis.rare else str(getattr(case, name))


def _ordered(records: Sequence[Record]) -> list[Record]:
    """Baseline first: by the axes as they vary in `COMPARED`, precision from exact to coarse, else as listed."""

    def place(record: Record) -> list[object]:
        case = record.case
        return [
            EXACTNESS.index(case.precision) if name == "precision" else rank_of(name, getattr(case, name))
            for name in COMPARED
        ]

    return sorted(records, key=place)


def _baseline(record: Record, records: Sequence[Record]) -> Record | None:
    """What its speed is told against, the plainest of the same upsampling: eager, exact, few devices, all else default.

    None unless that is `ok`: a rival put in its place would change what 1.00× means.
    """

    def plainness(other: Record) -> list[int | bool]:
        case = other.case
        axes = ("strategy", "scaling", "batchnorm", "container", "modification", "activations", "layout")
        changed = [case.changed(name) for name in axes]
        return [EXACTNESS.index(case.precision), case.device_count, *changed]

    rivals = [
        other
        for other in records
        if other.case.implementation == "eager" and other.case.upsampling == record.case.upsampling
    ]
    best = min(rivals, key=plainness, default=None)
    return best if best is not None and best.status == "ok" else None


def _cells(record: Record, baseline: Record | None) -> dict[str, str]:
    if record.status != "ok":
        # Words, never a zero; a result that is wrong has no speed.
        shown = dict.fromkeys(FIGURES, DASH) | {"p50 ms": record.status}
        if record.status == "inaccurate":
            shown |= {name: FIGURES[name](record, baseline) for name in ("rel. L2", "same class")}
        return shown
    return {name: figure(record, baseline) for name, figure in FIGURES.items()}


def counted(number: int, what: str) -> str:
    """`1 case`, `1,024 cases`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def three_digits(number: object) -> str:
    """Three significant digits, an exponent only far from 1: 1,230 · 41.2 · 0.0412; a dash for what is not there."""
    if not isinstance(number, int | float) or math.isnan(number):
        return DASH
    if math.isinf(number):
        return str(number)
    rounded = f"{number:.2e}"
    exponent = int(rounded.partition("e")[2])
    if number == 0 or not -4 < exponent < 7:  # noqa: PLR2004 (where zeros would hide the digits)
        return rounded if number else "0"
    return f"{float(rounded):,.{max(0, 2 - exponent)}f}"


def _figure(name: str, scale: float = 1.0) -> Callable[[Record, Record | None], str]:
    def show(record: Record, _: Record | None) -> str:
        number = record.figures.get(name)
        return three_digits(number * scale if isinstance(number, int | float) else None)

    return show


def _median(record: Record, _: Record | None) -> str:
    return three_digits(record.figures.get("p50_ms")) + (DISTURBED if record.figures.get("disturbed") else "")


def _interval(record: Record, _: Record | None) -> str:
    low, high = record.figures.get("p50_low_ms"), record.figures.get("p50_high_ms")
    return DASH if low is None or high is None else f"{three_digits(low)} … {three_digits(high)}"


def _speed(record: Record, baseline: Record | None) -> str:
    mine = record.figures.get("images_per_s")
    theirs = baseline.figures.get("images_per_s") if baseline else None
    if not isinstance(mine, float) or not isinstance(theirs, float):
        return DASH
    return f"{mine / theirs:.2f}×"


def share(number: object) -> str:
    """A share of pixels to four places, rounded down: 0.99996 is not all."""
    if not isinstance(number, float) or math.isnan(number):
        return DASH
    return f"{int(number * 1e4) / 1e4:.4f}"


def _same_class(record: Record, _: Record | None) -> str:
    agreement = record.figures.get("class_agreement")
    meaningful = not isinstance(agreement, float) or record.figures.get("agreement_meaningful")
    return share(agreement) if meaningful else "not meaningful"


FIGURES: dict[str, Callable[[Record, Record | None], str]] = {
    "p50 ms": _median,
    "95 %, this process": _interval,
    "p90 ms": _figure("p90_ms"),
    "img/s": _figure("images_per_s"),
    "speed": _speed,
    "first call s": _figure("first_call_ms", 1e-3),
    "peak MiB": _figure("peak_memory_mib"),
    "rel. L2": _figure("rel_l2"),
    "same class": _same_class,
}


def _notes(records: Sequence[Record], baselines: Sequence[Record | None]) -> Iterator[str]:
    exactest = {baseline.case.precision for baseline in baselines if baseline is not None}
    if exactest:
        yield f"speed: images a second; eager {' or '.join(sorted(exactest))} = 1.00×."
    if any("rel_l2" in record.figures for record in records):
        what = "root mean square over the gradients of a step" if records[0].case.task == "train" else "the logits"
        yield f"rel. L2: {what}, against fp32 eager."
    if any(record.figures.get("disturbed") for record in records):
        yield f"{DISTURBED} other processes used the cores meanwhile: measure again on an idle machine."
    reasons = Counter(
        (record.case.implementation, record.status, one_line(record.reason))
        for record in records
        if record.status != "ok"
    )
    for (name, status, reason), count in reasons.items():
        yield f"{name}: {status}: {reason}" + (f" ({count} cases)" if count > 1 else "")


def one_line(text: str) -> str:
    """The first line, without what would move or colour a terminal: it may come from anybody's file or library."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text.partition("\n")[0])


def markdown(run: Run) -> str:
    """All tables of a run in Markdown."""
    file = f"results/{slug(run.header.environment.machine)}/{run.path.name}"
    parts = [f"{_plain(conditions(run))}  \nfrom `{file}`\n"]
    for table in tables(run):
        cells = [[_plain(cell) for cell in row] for row in table.rows]
        parts.append(f"**{_plain(table.title)}**\n\n{markdown_rows(table.headings, cells, table.labels)}")
        parts += ["\n".join(f"- {_plain(note)}" for note in table.notes) + "\n"]
    return "\n".join(parts)


def markdown_rows(headings: Sequence[str], rows: Iterable[Sequence[str]], labels: int) -> str:
    """A table in Markdown, of cells that are Markdown: the first `labels` columns to the left, figures to the right."""
    align = [":--"] * labels + ["--:"] * (len(headings) - labels)
    lines = [headings, align, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    """Without what would end a cell, start HTML or make a link: it may come from anybody's file or library."""
    return re.sub(r"([\\|\[\]`])", r"\\\1", one_line(text)).replace("<", "&lt;")
