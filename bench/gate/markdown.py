"""A gate's report as Markdown for a pull request's comment, and a row of it as a line."""

import math
from collections.abc import Iterator, Sequence

from bench.gate.report import TIME, Report, Row
from bench.report.table import DASH, markdown_rows, one_line, three_digits

WORST = 5
SIGNS = {"pass": "✅", "fail": "❌", "undecided": "⚠️", "not comparable": "⚠️"}
# For a metric of which less is better, but which is no time.
READ = {"SLOWER": "more", "FASTER": "less"}


def verdict_of(row: Row) -> str:
    """The word; where the metric is no time, with how to read it: `SLOWER (more)`."""
    read = "" if row.metric == TIME or row.word not in READ else f" ({READ[row.word]})"
    return f"{row.word}{read}{', muted' if row.muted else ''}"


def change_of(row: Row) -> str:
    """`+4.9 %`, with the interval where there is one: `+4.9 % (+3.1 … +6.7)`."""
    if row.change is None:
        return DASH
    shown = f"{_percent(row.change)} %"
    if row.estimate is not None:
        shown += f" ({_percent(row.estimate.low)} … {_percent(row.estimate.high)})"
    return shown


def _percent(share: float) -> str:
    return f"{share * 100:+.1f}" if math.isfinite(share) else "∞"


def one_row(row: Row) -> str:
    """A verdict in a line."""
    words = [f"{verdict_of(row)}  {row.name}"]
    if row.metric != "*":
        words.append(row.metric)
    if row.change is not None:
        words += [change_of(row), f"{three_digits(row.base)} → {three_digits(row.head)}{_unit(row)}"]
    if row.estimate is not None:
        words.append(f"{row.estimate.trials} trials")
    if row.reason:
        words.append(one_line(row.reason))
    return " · ".join(words)


def _unit(row: Row) -> str:
    return " ms" if row.metric == TIME else ""


def markdown(report: Report) -> str:
    """Verdict, what fails, the worst five, what this run could have seen, every row folded away, and the commands."""
    return "\n\n".join(_parts(report)) + "\n"


def _parts(report: Report) -> Iterator[str]:
    sign = SIGNS[report.verdict.partition(":")[0]]
    yield f"### {sign} Performance gate: {report.verdict}"
    yield f"`{report.head.name}` against `{report.base.name}`. {_seen(report)}"
    failing = [*report.regressions, *report.broken]
    if failing:
        yield "**What fails**\n\n" + _table(sorted(failing, key=_badness, reverse=True)[:WORST])
        if len(failing) > WORST:
            yield f"and {len(failing) - WORST} more below."
    times = [row for row in report.rows if row.metric == TIME and not row.twin and row not in failing]
    if times:
        worst = sorted(times, key=_badness, reverse=True)[:WORST]
        yield f"**Times: {'the worst five of ' if len(times) > WORST else ''}{len(times)}**\n\n{_table(worst)}"
    yield from _mutes(report)
    everything = _table(report.rows)
    notes = "\n".join(f"- {one_line(note)}" for note in _notes(report))
    summary = f"<summary>All {len(report.rows)} rows, with notes</summary>"
    yield f"<details>{summary}\n\n{everything}\n\n{notes}\n\n</details>"
    yield f"<details><summary>To repeat a row</summary>\n\n```sh\n{_commands(report)}\n```\n\n</details>"


def _seen(report: Report) -> str:
    parts = []
    if report.noise_floor is not None:
        parts.append(f"Noise floor {report.noise_floor * 100:.1f} % (base against itself, from process to process)")
    if report.smallest is not None:
        parts.append(f"smallest slow-down this run could have seen: {report.smallest * 100:.1f} %")
    return "; ".join(parts) + "." if parts else "Nothing was timed."


def _badness(row: Row) -> float:
    if row.word in {"MISSING", "BROKEN"}:
        return math.inf
    return row.change if row.change is not None else -math.inf


def _table(rows: Sequence[Row]) -> str:
    cells = [
        (
            *(verdict_of(row), f"`{_cell(row.name)}`" + (f"<br>{_cell(row.reason)}" if row.reason else "")),
            *(row.metric, change_of(row), three_digits(row.base), three_digits(row.head)),
            str(row.estimate.trials) if row.estimate else DASH,
        )
        for row in rows
    ]
    return markdown_rows(("verdict", "row", "metric", "change", "base", "head", "trials"), cells, 3).rstrip()


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def _mutes(report: Report) -> Iterator[str]:
    if report.mutes:
        lines = []
        for mute in report.mutes:
            state = f"**expired on {mute.expires}: take it out of bench/mutes.toml, or renew it**"
            if mute not in report.expired:
                hits = sum(row.muted == mute for row in report.rows)
                state = f"until {mute.expires}, {hits} {'row' if hits == 1 else 'rows'} now"
            lines.append(f"- `{_cell(mute.row)}` · {_cell(mute.metric)} · {_cell(mute.reason)} · {state}")
        yield "**Mutes**\n\n" + "\n".join(lines)


def _notes(report: Report) -> Iterator[str]:
    rule = report.rule
    yield (
        f"Time: Student t over per-trial medians of paired log ratios, a process a trial; SLOWER needs a lower "
        f"{rule.confidence:.0%} bound above 0 and more than {rule.margin:.0%}, twice. Base and head in ms."
    )
    yield f"Other metrics are deterministic and compared directly: {rule.exact:.1%} or 1 MiB counts. Less is better."
    load = " → ".join(f"{one:.1f}" for one in report.load_average)
    yield f"{report.machine.cpu}, {report.machine.cores} cores; load average {load}; {report.seconds:.0f} s."
    yield from report.notes


def _commands(report: Report) -> str:
    return "\n".join(dict.fromkeys(row.repeat for row in report.rows if row.repeat))
