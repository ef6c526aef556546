"""The charts of bars and lines: ladder, upsampling, devices, break-even, history.

Each takes a tidy frame of `bench.report.frames`, or a named place where the page puts the rows of a view, and gives a
chart whose size is `width` without its axes. A case that failed is its status in words, where its bar would stand.
"""

from typing import Any

import altair as alt

from bench.report.table import DASH
from bench.report.theme import BAD, INK, LINE, PAPER, SOFT, dressed

# What stands beside the plot: the page subtracts it from the room there is.
VALUES = 46
NAMES = 170

Data = Any  # a pandas frame, or alt.NamedData
Chart = Any  # altair's charts share no public type

_FAILED = "datum.word !== ''"
_CASE = alt.Tooltip("rung:N", title="case")


def _values(title: str | None = None, **more: Any) -> alt.Axis:  # noqa: ANN401 (altair's own arguments)
    """An axis as wide as that of the panel above and below it."""
    return alt.Axis(title=title, minExtent=VALUES, maxExtent=VALUES, tickCount=4, domain=False, ticks=False, **more)


def ladder(data: Data, colours: alt.Scale, width: int) -> Chart:
    """Throughput, under it peak memory, under it the error against fp32 eager, one column a configuration."""
    names = alt.Axis(title=None, labelAngle=-40, ticks=False, labelPadding=4, labelLimit=NAMES)
    blank = alt.Axis(title=None, labels=False, ticks=False)

    def panel(height: int, title: str, axis: alt.Axis, *layers: Chart) -> Chart:
        x = alt.X("rung:N", sort=alt.EncodingSortField("order", op="min"), axis=axis, scale=alt.Scale(padding=0.25))
        return alt.layer(*[layer.encode(x=x) for layer in layers]).properties(width=width, height=height, title=title)

    base = alt.Chart(data)
    absent = base.mark_text(color=SOFT, baseline="bottom", dy=-3)
    failed = (
        base.transform_filter(_FAILED)
        .mark_text(angle=270, align="left", baseline="middle", fontSize=11, color=BAD, dx=2)
        .encode(y=alt.datum(0), text="word:N", tooltip=[_CASE, alt.Tooltip("word:N", title="status")])
    )

    def bars(field: str, title: str, opacity: float) -> list[Chart]:
        y = alt.Y(f"{field}:Q", axis=_values(grid=opacity == 1), scale=alt.Scale(zero=True, nice=True))
        tooltip = [_CASE, alt.Tooltip(f"{field}_text:N", title=title)]
        shown = base.transform_filter(f"isValid(datum.{field})").encode(y=y, tooltip=tooltip)
        bar = shown.mark_bar(opacity=opacity, cornerRadiusEnd=2).encode(
            color=alt.Color("family:N", scale=colours, legend=None)
        )
        return [bar, shown.mark_text(dy=-6, fontSize=11, color=INK).encode(text=f"{field}_text:N")]

    def none(field: str, at: Any) -> Chart:  # noqa: ANN401 (a place of altair's)
        return absent.transform_filter(f"!isValid(datum.{field})").encode(y=at, text=alt.value(DASH))

    # Two right evaluations in fp32 differ by some 1e-7.
    error = alt.Y("rel_l2:Q", axis=_values(format="~e"), scale=alt.Scale(type="log", domainMin=1e-8, nice=True))
    measured = base.transform_filter("datum.rel_l2 > 0").encode(y=error)
    accuracy = [
        # The limit first: an axis that holds it shows at once how far below it one is.
        base.transform_filter("isValid(datum.rel_l2_limit)")
        .mark_tick(color=BAD, thickness=2, bandSize=26)
        .encode(y=alt.Y("rel_l2_limit:Q"), tooltip=[_CASE, alt.Tooltip("rel_l2_limit:Q", title="limit", format=".2e")]),
        measured.mark_point(filled=True, size=60, opacity=1).encode(
            color=alt.Color("family:N", scale=colours, legend=None),
            tooltip=[
                _CASE,
                alt.Tooltip("rel_l2_text:N", title="relative L2"),
                alt.Tooltip("same_class:N", title="same class as fp32 eager"),
            ],
        ),
        measured.transform_filter("datum.roomy").mark_text(dy=13, fontSize=10, color=INK).encode(text="rel_l2_text:N"),
        base.transform_filter("datum.rel_l2 === 0")
        .mark_text(fontSize=11, color=SOFT, baseline="bottom")
        .encode(y=alt.value(118), text=alt.value("exact")),
    ]
    return dressed(
        alt.vconcat(
            panel(190, "images a second", blank, *bars("images_per_s", "images a second", 1), failed),
            panel(
                110,
                "peak memory, MiB",
                blank,
                *bars("peak_memory_mib", "peak MiB", 0.55),
                none("peak_memory_mib", alt.datum(0)),
            ),
            panel(120, "relative L2 error, and its limit as a line", names, *accuracy, none("rel_l2", alt.value(118))),
            spacing=18,
        )
    )


