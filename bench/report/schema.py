"""The schema of a run file, field by field, from the types and the metrics themselves. Imports torch: metrics do."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from bench import derive
from bench.case import AXES, Case, allowed
from bench.environment import Environment
from bench.gpus import Gpu
from bench.machine import Machine
from bench.readings import Block, Ceiling, Stage
from bench.report.table import markdown_rows
from bench.results import Header, Record, Settings, explained


def markdown() -> str:
    """All of it in Markdown."""
    return "\n".join(_parts())


def _parts() -> Iterator[str]:
    from bench.engine import measure
    from bench.engine.metric import metrics

    yield "## First line\n"
    yield _fields(Header)
    for heading, struct in (("environment", Environment), ("environment.machine", Machine), ("a GPU", Gpu)):
        yield f"**{heading}**\n"
        yield _fields(struct)
    yield "**settings**\n"
    yield _fields(Settings)
    yield "**a ceiling** (`--ceilings`)\n"
    yield _fields(Ceiling)
    yield "## Each further line: a record\n"
    yield _fields(Record)
    yield "**a block**, an array in this order\n"
    yield _fields(Block)
    yield "**a stage** (`--stages`)\n"
    yield _fields(Stage)
    yield "**case**: the axes, each a field and a part of the id; *rare* ones are left out of the id at their default\n"
    defaults = dict(zip(Case.__struct_fields__, Case.__struct_defaults__, strict=True))
    rows = [(f"`{name}`", axis.help, _values(name), f"`{defaults[name]}`") for name, axis in AXES.items()]
    yield _table(("axis", "meaning", "values", "default"), rows)
    yield "## Figures\n"
    yield "**of the case's process**\n"
    yield _figures(measure.COLUMNS)
    for metric in metrics():
        if metric.columns:
            yield f"**{type(metric).__name__.lower()}**: {_first(type(metric))}\n"
            yield _figures(metric.columns)
    yield "**derived**, in no record: of `report --csv`, of the frame and of the page\n"
    yield _figures(derive.COLUMNS)


def _values(axis: str) -> str:
    # Which implementations there are depends on what is loaded.
    return "`python -m bench list --axes` names them" if axis == "implementation" else allowed(axis)


def _figures(columns: Mapping[str, str]) -> str:
    return _table(("figure", "meaning"), [(f"`{name}`", meaning) for name, meaning in columns.items()])


def _fields(struct: type[msgspec.Struct]) -> str:
    """A table of a type's fields, explained by its docstring.

    Raises:
        TypeError: the docstring leaves a field out.
    """
    told = explained(struct)
    if missing := [name for name in struct.__struct_fields__ if name not in told]:
        raise TypeError(f"{struct.__name__}: its docstring does not explain {', '.join(missing)}")
    return _table(("field", "meaning"), [(f"`{name}`", told[name]) for name in struct.__struct_fields__])


def _first(thing: Any) -> str:  # noqa: ANN401 (a class or a function)
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return markdown_rows(headings, [[cell.replace("|", "\\|") for cell in row] for row in rows], len(headings))
