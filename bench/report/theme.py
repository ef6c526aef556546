"""Colours and signs of every chart. They are CSS variables, so that one drawing serves light and dark.

Series: after Okabe and Ito, told apart by people with any common colour blindness, lightened on dark ground. The
baseline is grey: what is compared with stands back. No chart relies on colour alone.
"""

import re
from collections.abc import Iterable
from typing import Any

import altair as alt

FONT = "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2024",
    "soft": "#5b6470",
    "line": "#d5d9de",
    "s0": "#8a939e",
    "s1": "#0072b2",
    "s2": "#d55e00",
    "s3": "#009e73",
    "s4": "#b8548f",
    "s5": "#c78a00",
    "s6": "#3a9bd1",
    "bad": "#b3261e",
}
DARK = {
    "paper": "#14171a",
    "ink": "#e7eaed",
    "soft": "#a3adb8",
    "line": "#363c43",
    "s0": "#98a2ad",
    "s1": "#4fb0ee",
    "s2": "#ff8f45",
    "s3": "#2fc79a",
    "s4": "#e79ac6",
    "s5": "#f0b63f",
    "s6": "#9ad4f5",
    "bad": "#ff9d94",
}
INK, SOFT, LINE, PAPER, BAD = ("var(--ink)", "var(--soft)", "var(--line)", "var(--paper)", "var(--bad)")
SERIES = tuple(f"var(--s{number})" for number in range(7))
FIRST = ("eager", "compile", "triton")


def families(found: Iterable[str]) -> alt.Scale:
    """A colour for each family of implementations, the same in every chart of a page."""
    seen = set(found)
    known = [*FIRST, *sorted(seen - set(FIRST))]
    colours = {name: SERIES[number % len(SERIES)] for number, name in enumerate(known) if name in seen}
    return alt.Scale(domain=list(colours), range=list(colours.values()))


def dressed(chart: Any) -> Any:  # noqa: ANN401 (any of altair's charts, which share no public type)
    """The chart with the look that all have."""
    text = {"labelColor": SOFT, "titleColor": SOFT, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": 400}
    return (
        chart.configure(font=FONT, background=PAPER, padding=4)
        .configure_view(stroke=None)
        .configure_axis(**text, domainColor=LINE, tickColor=LINE, gridColor=LINE, gridOpacity=0.6, labelLimit=170)
        .configure_legend(**text, orient="top", columns=4, title=None, symbolStrokeWidth=0, labelLimit=220)
        .configure_title(
            color=INK, subtitleColor=SOFT, anchor="start", fontSize=12, fontWeight=600, subtitleFontSize=11, offset=8
        )
    )


def style() -> str:
    """The variables as CSS, for the screen that prefers light and the one that prefers dark."""
    one, other = ("".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    return f":root{{{one}}}@media(prefers-color-scheme:dark){{:root{{{other}}}}}"


def in_light(drawing: str) -> str:
    """A specification or SVG with the variables replaced, for what knows no CSS."""
    return re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], drawing)
