"""Tidy frames: what each chart draws, a row a mark.

A case that failed is a row with a word in place of figures; a figure that was not measured is missing, never zero.
Every frame has `view`, the scene a row is drawn in, and `case`, the row's number among all records of the page.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.derive import ceiling_of, derived
from bench.history.series import series
from bench.history.steps import steps
from bench.machine import slug
from bench.report.scenes import FREE, alone, family, rung, scene
from bench.report.table import EXACTNESS, share, three_digits
from bench.results import Record, Run

if TYPE_CHECKING:
    import pandas as pd

FIGURES = (
    *("images_per_s", "p50_ms", "p50_low_ms", "p50_high_ms", "peak_memory_mib"),
    *("rel_l2", "rel_l2_limit", "class_agreement", "first_call_ms", "energy_j_per_image"),
    *("break_even_images", "lost_to_allreduce", "lost_to_compute", "lost_to_imbalance"),
)
# An inaccurate case is told how far off it is, and nothing that could be ranked.
OF_INACCURATE = ("rel_l2", "rel_l2_limit", "class_agreement")
# More rungs than this are no ladder: then each implementation shows its fastest, and eager every precision.
RUNGS = 16
# A smaller share of a step is noise.
LOSS = 0.01
# More labels than this cover each other.
LABELS = 8


def cases(runs: Sequence[Run]) -> "pd.DataFrame":
    """One row a record of every run, with the scene it stands in for each chart."""
    import pandas as pd

    over_commits = _over_commits(runs)
    rows = [
        _row(number, run, record, follows, over_commits)
        for number, run in enumerate(runs)
        for record, follows in zip(run.records, derived(run), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=[*_LABELS, *(f"in_{chart}" for chart in FREE), *FIGURES])
    frame.insert(0, "case", range(len(frame)))
    return frame.astype(dict.fromkeys(FIGURES, float))


_LABELS = (
    *("run", "time", "commit", "id", "rung", "implementation", "family"),
    *("precision", "upsampling", "processes", "status", "word", "ceiling", "stages"),
    *("alone", "stretch", "changed", "step"),
)


def _row(
    number: int,
    run: Run,
    record: Record,
    follows: Mapping[str, float],
    over_commits: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, Any]:
    case = record.case
    shown = FIGURES if record.status == "ok" else OF_INACCURATE if record.status == "inaccurate" else ()
    env = run.header.environment
    return {
        "run": number,
        "time": env.time.isoformat(),
        "commit": env.commit[:7],
        "id": case.id,
        "rung": rung(case),
        "implementation": case.implementation,
        "family": family(case.implementation),
        "precision": case.precision,
        "upsampling": case.upsampling,
        "processes": case.device_count,
        "status": record.status,
        "word": "" if record.status == "ok" else record.status,
        "ceiling": ceiling_of(run, record),
        "stages": record.stages,
        **{f"in_{chart}": f"{number}:{scene(case, chart)}" for chart in FREE},
        "alone": f"{number}:{scene(alone(case), 'devices')}",
        # A history goes over the runs of a machine.
        "in_history": f"{slug(env.machine)}:{scene(case, 'history')}",
        **over_commits.get((run.path.stem, case.id), {}),
        **{name: _number({**record.figures, **follows}.get(name)) if name in shown else None for name in FIGURES},
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def ladder(frame: "pd.DataFrame") -> "pd.DataFrame":
    """From eager fp32 up: implementation by implementation, in each from exact to coarse precision."""
    found = _as_a_ladder(frame.assign(view=frame["in_ladder"]))
    found["roomy"] = found.groupby("view")["rung"].transform("nunique") <= LABELS
    found["order"] = found.groupby("view").cumcount()
    for name in ("images_per_s", "peak_memory_mib", "rel_l2"):
        found[f"{name}_text"] = found[name].map(three_digits)
    found["same_class"] = found["class_agreement"].map(share)
    wanted = ("images_per_s", "images_per_s_text", "peak_memory_mib", "peak_memory_mib_text")
    accuracy = ("rel_l2", "rel_l2_text", "rel_l2_limit", "same_class")
    return found[["view", "case", "rung", "order", "roomy", "family", "word", *wanted, *accuracy]]


def _as_a_ladder(frame: "pd.DataFrame") -> "pd.DataFrame":
    """In the ladder's order, and of a long one the rungs that matter."""
    ranks = frame.assign(
        rank=frame["implementation"].map(_implementation_rank), exactness=frame["precision"].map(EXACTNESS.index)
    )
    ranks = ranks.sort_values(["view", "rank", "implementation", "exactness", "case"], kind="stable")
    return ranks.loc[[number for _, group in ranks.groupby("view", sort=False) for number in _chosen(group)]]


