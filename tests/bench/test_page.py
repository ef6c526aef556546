"""The page in a real browser. Pictures of it are kept in `artifacts/` for whoever wants to look."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from bench.case import Case
from bench.results import Header, Record, read

from . import browser as chromium
from .conftest import ROOT
from .pages import gpus, record, run

page = pytest.importorskip("bench.report.page")
reference = pytest.importorskip("bench.report.reference")
verdicts = pytest.importorskip("bench.report.verdicts")

MakeRecord = Callable[..., Record]
ARTIFACTS = ROOT / "artifacts" / "page"
COMMITTED = ROOT / "results/amd-epyc-2cpu/20261123T194853Z_bb5d65a.jsonl"
needs_browser = pytest.mark.skipif(chromium.found() is None, reason=f"no browser: none of {', '.join(chromium.NAMES)}")
HOSTILE = '</script><script>window.pwned=1</script><img src="http://127.0.0.1:9/x" onerror="window.pwned=2">{{7*7}}\'"&'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    with chromium.browser(tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "committed.html"
    path.write_text(page.html([read(COMMITTED)]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory, header: Header, make_record: MakeRecord) -> Path:
    """A page of many devices."""
    path = tmp_path_factory.mktemp("page") / "gpus.html"
    path.write_text(page.html([gpus(header, make_record)]), encoding="utf-8")
    return path


@pytest.fixture
def quiet(browser: chromium.Browser) -> Iterator[chromium.Browser]:
    """The browser; at the end of the test its console must have been silent and the network unasked."""
    browser.told.clear()
    browser.asked.clear()
    yield browser
    assert browser.told == []
    assert {address.partition(":")[0] for address in browser.asked} <= {"file", "data", "about"}


@needs_browser
def test_the_page_opens_from_disk_in_light_and_dark_and_on_a_phone(quiet: chromium.Browser, committed: Path) -> None:
    for name, options in {"light": {}, "dark": {"dark": True}, "phone": {"width": 375, "height": 800}}.items():
        quiet.open(committed, **options)
        assert quiet.run("document.querySelectorAll('figure:not([hidden]) svg').length") >= 4
        # Nothing stands out of the screen; what is wider scrolls in its own place.
        assert quiet.run("document.documentElement.scrollWidth <= innerWidth"), name
        quiet.picture(ARTIFACTS / f"{name}.png")


@needs_browser
def test_the_table_is_filtered_and_sorted(quiet: chromium.Browser, committed: Path) -> None:
    quiet.open(committed)
    visible = "[...document.querySelectorAll('#table tbody tr:not([hidden])')]"
    quiet.run(
        "const find = document.getElementById('find'); find.value = 'train BILINEAR'; "
        "find.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert quiet.run("document.getElementById('count').textContent") == "6 of 26 cases"
    quiet.run(
        "const status = document.querySelector('[data-axis=status]'); status.value = 'ok'; "
        "status.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert quiet.run(f"{visible}.length") == 4
    quiet.click("document.querySelector('#filters [type=reset]')")
    quiet.wait(f"{visible}.length === 26")
    heading = "[...document.querySelectorAll('#table thead button')].find(one => one.textContent === 'p50 ms')"
    for direction in ("ascending", "descending"):
        quiet.click(heading)
        assert quiet.run(f"{heading}.closest('th').getAttribute('aria-sort')") == direction
        cells = quiet.run(f"{visible}.map(row => row.cells[2].textContent)")
        figures = [float(cell.replace(",", "").rstrip("*")) for cell in cells if cell != "–"]
        assert figures == sorted(figures, reverse=direction == "descending")
        assert cells[18:] == ["–"] * 8, "what has no figure comes last, whichever way the others go"


@needs_browser
def test_a_point_leads_to_its_case(quiet: chromium.Browser, committed: Path) -> None:
    quiet.open(committed)
    quiet.click(
        "document.querySelector('#chart-front-memory .mark-symbol path[aria-roledescription], "
        "#chart-front-memory .role-mark.mark-symbol path')"
    )
    quiet.wait("document.getElementById('case').open")
    name = quiet.run("document.getElementById('case-id').textContent")
    assert name.startswith("infer-")
    assert quiet.run("document.getElementById('case-repeat').textContent") == f"python -m pytest bench --case {name}"
    assert quiet.run(f"document.querySelector(location.hash).textContent.includes('{name}')")
    quiet.wait("!!document.querySelector('#case-samples svg path')")
    quiet.picture(ARTIFACTS / "case.png", whole=False)
    quiet.press("Escape")
    quiet.wait("!document.getElementById('case').open")


@needs_browser
def test_everything_can_be_reached_by_keyboard(quiet: chromium.Browser, committed: Path) -> None:
    quiet.open(committed)
    reached = []
    for _ in range(40):
        quiet.press("Tab")
        reached.append(quiet.run("document.activeElement.closest('section')?.id || document.activeElement.className"))
    assert reached[0] == "skip"
    assert {"charts", "cases"} <= set(reached)
    quiet.run("document.querySelector('#table tbody a').focus()")
    quiet.press("Enter")
    quiet.wait("document.getElementById('case').open")


@needs_browser
def test_choosing_a_scene_draws_it_and_says_what_it_lacks(quiet: chromium.Browser, committed: Path) -> None:
    quiet.open(committed)
    assert quiet.run("document.getElementById('chart-devices').hidden")
    assert not quiet.run("document.getElementById('missing-devices').hidden")
    quiet.click("[...document.querySelectorAll('#best button')].find(one => one.textContent.includes('threads 1'))")
    quiet.wait("!!document.querySelector('#chart-devices svg path')")
    assert "90% of the dashed ideal" in quiet.run("document.querySelector('#chart-devices figcaption').textContent")


@needs_browser
def test_hostile_text_is_shown_as_text(
    quiet: chromium.Browser, header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    env = header.environment
    machine = msgspec.structs.replace(env.machine, cpu=HOSTILE, torch_version=HOSTILE, os=HOSTILE)
    hostile = msgspec.structs.replace(header, preset=HOSTILE, environment=msgspec.structs.replace(env, machine=machine))
    records = [
        record(make_record, Case(implementation=HOSTILE, upsampling=upsampling), speed, **{HOSTILE: HOSTILE})
        for upsampling, speed in (("bilinear", 3.0), ("transposed", 2.0))
    ]
    records += [make_record(Case(precision="amp_bf16"), "crash", HOSTILE), record(make_record, Case(), 1.0)]
    judged = verdicts.Verdicts(
        base=verdicts.Side(ref=HOSTILE),
        head=verdicts.Side(ref="head"),
        rows=(verdicts.Row(name=HOSTILE, metric=HOSTILE, word=HOSTILE, reason=HOSTILE, repeat=HOSTILE),),
        notes=(HOSTILE,),
    )
    path = tmp_path / "hostile.html"
    path.write_text(page.html([run(hostile, *records, path=f"{tmp_path}/<b>x.jsonl")], judged), encoding="utf-8")
    for place in ("#case-0", "#case-2"):
        quiet.open(path, place)
        quiet.wait("document.getElementById('case').open")
        assert quiet.run("typeof window.pwned") == "undefined"
        assert quiet.run("document.querySelectorAll('img, b[onclick], script').length") == 3, "the page's own scripts"
        assert HOSTILE in quiet.run("document.body.textContent")
    quiet.picture(ARTIFACTS / "hostile.png")


@needs_browser
def test_many_devices_energy_and_every_failure_are_drawn(quiet: chromium.Browser, made_up: Path) -> None:
    quiet.open(made_up)
    scene = "document.getElementById('scene')"
    quiet.run(
        f"{scene}.value = [...{scene}.options].find(one => one.text.includes('transposed')).value; "
        f"{scene}.dispatchEvent(new Event('change'))"
    )
    quiet.wait("!!document.querySelector('#chart-front-energy svg path')")
    quiet.wait("document.querySelector('#chart-ladder svg').textContent.includes('timeout')")
    drawn = quiet.run("document.querySelector('#chart-ladder svg').textContent")
    assert all(word in drawn for word in ("oom", "timeout", "crash", "inaccurate", "unsupported"))
    quiet.picture(ARTIFACTS / "made-up.png")
    quiet.run(
        f"{scene}.value = [...{scene}.options].find(one => one.text.includes('bilinear')).value; "
        f"{scene}.dispatchEvent(new Event('change'))"
    )
    quiet.wait("(document.querySelector('#chart-roofline svg')?.textContent ?? '').includes('down4')")
    quiet.picture(ARTIFACTS / "made-up-roofline.png")


@needs_browser
def test_a_case_shows_its_clock_and_what_held_it_down(quiet: chromium.Browser, made_up: Path) -> None:
    quiet.open(made_up, "#case-0")
    quiet.wait("(document.querySelector('#case-samples svg')?.textContent ?? '').includes('clock, MHz')")
    told = quiet.run("document.getElementById('case-warnings').textContent")
    assert "The clock was held down in 66.7 % of the steps: sw_power_cap." in told
    assert "Durations drifted by 5.00 %" in told
    quiet.picture(ARTIFACTS / "clock.png", whole=False)


@needs_browser
def test_two_runs_stand_side_by_side_and_over_time(
    quiet: chromium.Browser, header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    env = header.environment
    later = msgspec.structs.replace(env, time=env.time.replace(hour=13), commit="fedcba9876543210")
    runs = [
        run(when, record(make_record, Case(), speed), record(make_record, Case(implementation="compile"), 2 * speed))
        for when, speed in ((header, 10.0), (msgspec.structs.replace(header, environment=later), 9.0))
    ]
    path = tmp_path / "two.html"
    path.write_text(page.html(runs), encoding="utf-8")
    quiet.open(path)
    scenes = quiet.run("[...document.getElementById('scene').options].map(one => one.text)")
    assert scenes == [f"run {number}: infer · transposed · batch 1 · 256x256 · 1cpu" for number in (1, 2)]
    assert quiet.run("document.getElementById('scene').selectedIndex") == 1, "the run that was named last"
    assert "0.90× as fast" in quiet.run("document.querySelector('#chart-history figcaption').textContent")
    assert quiet.run("document.getElementById('count').textContent") == "4 of 4 cases"
    quiet.picture(ARTIFACTS / "two-runs.png")


@pytest.mark.slow
def test_five_hundred_cases_stay_under_three_megabytes(header: Header, make_record: MakeRecord) -> None:
    cases = [
        Case(implementation=name, precision=precision, layout=layout, upsampling=upsampling, batch=batch, task=task)
        for name in ("eager", "compile", "compile_max_autotune", "triton", "triton_graph", "onnx", "openvino", "folded")
        for precision in ("fp32", "tf32", "amp_bf16", "amp_fp16")
        for layout in ("nchw", "nhwc")
        for upsampling in ("bilinear", "transposed")
        for batch in (1, 8)
        for task in ("infer", "train")
    ]
    more = {f"some_further_figure_{number}": 1.2345678 + number for number in range(40)}
    records = [record(make_record, case, 10.0 + place, samples=5000, **more) for place, case in enumerate(cases[:500])]
    assert len(records) == 500
    assert len(page.html([run(header, *records)]).encode()) < 3_000_000


def test_figures_of_others_stand_beside_ours_only_where_task_size_and_precision_match(
    header: Header, make_record: MakeRecord
) -> None:
    same = record(make_record, Case(size="640x959", precision="amp_fp16", devices="1gpu", task="train"), 10.0)
    other = record(make_record, Case(size="640x959", devices="1gpu", task="train"), 10.0)
    shown = page.html([run(header, same)])
    assert "torchbench v3-cuda-tests 2023-04" in shown
    assert "all-zero masks" in shown, "with its known defects"
    assert reference.beside([other]) == (), "another precision"


def test_verdicts_of_a_gate_stand_on_top(tmp_path: Path) -> None:
    row = {
        "name": "infer-eager",
        "metric": "time",
        "word": "SLOWER",
        "repeat": "again",
        "estimate": {"trials": 5, "change": 0.123, "low": 0.1, "high": 0.15, "scatter": 0.01, "smallest": 0.02},
    }
    twin = {**row, "word": "SAME", "twin": True}
    said = {
        "schema": 1,
        "base": {"ref": "main", "commit": "abcdef0123"},
        "head": {"ref": "working tree"},
        "rows": [row, twin],
        "notes": [],
        "unknown": 1,
    }
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    shown = page.html([read(COMMITTED)], verdicts.read(path))
    assert "Gate: 1 SLOWER</h2>" in shown
    assert re.search(r"\+12\.3 %.*\+10\.0 %.*\+15\.0 %", shown)
    assert shown.index("Gate:") < shown.index("The fastest of each scene")


def test_a_page_of_no_record_opens(header: Header) -> None:
    assert "No case has a speed." in page.html([run(header)])
