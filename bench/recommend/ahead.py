"""What was not measured and might win: known from the registry and the machine, with the command that would tell."""

from collections.abc import Mapping, Sequence

import msgspec

from bench.case import AXES, Case, vary
from bench.implementations import IMPLEMENTATIONS
from bench.machine import Machine
from bench.recommend.evidence import CHOICES
from bench.support import unsupported

# Tried beside each case that was measured. Every other axis is tried as it was measured, or as the person names it: a
# batch, a number of devices or of threads is the deployment's own business.
PRECISIONS = {"cpu": ("fp32", "amp_bf16"), "gpu": ("fp32", "tf32", "amp_bf16", "amp_fp16")}
LAYOUTS = ("nchw", "nhwc")
FRAMES = ("whole", "padded", "tiled")


class Ahead(msgspec.Struct, frozen=True, kw_only=True):
    """What is left to measure.

    Args:
        cases: that this machine supports, the likest to the best so far first.
        absent: implementation → why this machine lacks it, where that holds for all its cases.
    """

    cases: tuple[Case, ...]
    absent: dict[str, str]


def ahead(
    asked: Case,
    measured: Sequence[Case],
    machine: Machine,
    *,
    axes: Mapping[str, Sequence[str | int]],
    best: Case | None = None,
    larger: bool = False,
) -> Ahead:
    """The cases of a question that no record speaks of.

    Args:
        asked: the question's case.
        measured: cases with a record, whatever it says.
        machine: where they would run.
        axes: values that the person allows; an axis not named is free.
        best: the winner so far.
        larger: whether a larger batch and a further device may help: for throughput they may.
    """
    bases = dict.fromkeys(_as_asked(case, axes) for case in measured) or {_as_asked(asked, axes): None}
    tried = [case for base in bases for case in vary([base], _tried(base, axes))]
    if best is not None and larger:
        tried += [case for case in _larger(best) if _allows(case, axes) and case.implementation in IMPLEMENTATIONS]
    candidates = [case for case in dict.fromkeys(tried) if case not in set(measured)]
    reasons = {case: unsupported(case, machine) for case in candidates}
    absent: dict[str, str] = {}
    for name in IMPLEMENTATIONS:
        own = [reasons[case] for case in candidates if case.implementation == name]
        if own and all(own) and not any(case.implementation == name for case in measured):
            absent[name] = str(own[0])
    near = best or asked
    return Ahead(
        cases=tuple(
            sorted((case for case in candidates if reasons[case] is None), key=lambda case: _distance(case, near))
        ),
        absent=absent,
    )


def _tried(base: Case, axes: Mapping[str, Sequence[str | int]]) -> Mapping[str, Sequence[str | int]]:
    usual: Mapping[str, Sequence[str | int]] = {
        "implementation": tuple(IMPLEMENTATIONS),
        "precision": PRECISIONS["gpu" if base.on_gpu else "cpu"],
        "layout": LAYOUTS,
        # A multiple of 2^depth needs no padding, and a tile as large as the image is the image.
        "frame": FRAMES if _frames(base) else (base.frame,),
    }
    return {**usual, **{name: values for name, values in axes.items() if name in CHOICES}}


def _frames(base: Case) -> bool:
    return any(side % 2**base.depth for side in (base.height, base.breadth)) and base.task == "infer"


def _as_asked(case: Case, axes: Mapping[str, Sequence[str | int]]) -> Case:
    """The case with the tried axes blank, and every other choice as the person wants it, if that is one value."""
    blank = {name: getattr(Case(), name) for name in ("implementation", "precision", "layout", "frame")}
    fixed = {name: found[0] for name, found in axes.items() if len(found) == 1 and name in CHOICES}
    return msgspec.structs.replace(case, **{**blank, **fixed})


def _larger(best: Case) -> tuple[Case, Case]:
    devices = f"{best.device_count + 1}{best.devices[-3:]}"
    return msgspec.structs.replace(best, batch=2 * best.batch), msgspec.structs.replace(best, devices=devices)


def _allows(case: Case, axes: Mapping[str, Sequence[str | int]]) -> bool:
    return all(getattr(case, name) in values for name, values in axes.items())


def _distance(case: Case, near: Case) -> int:
    return sum(getattr(case, name) != getattr(near, name) for name in AXES)
