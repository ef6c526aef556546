"""The whole answer to each question that runs speak of, and measuring what they lack."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.case import Case, parse_id, vary
from bench.machine import Machine, machine, slug, usable_gpus
from bench.matrix import completed
from bench.recommend.ahead import ahead
from bench.recommend.decide import Decision, decide
from bench.recommend.evidence import CHOICES, Question, questions, weigh
from bench.recommend.limits import Limits
from bench.report.table import conditions
from bench.results import RESULTS, ResultsError, Run, Settings

if TYPE_CHECKING:
    from rich.console import Console

    from bench.weights import Weights

Axes = Mapping[str, Sequence[str | int]]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One question and its answer, for exactly the machine, network, size and cases measured.

    Args:
        question: what was decided.
        conditions: where, when and on which sources it was measured, a line a run.
        limits: what had to be kept to.
        decision: winner, front, losers.
        not_measured: cases without a record that this machine could run, the likest to the winner first.
        absent: implementation → why the machine lacks it.
    """

    question: Question
    conditions: tuple[str, ...]
    limits: Limits
    decision: Decision
    not_measured: tuple[str, ...]
    absent: dict[str, str]


def answers(runs: Sequence[Run], limits: Limits, *, axes: Axes, weights: str | None) -> list[Answer]:
    """Decide every question that the runs speak of.

    Args:
        runs: in any order.
        limits: what to keep to.
        axes: only cases with these values; an axis not named is free.
        weights: only runs with the weights of this hash; None for all.
    """
    here = machine()
    found = []
    for question, measured in questions(runs).items():
        # As it is now, if it is the one that was measured: something may have been installed since.
        there = here if slug(here) == question.machine else measured[-1][0].header.environment.machine
        wanted = completed(axes, there)
        chosen = [
            (run, record)
            for run, record in measured
            if all(getattr(record.case, name) in values for name, values in wanted.items())
        ]
        if not chosen or (weights is not None and question.weights != weights):
            continue
        decision = decide(weigh(chosen, limits.percentile), limits)
        # Not from its id: who registers its implementation need not be loaded to read of it.
        cases = {record.case.id: record.case for _, record in chosen}
        left = ahead(
            question.asked,
            list(cases.values()),
            there,
            axes=wanted,
            best=cases[decision.winner.id] if decision.winner is not None else None,
            larger=limits.objective == "throughput",
        )
        found.append(
            Answer(
                question=question,
                conditions=tuple(dict.fromkeys(conditions(run) for run, _ in chosen)),
                limits=limits,
                decision=decision,
                not_measured=tuple(case.id for case in left.cases),
                absent=left.absent,
            )
        )
    return found


def measure(
    found: Sequence[Answer], console: "Console", *, axes: Axes, settings: Settings, results: Path = RESULTS
) -> Run | None:
    """Measure what the answers lack, in a run of its own.

    Args:
        found: the answers so far; without any, the cases that `axes` name are measured.
        console: where to say how it goes.
        axes: as for `answers`.
        settings: how to measure.
        results: folder of all results.

    Raises:
        ResultsError: the runs are of another machine or of other weights, or the file cannot be written.
    """
    from bench.options import Options
    from bench.session import Session

    here = machine()
    if foreign := [one.question.machine for one in found if one.question.machine != slug(here)]:
        raise ResultsError(f"the runs are of {foreign[0]}, and this machine is {slug(here)}: --measure adds to its own")
    own = settings.weights.sha256 if settings.weights is not None else ""
    if other := [one.question.weights for one in found if one.question.weights != own]:
        raise ResultsError(f"the runs are of weights {other[0][:12]}: --measure needs their file, --weights FILE")
    lacking = [parse_id(text) for one in found for text in one.not_measured]
    cases = lacking if found else list(_fresh(here, axes, settings.weights))
    if not cases:
        return None
    session = Session(Options(chosen=tuple(cases), settings=settings, results=results))
    session.open(cases, console)
    try:
        for case in cases:
            session.measure(case, console)
    finally:
        run = session.close()
    return run


def _fresh(here: Machine, axes: Axes, weights: "Weights | None") -> Sequence[Case]:
    """All that could be measured where nothing is yet."""
    axes = completed(axes, here)
    named = {**axes, **(weights.axes if weights else {})}
    asked = vary(
        [Case(devices="1gpu" if usable_gpus(here) else "1cpu")],
        {name: values for name, values in named.items() if name not in CHOICES},
    )
    return [case for one in asked for case in ahead(one, (), here, axes=axes).cases]
