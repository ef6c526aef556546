"""The frame of the roofline: the network's stages under the ceilings that the same run measured."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from bench.derive import Place, roofline
from bench.readings import Ceiling


def frame(cases: "pd.DataFrame") -> "pd.DataFrame":
    """Stages as points, and the ceilings that their run measured as lines: a slope, bandwidth; a level, arithmetic."""
    rows = [
        {"view": case.in_roofline, "case": case.case, "rung": case.rung, "precision": case.precision, **point}
        for case in cases[cases["ceiling"].notna()].itertuples()
        for point in _under(case.ceiling, list(roofline(case.stages, case.ceiling)))
    ]
    columns = ("flop_per_byte", "tflop_per_s", "share")
    labels = ("view", "case", "rung", "precision", "kind", "stage", "bound")
    points = pd.DataFrame(rows, columns=[*labels, *columns]).astype(dict.fromkeys(columns, float))
    points["share_text"] = points["share"].map(lambda share: "" if math.isnan(share) else f"{share:.0%}")
    return points


def _under(ceiling: Ceiling, found: Sequence[Place]) -> Iterator[dict[str, Any]]:
    for place in found:
        reached = place.stage.gflop / place.stage.ms
        point = {"flop_per_byte": place.flop_per_byte, "tflop_per_s": reached, "share": place.share}
        yield {"kind": "stage", "stage": place.stage.name, "bound": place.bound, **point}
    if found:
        ridge = ceiling.tflop_per_s * 1e3 / ceiling.gb_per_s
        reach = [ridge, *(place.flop_per_byte for place in found)]
        for x in (min(reach) / 2, ridge, max(reach) * 2):
            roof = min(ceiling.tflop_per_s, ceiling.gb_per_s * x / 1e3)
            yield {"kind": "roof", "stage": "", "bound": "", "flop_per_byte": x, "tflop_per_s": roof}
