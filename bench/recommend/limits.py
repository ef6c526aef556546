"""The limits of a deployment: what a case breaks, how near it is, and which limit to relax by how much."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from bench.recommend.evidence import FIGURE, HIGHER_IS_BETTER, Evidence, Quantity
from bench.report.table import three_digits
from bench.statistics import ENOUGH

UNITS: Mapping[Quantity, str] = {
    "latency": "ms",
    "throughput": "img/s",
    "memory": "MiB",
    "energy": "J an image",
    "agreement": "",
}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the deployment must keep to, and what it shall be best in.

    Args:
        max_latency_ms: longest duration of a step at `percentile`.
        percentile: 10, 50, 90 or 99.
        max_memory_mib: most memory of a process, as measured: `peak_memory_kind` says of what.
        min_agreement: least share of pixels with the class that fp32 eager gives.
        max_joules: most energy an image.
        objective: latency, memory and energy are better small, throughput is better large.
    """

    max_latency_ms: float | None = None
    percentile: int = 50
    max_memory_mib: float | None = None
    min_agreement: float | None = None
    max_joules: float | None = None
    objective: Literal["throughput", "latency", "memory", "energy"] = "throughput"

    def given(self) -> Mapping[Quantity, float]:
        """The limits that were set."""
        every: Mapping[Quantity, float | None] = {
            "latency": self.max_latency_ms,
            "memory": self.max_memory_mib,
            "energy": self.max_joules,
            "agreement": self.min_agreement,
        }
        return {quantity: limit for quantity, limit in every.items() if limit is not None}


OPTION: Mapping[Quantity, str] = {
    "latency": "--max-latency-ms",
    "memory": "--max-memory-mib",
    "energy": "--max-joules",
    "agreement": "--min-agreement",
}


class Relaxation(msgspec.Struct, frozen=True, kw_only=True):
    """One limit to relax, all others kept, and the case that then fits."""

    option: str
    given: float
    to: float
    id: str


def rank(one: Evidence, quantity: Quantity) -> float:
    """Smaller is better."""
    value = one.estimates[quantity].value
    return -value if quantity in HIGHER_IS_BETTER else value


def borderline(one: Evidence, limits: Limits) -> Iterator[str]:
    """Limits that a case keeps by its estimate and may break by its interval."""
    for quantity, limit in limits.given().items():
        interval = one.estimates[quantity]
        worst = interval.low if quantity in HIGHER_IS_BETTER else interval.high
        if _exceeds(worst, limit, quantity):
            yield f"{quantity} may break its limit: {_number(worst, quantity)} is possible, {limit:g} is allowed"


def _exceeds(value: float, limit: float, quantity: Quantity) -> bool:
    return value < limit if quantity in HIGHER_IS_BETTER else value > limit


def _number(value: float, quantity: Quantity) -> str:
    return f"{value:.4f}" if quantity == "agreement" else f"{three_digits(value)} {UNITS[quantity]}".strip()


class Broken(msgspec.Struct, frozen=True):
    """One limit that a case does not keep; `value` is None where that cannot be told."""

    quantity: Quantity
    limit: float
    value: float | None
    reason: str


def breaks(one: Evidence, limits: Limits) -> Iterator[Broken]:
    """Every limit that a case does not keep, and each that it cannot be judged by; the objective must be known too."""
    wanted = dict(limits.given())
    if limits.objective not in one.estimates and limits.objective not in wanted:
        yield Broken(limits.objective, 0.0, None, _unmeasured(one, limits.objective, limits))
    for quantity, limit in wanted.items():
        if quantity not in one.estimates:
            yield Broken(quantity, limit, None, _unmeasured(one, quantity, limits))
            continue
        value = one.estimates[quantity].value
        if _exceeds(value, limit, quantity):
            times = abs(value / limit) if limit else float("inf")
            much = "" if quantity == "agreement" else f", {three_digits(times)} times as much"
            yield Broken(
                quantity, limit, value, f"{quantity} {_number(value, quantity)}, limit {_number(limit, quantity)}{much}"
            )


def _unmeasured(one: Evidence, quantity: Quantity, limits: Limits) -> str:
    if quantity == "latency":
        samples, step_ms = one.figure("samples"), one.figure("wall_step_ms") or one.figure("p50_ms")
        wanted = ENOUGH[limits.percentile]
        longer = f": measure it with --measure-s {1.5 * wanted * step_ms / 1000 + 1:.0f}" if step_ms else ""
        return f"p{limits.percentile} is not recorded, {samples or 0:.0f} samples of the {wanted} it needs{longer}"
    if quantity == "agreement" and one.figure(FIGURE[quantity]) is not None:
        return "agreement of classes says nothing about this network on this picture"
    return f"{quantity} was not measured"


def single(ran: Sequence[Evidence], limits: Limits) -> Iterator[Relaxation]:
    """For each limit the case that needs it relaxed the least, among those that keep all the others."""
    for quantity, limit in limits.given().items():
        near = [one for one in ran if [broken.quantity for broken in breaks(one, limits)] == [quantity]]
        near = [one for one in near if quantity in one.estimates]
        if near:
            nearest = min(near, key=lambda one: rank(one, quantity))
            value = nearest.estimates[quantity].value
            yield Relaxation(option=OPTION[quantity], given=limit, to=_rounded(value, quantity), id=nearest.case.id)


def _rounded(value: float, quantity: Quantity) -> float:
    """A limit that lets the value in, in three digits."""
    if quantity == "agreement":
        return value
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return round(math.ceil(value / scale) * scale, 12)


def change(relaxation: Relaxation) -> float:
    """By which share of itself the limit moves."""
    return abs(relaxation.to - relaxation.given) / abs(relaxation.given or 1.0)


def fewest(ran: Sequence[Evidence], limits: Limits) -> Iterator[Relaxation]:
    """What the case with the fewest broken limits breaks, if it can be judged by each."""
    judged = {one.case.id: list(breaks(one, limits)) for one in ran}
    whole = {id_: broken for id_, broken in judged.items() if broken and all(b.value is not None for b in broken)}
    if not whole:
        return
    id_ = min(whole, key=lambda one: len(whole[one]))
    for broken in whole[id_]:
        value = _rounded(broken.value, broken.quantity) if broken.value is not None else broken.limit
        yield Relaxation(option=OPTION[broken.quantity], given=broken.limit, to=value, id=id_)
