import subprocess
from pathlib import Path

import msgspec
import pytest

from bench.gate.rates import FOLDER, MARKS, SIMULATED, RealGates, insert, read, table
from bench.gate.simulation import BUDGETS_S, NOISES, simulate

from .conftest import ROOT, Bench
from .injected import VARIABLE


def test_the_readme_shows_the_recorded_error_rates() -> None:
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    shown = text.partition(MARKS[0])[2].partition(MARKS[1])[0].strip()
    assert shown == table(*read()).strip(), "stale: python -m bench calibrate --no-draw --into bench/README.md"


@pytest.mark.slow
def test_the_recorded_simulation_is_what_the_gate_does_today() -> None:
    drawn, _ = read()
    assert [(rates.budget_s, rates.noise) for rates in drawn] == [(b, n) for b in BUDGETS_S for n in NOISES]
    for recorded in drawn[:2]:
        again = simulate(recorded.noise, gates=recorded.gates, budget_s=recorded.budget_s)
        assert again == recorded, "the rule has changed since: python -m bench calibrate --into bench/README.md"


def test_what_is_recorded_keeps_the_promises() -> None:
    drawn, _ = read()
    assert all(rates.gates == 1000 and rates.rows == 40 and rates.false_alarms <= 0.02 for rates in drawn)
    (ordinary,) = [rates for rates in drawn if (rates.noise, rates.budget_s) == (0.01, BUDGETS_S[0])]
    assert ordinary.found >= 0.85


def test_a_file_without_a_place_for_the_table_is_a_mistake(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("nothing")
    told = bench.read("calibrate", "--no-draw", "--into", str(tmp_path / "x.md"))
    assert told.returncode == 2
    assert "no place for the error rates" in told.stderr


def test_the_table_is_put_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "x.md"
    file.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    insert(file, "new")
    assert file.read_text() == f"before\n{MARKS[0]}\n\nnew\n{MARKS[1]}\nafter\n"


def test_nothing_but_the_test_knows_the_variable_that_slows_down() -> None:
    found = subprocess.run(
        ["git", "grep", "-l", VARIABLE], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == ["tests/bench/injected.py"]


def test_records_of_real_gates_are_whole() -> None:
    for path in FOLDER.glob("*.json"):
        if path.name != SIMULATED:
            found = msgspec.json.decode(path.read_bytes(), type=RealGates)
            assert found.identical
            assert found.slowed
            assert all(gate.trials == len(gate.naive_each) for gate in (*found.identical, *found.slowed))


def test_a_simulation_is_the_same_every_time() -> None:
    assert simulate(0.02, gates=5) == simulate(0.02, gates=5)