def _implementation_rank(name: str) -> int:
    order = ("eager", "compile", "triton")
    return order.index(family(name)) if family(name) in order else len(order)


def _chosen(group: "pd.DataFrame") -> list[int]:
    if group["rung"].nunique() <= RUNGS:
        return list(group.index)
    rungs = {f"eager {precision}" for precision in EXACTNESS}
    for _, rivals in group.groupby("implementation"):
        measured = rivals["images_per_s"].notna().any()
        rungs.add(rivals.loc[rivals["images_per_s"].idxmax() if measured else rivals.index[0], "rung"])
    return list(group.index[group["rung"].isin(rungs)])


def upsampling(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Each configuration with bilinear and with transposed upsampling, where both were tried."""
    found = _as_a_ladder(frame.assign(view=frame["in_upsampling"]))
    both = found.groupby(["view", "rung"])["upsampling"].transform("nunique") > 1
    found = found[both].copy()
    speed = found.pivot_table(index=["view", "rung"], columns="upsampling", values="images_per_s", dropna=False)
    speed = speed.reindex(columns=["bilinear", "transposed"])
    ratio = (speed["bilinear"] / speed["transposed"]).rename("ratio").reset_index()
    found = found.merge(ratio, on=["view", "rung"], how="left")
    found["ratio_text"] = found["ratio"].map(lambda value: "" if math.isnan(value) else f"{value:.2f}×")
    return found[["view", "case", "rung", "upsampling", "word", "images_per_s", "ratio", "ratio_text"]]


def devices(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Throughput over the number of devices; `ideal` is the fewest devices' throughput times their number.

    One device stands in every scene that several start from it: with the batch shared out, with another strategy.
    """
    found = _from_one_device(frame.assign(view=frame["in_devices"]))
    found = found[found.groupby(["view", "rung"])["processes"].transform("nunique") > 1].copy()
    found = found.sort_values(["view", "rung", "processes"], kind="stable")
    first = found.groupby(["view", "rung"])
    # `nth`, not `first`: where the fewest devices failed there is no ideal, rather than that of somebody else.
    base = first[["view", "rung", "processes", "images_per_s"]].nth(0)
    base = base.rename(columns={"processes": "base_processes", "images_per_s": "base_images_per_s"})
    found = found.merge(base, on=["view", "rung"])
    found["ideal"] = found["base_images_per_s"] / found["base_processes"] * found["processes"]
    found["efficiency"] = found["images_per_s"] / found["ideal"]
    found["efficiency_text"] = found["efficiency"].map(lambda share: "" if math.isnan(share) else f"{share:.0%}")
    found["lost_text"] = [_lost(row) for _, row in found.iterrows()]
    known = found["processes"].where(found["images_per_s"].notna())
    found["most"] = known == known.groupby([found["view"], found["rung"]]).transform("max")
    wanted = ("images_per_s", "ideal", "efficiency", "efficiency_text", "most", "lost_text")
    return found[["view", "case", "rung", "family", "processes", "word", *wanted]]


def _from_one_device(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The frame, and once more each row of one device for the other views in which it is where several start."""
    one = frame[frame["processes"] == 1].reset_index()[["index", "in_devices"]]
    lacking = frame[~frame["view"].isin(one["in_devices"])]
    starts = lacking[["view", "alone"]].drop_duplicates()
    more = starts.merge(one, left_on="alone", right_on="in_devices")
    found = frame.loc[[*frame.index, *more["index"]]]
    return found.assign(view=[*frame["view"], *more["view"]]).reset_index(drop=True)


def _lost(row: "pd.Series") -> str:
    """Shares of a step that its ranks measured as lost, the largest first; nothing under 1 %, nor where none did."""
    causes = {"all-reduce": "lost_to_allreduce", "shared compute": "lost_to_compute", "imbalance": "lost_to_imbalance"}
    shares = sorted(((row[figure], cause) for cause, figure in causes.items()), reverse=True)
    return ", ".join(f"{cause} {share:.0%}" for share, cause in shares if share >= LOSS)


def front(frame: "pd.DataFrame", cost: str) -> "pd.DataFrame":
    """Median latency against `cost`; `front` marks the cases that no other beats in both."""
    found = frame.assign(view=frame["in_front"], cost=frame[cost])
    found = found[found["p50_ms"].notna() & found["cost"].notna()].sort_values(["view", "p50_ms", "cost"])
    least = found.groupby("view")["cost"].cummin()
    found["front"] = (found["cost"] == least) & ~found.duplicated(["view", "cost"])
    found["label"] = found["rung"] + " " + found["upsampling"]
    ends = found.groupby("view")["p50_ms"].agg(["min", "max"]).mean(axis="columns")
    found["right"] = found["p50_ms"] > found["view"].map(ends)
    found["named"] = found["front"] & (found.groupby("view")["front"].transform("sum") <= LABELS)
    for name in ("p50_ms", "cost", "images_per_s"):
        found[f"{name}_text"] = found[name].map(three_digits)
    texts = ("p50_ms_text", "cost_text", "images_per_s_text")
    return found[["view", "case", "label", "family", "upsampling", "p50_ms", "cost", "front", "named", "right", *texts]]


def break_even(frame: "pd.DataFrame") -> "pd.DataFrame":
    """After how many images a slower start has paid off against eager, as `bench.derive` says; `never` in words."""
    found = _as_a_ladder(frame.assign(view=frame["in_break_even"]))
    found = found.assign(start_s=found["first_call_ms"] / 1e3)
    found["rest"] = [label.partition(" ")[2] for label in found["rung"]]
    eager = found[(found["implementation"] == "eager") & found["images_per_s"].notna()][["view", "rest", "start_s"]]
    found = found[(found["implementation"] != "eager") & found["images_per_s"].notna()]
    found = found.merge(eager, on=["view", "rest"], suffixes=("", "_eager")).dropna(subset=["start_s", "start_s_eager"])
    # What starts no slower pays off at once; a logarithmic scale has no zero.
    found["images"] = found["break_even_images"].clip(lower=1)
    found["text"] = list(map(_pays_off, found["images"], found["images_per_s"]))
    return found[["view", "case", "rung", "family", "images", "text", "start_s", "start_s_eager"]]


def _pays_off(images: float, images_per_s: float) -> str:
    if math.isnan(images):
        return "never"
    return f"{math.ceil(images):,} image{'s' if images > 1 else ''}, {three_digits(images / images_per_s)} s"


def _over_commits(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, Any]]:
    """Run and case → which stretch of its series it is in, what changed before that, and the step that came with it."""
    found = {}
    for one in series(runs, "images_per_s"):
        came = {
            step.after.run: f"{step.change * 100:+.1f} % with "
            f"{step.commits if step.machine_change is None else 'the machine itself'}"
            for step in steps(one)
        }
        for number, stretch in enumerate(one.stretches):
            for point in stretch.points:
                place = {"stretch": number, "changed": stretch.changed, "step": came.get(point.run, "")}
                found[point.run, one.case] = place
    return found


def history(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Throughput of each configuration over commits, as `python -m bench history` follows it; one run is no history."""
    found = frame.assign(view=frame["in_history"])
    found = found[found["stretch"].notna() & found["images_per_s"].notna()]
    found = found[found.groupby(["view", "rung"])["run"].transform("nunique") > 1]
    found = found.sort_values(["view", "rung", "time"], kind="stable")
    found["line"] = found["rung"] + " " + found["stretch"].astype(int).astype(str)
    wanted = ("images_per_s", "p50_ms", "p50_low_ms", "p50_high_ms", "changed", "step")
    return found[["view", "case", "rung", "family", "line", "time", "commit", *wanted]]
