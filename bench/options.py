"""What a run is asked to do: the options of `pytest bench`, and what they come to."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bench import implementations
from bench.case import Case, parse_axes, parse_id
from bench.errors import UsageError
from bench.matrix import PRESETS, cases_of
from bench.meeting import Place, place
from bench.results import RESULTS, Settings, explained, option_of
from bench.weights import look

if TYPE_CHECKING:
    import pytest

_USUAL = {name: getattr(Settings(), name) for name in Settings.__struct_fields__}
SECONDS = {name: usual for name, usual in _USUAL.items() if isinstance(usual, float)}
SWITCHES = [name for name, usual in _USUAL.items() if isinstance(usual, bool)]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is asked to do.

    Args:
        preset: name of the preset.
        axes: axis → values that replace the preset's.
        chosen: cases to measure instead of a preset's.
        settings: how to measure.
        seed: of the order of the preset's cases; chosen ones keep the order in which they were given.
        ceilings: whether to measure first what the device does at its best.
        resume: whether to continue the newest run.
        results: folder of all results.
        place: where this stands among the machines, or processes of a torchrun, that were given the same command.
    """

    preset: str = "quick"
    axes: Mapping[str, Sequence[str | int]] = {}
    chosen: tuple[Case, ...] = ()
    settings: Settings = Settings()
    seed: int = 0
    ceilings: bool = False
    resume: bool = False
    results: Path = RESULTS
    place: Place = Place()


def add(parser: "pytest.Parser") -> None:
    """Declare them; `python -m bench list` takes --preset, --axis and --load too."""
    group = parser.getgroup("bench", "measuring the U-Net (pytest bench)")
    add = group.addoption
    add("--preset", default="quick", metavar="NAME", help=f"which cases: {', '.join(PRESETS)} (default quick)")
    add(
        "--axis",
        action="append",
        default=[],
        metavar="NAME=A,B",
        help="replace an axis of the preset; see `python -m bench list --axes`",
    )
    add(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="measure the case with this id (repeatable), not a preset",
    )
    add("--nodes", default="1", metavar="N", help="machines that measure each case together, all given this command")
    add(
        "--rdzv-endpoint",
        default="",
        metavar="HOST:PORT",
        help="where they meet: the address of one of them and a free port (of a torchrun's processes: "
        "MASTER_ADDR and the port after MASTER_PORT, if not given)",
    )
    add(
        "--seed",
        default=None,
        metavar="N",
        help="order of the preset's cases (default: drawn, and recorded; of several nodes 0)",
    )
    add("--dry-run", action="store_true", help="print the cases and how long they will take, and measure nothing")
    add("--ceilings", action="store_true", help="first measure the device's best matrix product and copy, for MFU")
    add("--resume", action="store_true", help="continue the newest run: what it measured is kept")
    add("--results", default=None, metavar="DIR", help="folder of results (default: results/)")
    meaning = {name: text.removesuffix(".") for name, text in explained(Settings).items()}
    for name, usual in SECONDS.items():
        add(option_of(name), default=str(usual), metavar="S", help=f"{meaning[name]} (default {usual:g})")
    for name in SWITCHES:
        add(option_of(name), action="store_true", help=meaning[name])
    add("--weights", default=None, metavar="FILE", help="measure the U-Net of this checkpoint, not a fitted one")
    add("--load", action="append", default=[], metavar="MODULE", help="a module that registers more implementations")


def read(get: Callable[[str], Any]) -> Options:
    """What was asked for.

    Args:
        get: from an option's name to what was given, or its default.

    Raises:
        UsageError: it is not possible.
    """
    implementations.load(get("load"))
    cases_of(get("preset"))
    given: dict[str, Any] = {name: seconds(option_of(name), get(name)) for name in SECONDS}
    given |= {name: get(name) for name in SWITCHES}
    axes, chosen = parse_axes(get("axis")), tuple(parse_id(text) for text in get("case"))
    weights = look(Path(get("weights"))) if get("weights") is not None else None
    here = place(_whole("--nodes", get("nodes"), least=1), get("rdzv_endpoint"))
    return Options(
        preset=get("preset"),
        axes=weights.asked_for(axes, chosen) if weights is not None else axes,
        chosen=chosen,
        settings=Settings(load=tuple(get("load")), weights=weights, **given),
        # Several nodes must not draw each its own.
        seed=_seed(get("seed")) if here.count == 1 or get("seed") else 0,
        ceilings=get("ceilings"),
        resume=get("resume"),
        results=Path(get("results")) if get("results") else RESULTS,
        place=here,
    )


def seconds(option: str, text: str) -> float:
    """A duration, s.

    Raises:
        UsageError: it is not a number above 0.
    """
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise UsageError(f"{option} {text}: expected a number of seconds above 0")
    return found


def _seed(text: str | None) -> int:
    return secrets.randbelow(10_000) if text is None else _whole("--seed", text, least=0)


def _whole(option: str, text: str, *, least: int) -> int:
    if not (text.isdecimal() and text.isascii() and int(text) >= least):
        raise UsageError(f"{option} {text}: expected a whole number from {least}")
    return int(text)
