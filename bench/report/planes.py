"""The charts of points in a plane: Pareto front, roofline, samples in time."""

from typing import Any

import altair as alt

from bench.report.theme import BAD, INK, LINE, SERIES, SOFT, dressed

# What stands beside the plot: the page subtracts it from the room there is.
VALUES = 62

Data = Any  # a pandas frame, or alt.NamedData
Chart = Any  # altair's charts share no public type


def _values(title: str, **more: Any) -> alt.Axis:  # noqa: ANN401 (altair's own arguments)
    return alt.Axis(title=title, minExtent=VALUES - 16, maxExtent=VALUES - 16, domain=False, ticks=False, **more)


def front(data: Data, colours: alt.Scale, width: int, cost: str) -> Chart:
    """Median latency against `cost`: to the left and down is better; the line is what no other case beats in both."""
    zoomed = alt.Scale(zero=False, nice=True, padding=12)
    base = alt.Chart(data).encode(
        x=alt.X("p50_ms:Q", axis=alt.Axis(title="p50 latency, ms", tickCount=6, grid=False), scale=zoomed),
        y=alt.Y("cost:Q", axis=_values(cost, tickCount=5), scale=zoomed),
    )
    words = [
        alt.Tooltip("label:N", title="case"),
        alt.Tooltip("p50_ms_text:N", title="p50 ms"),
        alt.Tooltip("cost_text:N", title=cost),
        alt.Tooltip("images_per_s_text:N", title="images a second"),
    ]
    best, named = base.transform_filter("datum.front"), base.transform_filter("datum.named")
    shape = alt.Scale(domain=["bilinear", "transposed"], range=["circle", "diamond"])
    return dressed(
        alt.layer(
            best.mark_line(interpolate="step-after", color=SOFT, strokeDash=[4, 3], strokeWidth=1.5),
            base.mark_point(filled=True, size=110, cursor="pointer").encode(
                # In another place than the colours: on a phone a legend that is wider than the plot would shrink it.
                color=alt.Color("family:N", scale=colours),
                shape=alt.Shape("upsampling:N", scale=shape, legend=alt.Legend(symbolFillColor=SOFT, orient="bottom")),
                opacity=alt.condition("datum.front", alt.value(1), alt.value(0.45)),
                tooltip=words,
            ),
            # Towards the middle: a label that stood out of the plot would shrink all of it to fit the page.
            named.transform_filter("!datum.right")
            .mark_text(align="left", dx=9, dy=-9, fontSize=11, color=INK)
            .encode(text="label:N"),
            named.transform_filter("datum.right")
            .mark_text(align="right", dx=-9, dy=-9, fontSize=11, color=INK)
            .encode(text="label:N"),
        ).properties(width=width, height=320)
    )


def samples(data: Data, width: int, *, clocks: bool) -> Chart:
    """Durations as the steps ran, marked where the device was held down; under them, if `clocks`, its clock."""
    axis = alt.Axis(title="seconds of timed steps", tickCount=6, grid=False)
    base = alt.Chart(data).encode(x=alt.X("at_s:Q", axis=axis, scale=alt.Scale(nice=False)))
    y = alt.Y("ms:Q", axis=_values("ms a step", tickCount=5), scale=alt.Scale(zero=False, nice=True))
    words = [
        alt.Tooltip("at_s:Q", title="after s", format=".3~f"),
        alt.Tooltip("ms:Q", title="ms", format=".4~g"),
        alt.Tooltip("mhz:Q", title="clock MHz"),
        alt.Tooltip("mark:N", title="held down by"),
    ]
    steps = alt.layer(
        # Thinned samples stand for several steps: their range is drawn behind the median.
        base.mark_rule(color=LINE, strokeWidth=3).encode(y=alt.Y("low_ms:Q"), y2="high_ms:Q"),
        base.mark_line(color=SOFT, strokeWidth=1, opacity=0.6).encode(y=y),
        base.transform_filter("datum.mark === ''")
        .mark_point(filled=True, size=26, opacity=1, color="var(--s1)")
        .encode(y=y, tooltip=words),
        base.transform_filter("datum.mark !== ''")
        .mark_point(filled=True, size=60, opacity=1, color=BAD, shape="triangle-down")
        .encode(y=y, tooltip=words),
    ).properties(width=width, height=220)
    if not clocks:
        return dressed(steps)
    clock = alt.Y("mhz:Q", axis=_values("clock, MHz", tickCount=3), scale=alt.Scale(zero=False, nice=True))
    line = base.mark_line(interpolate="step", color="var(--s2)", strokeWidth=1.5).encode(y=clock, tooltip=words)
    both = alt.vconcat(steps, line.properties(width=width, height=80), spacing=8)
    return dressed(both.resolve_scale(x="shared"))


def roofline(data: Data, width: int) -> Chart:
    """Stages on arithmetic intensity against reached TFLOP/s, under the ceilings that the same run measured."""
    log = alt.Scale(type="log", nice=True)
    base = alt.Chart(data).encode(
        x=alt.X("flop_per_byte:Q", axis=alt.Axis(title="FLOP per byte", format="~g", grid=False), scale=log),
        y=alt.Y("tflop_per_s:Q", axis=_values("TFLOP/s", format="~g"), scale=log),
        color=alt.Color("precision:N", scale=alt.Scale(range=[*SERIES[1:], SERIES[0]])),
    )
    words = [
        alt.Tooltip("rung:N", title="case"),
        alt.Tooltip("stage:N"),
        alt.Tooltip("tflop_per_s:Q", title="TFLOP/s", format=".3~g"),
        alt.Tooltip("flop_per_byte:Q", title="FLOP per byte", format=".3~g"),
        alt.Tooltip("share_text:N", title="of its roof"),
        alt.Tooltip("bound:N", title="bound by"),
    ]
    stages = base.transform_filter("datum.kind === 'stage'")
    roofs = base.transform_filter("datum.kind === 'roof'")
    return dressed(
        alt.layer(
            roofs.mark_line(strokeWidth=2, opacity=0.6).encode(detail="rung:N"),
            stages.mark_point(filled=True, size=80, opacity=1, cursor="pointer").encode(tooltip=words),
            stages.mark_text(align="left", dx=8, fontSize=11, color=INK).encode(text="stage:N", color=alt.value(INK)),
        ).properties(width=width, height=320)
    )
