"""`python -m bench report` into files, as a person runs it."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.case import Case
from bench.results import Header, Record, newest
from bench.runfile import RunFile

from .conftest import ROOT, Bench

pytest.importorskip("altair")
MakeRecord = Callable[..., Record]


@pytest.fixture
def saved(header: Header, make_record: MakeRecord, tmp_path: Path) -> Path:
    file = RunFile.create(header, tmp_path)
    for upsampling, speed in (("bilinear", 120.0), ("transposed", 100.0)):
        figures = {"p50_ms": 1000 / speed, "images_per_s": speed, "peak_memory_mib": 500.0}
        file.append(make_record(Case(upsampling=upsampling), **figures))
    file.append(make_record(Case(implementation="triton"), "unsupported", "no CUDA device"))
    return file.path


@pytest.fixture
def reader(tmp_path: Path) -> Bench:
    return Bench(tmp_path, tmp_path)


@pytest.mark.slow
def test_one_call_writes_every_form_and_a_dash_is_standard_output(reader: Bench, saved: Path, tmp_path: Path) -> None:
    markdown, table = tmp_path / "tables.md", tmp_path / "all.csv"
    told = reader.read("report", str(saved), "--html", "-", "--markdown", str(markdown), "--csv", str(table))
    assert told.returncode == 0
    assert told.stdout.startswith("<!doctype html>")
    assert told.stdout.endswith("</html>\n")
    assert "| unsupported |" in markdown.read_text(encoding="utf-8")
    with table.open(encoding="utf-8", newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok", "ok", "unsupported"]
    assert len(told.stderr.splitlines()) == 3, "a line a file, and one for the wait"


@pytest.mark.slow
def test_pictures_have_names_that_say_what_they_show(reader: Bench, saved: Path, tmp_path: Path) -> None:
    told = reader.read("report", str(saved), "--png", str(tmp_path / "png"))
    assert told.returncode == 0, told.stderr
    found = sorted((tmp_path / "png").rglob("*.png"))
    assert {path.parent.name for path in found} == {saved.stem}
    assert [path.stem for path in found] == [
        "infer-b1-256x256-1cpu-front-memory",
        "infer-b1-256x256-1cpu-upsampling",
        "infer-bilinear-b1-256x256-1cpu-ladder",
        "infer-transposed-b1-256x256-1cpu-ladder",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_without_the_extra_it_says_what_to_install(reader: Bench, saved: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "altair.py").write_text("raise ModuleNotFoundError('absent', name='altair')", encoding="utf-8")
    reader.variables["PYTHONPATH"] = str(tmp_path)
    told = reader.read("report", str(saved), option, str(tmp_path / "out"))
    assert told.returncode == 2
    assert told.stderr.splitlines() == ["bench: drawing needs altair: install the extra, `pip install -e '.[report]'`"]
    assert "1.00×" in reader.read("report", str(saved)).stdout, "the table needs nothing"


def test_a_place_that_cannot_be_written_is_one_line(reader: Bench, saved: Path, tmp_path: Path) -> None:
    told = reader.read("report", str(saved), "--markdown", str(tmp_path / "missing" / "tables.md"))
    assert told.returncode == 1
    assert len(told.stderr.splitlines()) == 1
    assert "No such file or directory" in told.stderr


def test_a_run_of_another_schema_draws_no_half_page(reader: Bench, saved: Path, tmp_path: Path) -> None:
    newer = tmp_path / "newer.jsonl"
    newer.write_text('{"schema": 99}\n', encoding="utf-8")
    told = reader.read("report", str(saved), str(newer), "--html", str(tmp_path / "page.html"))
    assert told.returncode == 2
    assert "update the program" in told.stderr
    assert not (tmp_path / "page.html").exists()


def test_what_is_committed_can_be_read_by_the_command_in_the_readme(reader: Bench) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python -m bench report --html page.html" in text
    told = reader.read("report", "--markdown", "-")
    assert told.returncode == 0
    found = newest()
    assert found is not None
    assert f"from `results/{found.parent.name}/{found.name}`" in told.stdout
