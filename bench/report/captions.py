"""What a chart shows, in a sentence beneath it: for whom the sentence is enough, and for whom there is no picture."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def ladder(rows: "pd.DataFrame") -> str:
    """The fastest against the first rung, what it needs, and how many have no figure and why."""
    measured = rows[rows["images_per_s"].notna()]
    if measured.empty:
        return f"Nothing could be measured: {_words(rows)}."
    best, first = measured.loc[measured["images_per_s"].idxmax()], rows.iloc[0]
    said = f"Fastest: {best['rung']} with {best['images_per_s_text']} images a second"
    if best["case"] != first["case"] and first["images_per_s"] > 0:
        said += f", {best['images_per_s'] / first['images_per_s']:.2f}× {first['rung']}"
    if best["peak_memory_mib"] > 0:
        said += f", in {best['peak_memory_mib_text']} MiB"
    failed = len(rows) - len(measured)
    return said + (f". {failed} of {len(rows)} have no speed: {_words(rows)}." if failed else ".")


def _words(rows: "pd.DataFrame") -> str:
    return ", ".join(sorted(set(rows["word"]) - {""}))


def upsampling(rows: "pd.DataFrame") -> str:
    """The span of the ratio, bilinear over transposed."""
    ratios = rows["ratio"].dropna()
    if ratios.empty:
        return "In no configuration did both succeed."
    low, high = f"{ratios.min():.2f}×", f"{ratios.max():.2f}×"
    span = low if low == high else f"{low} to {high}"
    return f"Bilinear does {span} the images a second of transposed; it is another network, with fewer parameters."


def devices(rows: "pd.DataFrame") -> str:
    """The share of the ideal that the most devices reach, and what took the rest."""
    most = rows[(rows["processes"] > 1) & rows["efficiency"].notna()]
    if most.empty:
        return f"More than one device gave no figure: {_words(rows) or 'nothing to compare with'}."
    best = most.loc[most["processes"].idxmax()]
    said = f"{best['rung']} on {best['processes']} devices reaches {best['efficiency_text']} of the dashed ideal"
    if not best["lost_text"]:
        return f"{said}; what the rest was lost to is not recorded."
    return f"{said}; its ranks found the time of a step lost to {best['lost_text']}."


def front(rows: "pd.DataFrame") -> str:
    """How many are on the front."""
    best = int(rows["front"].sum())
    return f"{best} of {len(rows)} are beaten by no other in both; the others are faded. A point leads to its case."


def break_even(rows: "pd.DataFrame") -> str:
    """The soonest, and how many never pay off."""
    known = rows[rows["images"].notna()]
    never = len(rows) - len(known)
    said = "A first call with an empty compiler cache, against that of eager at the same precision."
    if not known.empty:
        soonest = known.loc[known["images"].idxmin()]
        said += f" Soonest: {soonest['rung']} after {soonest['text']}."
    return said + (f" {never} of {len(rows)} gain nothing." if never else "")


def history(rows: "pd.DataFrame") -> str:
    """How many runs, the largest change from first to last while conditions were the same, and how many steps."""
    ends = rows.groupby(["rung", "line"])["images_per_s"].agg(["first", "last"])
    change = ends["last"] / ends["first"]
    most = (change - 1).abs().idxmax()
    said = f"{rows['time'].nunique()} runs; from first to last {most[0]} changed most: {change[most]:.2f}× as fast."
    count = int((rows["step"] != "").sum())
    said += (
        f" {count} step{'s' if count > 1 else ''}, ringed."
        if count
        else " No step, which takes three runs on each side."
    )
    if (rows["changed"] != "").any():
        said += " A line ends where versions or harness changed: nothing beyond is comparable."
    return said


def roofline(rows: "pd.DataFrame") -> str:
    """The stage furthest below its roof."""
    stages = rows[rows["kind"] == "stage"]
    worst = stages.loc[stages["share"].idxmin()]
    said = "Stages of eager under the ceilings that the same run measured: a large product and a large copy."
    furthest = f"{worst['stage']} of {worst['rung']}, at {worst['share_text']}, bound by {worst['bound']}"
    return f"{said} Furthest below: {furthest}."
