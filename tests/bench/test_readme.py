"""What the READMEs show is what the files in `results/` and the code say; nothing here writes any of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.case import Case
from bench.report import readme, reference
from bench.report.table import three_digits
from bench.results import ResultsError, read

from .conftest import ROOT

pytest.importorskip("altair")
STALE = "stale: write it again with `nox -s readme`"


def texts(svg: str) -> list[str]:
    """What a drawing says; where it puts it depends on the fonts of the machine."""
    return sorted(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def check(name: str) -> int:
    count = 0
    for path, wanted in readme.generated((name,)):
        found = path.read_text(encoding="utf-8")
        if path.suffix == ".svg":
            assert texts(found) == texts(wanted), f"{path.name} is {STALE}"
            assert texts(found)
        else:
            assert found == wanted, f"{path.name} is {STALE}"
        count += 1
    return count


def test_the_readme_shows_what_the_results_say() -> None:
    assert check("README.md") == 2, "the text and its ladder"


@pytest.mark.slow
def test_the_schema_of_results_is_that_of_the_types_and_metrics() -> None:
    assert check("results/README.md") == 1


def test_the_figure_that_shows_how_to_cite_is_that_of_the_run_it_names() -> None:
    text = " ".join((ROOT / "results/README.md").read_text(encoding="utf-8").split())
    shown = r"256×256: (\S+) ms \(median; 95 % interval of one process (\S+) … (\S+)\).*?`(results/[^`]+)`"
    *cited, file = re.findall(shown, text)[0]
    (record,) = (record for record in read(ROOT / file).records if record.case == Case())
    assert cited == [three_digits(record.figures[name]) for name in ("p50_ms", "p50_low_ms", "p50_high_ms")]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkout of what the README is made from, to be spoiled."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    return tmp_path


def test_a_stale_figure_in_the_readme_is_noticed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (copied / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(readme, "_output", lambda _: "something newer\n")
    with pytest.raises(AssertionError, match=r"README\.md is stale"):
        check("README.md")
    assert (copied / "README.md").read_text(encoding="utf-8") == before, "a check writes nothing"


def test_a_stale_figure_in_the_ladder_is_noticed(copied: Path) -> None:
    drawing = copied / "results/ladder.svg"
    svg = drawing.read_text(encoding="utf-8")
    spoiled = re.sub(r">\d+\.\d+<", ">8.38<", svg, count=1)
    assert spoiled != svg
    drawing.write_text(spoiled, encoding="utf-8")
    ladder = (copied / "README.md").read_text(encoding="utf-8").partition("<!-- end -->")
    (copied / "README.md").write_text(ladder[0] + ladder[1], encoding="utf-8")
    with pytest.raises(AssertionError, match=r"ladder\.svg is stale"):
        check("README.md")


def test_a_readme_runs_no_command_but_ours() -> None:
    with pytest.raises(ResultsError, match="expected `python -m bench …`"):
        readme._output("sh -c true")


def block(mark: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return next(one for one in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if mark in one)


def listed(folder: Path, *arguments: str, **variables: str) -> list[str]:
    command = [sys.executable, "-m", "bench", "list", "--preset", "smoke", *arguments]
    told = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split()[0] for line in told.stdout.splitlines()[1:]]


def test_the_recipe_for_an_implementation_works(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(block("# mine.py"), encoding="utf-8")
    axis = "implementation=compile_no_cudagraphs"
    found = listed(ROOT, "--load", "mine", "--axis", axis, PYTHONPATH=str(tmp_path))
    assert found[0].startswith("infer-compile_no_cudagraphs-")


@pytest.mark.slow
def test_the_recipe_for_a_metric_works() -> None:
    code = block("# bench/engine/parameters.py") + (
        "import torch\n"
        "from bench.engine.metric import metrics\n"
        "class Subject:\n"
        "    def eager(self): return torch.nn.Linear(3, 2)\n"
        "(mine,) = [one for one in metrics() if 'parameters' in one.columns]\n"
        "assert mine.measure(Subject(), None) == {'parameters': 8}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_recipe_for_an_axis_works(tmp_path: Path) -> None:
    """Done in a copy, by hand as a reader would: the field into `Case`, the use where the old line stood."""
    field, _, use = block("# bench/case.py, in Case").partition("\n\n")
    for folder in ("bench", "kernels", "unet", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    case, subject = tmp_path / "bench/case.py", tmp_path / "bench/subject.py"
    indented = "".join(f"    {line}\n" for line in field.splitlines()[1:])
    text = case.read_text(encoding="utf-8")
    case.write_text(
        text.replace("    @property\n    def id(", f"{indented}\n    @property\n    def id(", 1), encoding="utf-8"
    )
    text = subject.read_text(encoding="utf-8")
    assert "torch.backends.cudnn.benchmark = True" in text
    text = text.replace("torch.backends.cudnn.benchmark = True", use.splitlines()[-1])
    subject.write_text(text, encoding="utf-8")
    on, off = listed(tmp_path, "--axis", "benchmark=on,off", PYTHONPATH=str(tmp_path))[:2]
    assert off == f"{on}-cudnn_off"


def test_published_figures_are_read_and_each_has_its_source() -> None:
    rows = reference.published()
    assert len(rows) == 25
    assert all(row.source and row.value > 0 and row.unit for row in rows)


def test_a_damaged_table_of_published_figures_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "published.csv"
    damaged.write_text("source,value\nsomewhere,many\n", encoding="utf-8")
    with pytest.raises(ResultsError, match=r"published\.csv: not a table of published figures"):
        reference.published(damaged)