def upsampling(data: Data, width: int) -> Chart:
    """Two points a configuration, joined; beside them how many times faster bilinear is."""
    pair = alt.Scale(domain=["bilinear", "transposed"], range=["var(--s1)", "var(--s2)"])
    base = alt.Chart(data).encode(y=alt.Y("rung:N", sort=None, axis=_names()))
    x = alt.X("images_per_s:Q", axis=alt.Axis(title="images a second", tickCount=5), scale=alt.Scale(zero=True))
    known = base.transform_filter("isValid(datum.images_per_s)")
    link = known.mark_rule(color=LINE, strokeWidth=3).encode(x=alt.X("min(images_per_s):Q"), x2="max(images_per_s):Q")
    points = known.mark_point(filled=True, size=90, opacity=1).encode(
        x=x,
        color=alt.Color("upsampling:N", scale=pair),
        shape=alt.Shape("upsampling:N", scale=alt.Scale(domain=pair.domain, range=["circle", "diamond"])),
        tooltip=[_CASE, "upsampling:N", alt.Tooltip("images_per_s:Q", title="images a second", format=".3s")],
    )
    ratio = (
        base.transform_filter("isValid(datum.ratio) && datum.upsampling === 'bilinear'")
        .mark_text(align="left", dx=10, fontSize=11, color=INK)
        .encode(x=x, text="ratio_text:N")
    )
    # Where both failed alike one word stands for both.
    failed = (
        base.transform_filter(_FAILED)
        .transform_aggregate(word="min(word)", upsampling="min(upsampling)", groupby=["rung"])
        .mark_text(align="left", dx=4, fontSize=11, color=BAD)
        .encode(x=alt.datum(0), text="word:N")
    )
    return dressed(alt.layer(link, points, ratio, failed).properties(width=width, height=alt.Step(26)))


def _names() -> alt.Axis:
    return alt.Axis(title=None, minExtent=NAMES, maxExtent=NAMES, ticks=False, domain=False, labelLimit=NAMES - 8)


def devices(data: Data, colours: alt.Scale, width: int) -> Chart:
    """Throughput over devices, dashed what it would be if none waited for another, and the share the most reach."""
    x = alt.X("processes:O", axis=alt.Axis(title="devices", labelAngle=0))
    y = alt.Y("images_per_s:Q", axis=_values("images a second"), scale=alt.Scale(zero=True))
    base = alt.Chart(data).encode(x=x, detail="rung:N")
    colour = alt.Color("family:N", scale=colours, legend=None)
    ideal = base.transform_filter("isValid(datum.ideal)").encode(y=alt.Y("ideal:Q"), color=colour)
    known = base.transform_filter("isValid(datum.images_per_s)").encode(y=y, color=colour)
    words = [_CASE, "processes:O", alt.Tooltip("images_per_s:Q", title="images a second", format=".3s")]
    words += [alt.Tooltip("efficiency_text:N", title="of the ideal"), alt.Tooltip("lost_text:N", title="step lost to")]
    last = "datum.most && datum.processes > 1 && datum.efficiency_text !== ''"
    return dressed(
        alt.layer(
            ideal.mark_line(strokeDash=[5, 4], strokeWidth=1.2, opacity=0.8),
            known.mark_line(strokeWidth=2),
            known.mark_point(filled=True, size=70, opacity=1).encode(tooltip=words),
            base.transform_filter(last)
            .mark_text(align="left", dx=8, fontSize=11, color=INK)
            .encode(y=y, text="efficiency_text:N"),
            base.transform_filter(_FAILED).mark_text(dy=-8, color=BAD).encode(y=alt.datum(0), text="word:N"),
        ).properties(width=width, height=230)
    )


def break_even(data: Data, colours: alt.Scale, width: int) -> Chart:
    """Images after which the slower start is made up for, on a logarithmic scale; `never` in words."""
    base = alt.Chart(data).encode(y=alt.Y("rung:N", sort=None, axis=_names()))
    axis = alt.Axis(title="images", format="~s", grid=False)
    x = alt.X("images:Q", axis=axis, scale=alt.Scale(type="log", nice=True))
    known = base.transform_filter("isValid(datum.images)").encode(x=x)
    text = alt.Tooltip("text:N", title="pays off after")
    return dressed(
        alt.layer(
            known.mark_point(filled=True, size=90, opacity=1).encode(
                color=alt.Color("family:N", scale=colours, legend=None), tooltip=[_CASE, text]
            ),
            known.mark_text(dy=-12, fontSize=11, color=INK).encode(text="text:N"),
            base.transform_filter("!isValid(datum.images)")
            .mark_text(align="left", fontSize=11, color=BAD)
            .encode(x=alt.value(4), text="text:N"),
        ).properties(width=width, height=alt.Step(34))
    )


def history(data: Data, colours: alt.Scale, width: int) -> Chart:
    """Throughput of each configuration over runs: a line while conditions are the same, a ring where it stepped."""
    when = alt.Axis(title="UTC", format="%m-%d %H:%M", tickCount=4, labelOverlap=True)
    base = alt.Chart(data).encode(
        x=alt.X("time:T", axis=when, scale=alt.Scale(type="utc")),
        y=alt.Y("images_per_s:Q", axis=_values("images a second"), scale=alt.Scale(zero=False, nice=True)),
        color=alt.Color("family:N", scale=colours),
    )
    words = [_CASE, alt.Tooltip("commit:N"), alt.Tooltip("images_per_s:Q", title="images a second", format=".3s")]
    words += [alt.Tooltip("step:N"), alt.Tooltip("changed:N", title="conditions changed")]
    stepped = base.transform_filter("datum.step !== ''")
    return dressed(
        alt.layer(
            base.mark_line(strokeWidth=1.5).encode(detail="line:N"),
            base.mark_point(filled=True, size=55, opacity=1, stroke=PAPER).encode(tooltip=words),
            stepped.mark_point(size=220, strokeWidth=2, color=INK).encode(color=alt.value(INK), tooltip=words),
            stepped.mark_text(dy=-16, fontSize=11).encode(text="step:N", color=alt.value(INK)),
        ).properties(width=width, height=230)
    )
