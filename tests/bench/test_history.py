import ast
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench.case import Case
from bench.derive import place_of
from bench.environment import Environment
from bench.history.series import HARNESS, Series, Stretch, series
from bench.history.steps import Step, steps
from bench.readings import Ceiling
from bench.results import Header, Record, Run
from bench.runfile import RunFile

from .conftest import ROOT, Bench
from .toy import Toy

MakeRecord = Callable[..., Record]
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def make_run(header: Header, make_record: MakeRecord) -> Callable[..., Run]:
    """A run of one case at the given day, with a commit of that number."""

    def make(
        day: int,
        value: float,
        *,
        commit: str = "",
        status: str = "ok",
        dirty: bool = False,
        best: tuple[float, float] | None = None,
        **machine: object,
    ) -> Run:
        env = msgspec.structs.replace(
            header.environment,
            machine=msgspec.structs.replace(header.environment.machine, **machine),
            commit=commit or f"{day:040x}",
            dirty=dirty,
            time=START + timedelta(days=day),
        )
        record = make_record(Case(), status, "" if status == "ok" else "why", p50_ms=float(value))
        stem = f"{env.time:%Y%m%dT%H%M%SZ}_{env.commit[:7]}"
        return Run(
            path=Path(f"results/m/{stem}.jsonl"),
            header=msgspec.structs.replace(header, environment=env, ceilings=_ceilings(env, best) if best else ()),
            records=(record,),
        )

    return make


def _ceilings(env: Environment, best: tuple[float, float]) -> tuple[Ceiling, ...]:
    device, threads, precision = place_of(Case(), env.machine.cores)
    product, copy = best
    return (
        Ceiling(device=device, threads=threads, precision=precision, tflop_per_s=product, gb_per_s=copy),
        Ceiling(device=device, threads=threads, precision="another", tflop_per_s=1.0, gb_per_s=1.0),
    )


@pytest.fixture
def detect(make_run: Callable[..., Run], tmp_path: Path) -> Callable[[Sequence[float]], list[Step]]:
    def found(values: Sequence[float]) -> list[Step]:
        (one,) = series([make_run(day, value) for day, value in enumerate(values)], "p50_ms", repository=tmp_path)
        return steps(one)

    return found


def test_a_step_is_found_with_its_commits(detect: Callable[[Sequence[float]], list[Step]]) -> None:
    rng = np.random.default_rng(1)
    (step,) = detect([*rng.normal(100, 1, 12), *rng.normal(106, 1, 8)])
    assert (step.before.commit, step.after.commit) == (f"{11:040x}", f"{12:040x}")
    assert step.change == pytest.approx(0.06, abs=0.015)
    assert step.worse
    assert step.last
    assert step.runs_after == 8


def test_two_steps_are_two(detect: Callable[[Sequence[float]], list[Step]]) -> None:
    rng = np.random.default_rng(2)
    found = detect([*rng.normal(100, 1, 10), *rng.normal(110, 1, 10), *rng.normal(95, 1, 10)])
    assert [(step.worse, step.last) for step in found] == [(True, False), (False, True)]


def test_three_years_of_nights_are_searched_in_a_moment(detect: Callable[[Sequence[float]], list[Step]]) -> None:
    rng = np.random.default_rng(4)
    detect(rng.normal(100, 1, 10).tolist())  # what is imported for it is imported once
    begun = time.process_time()  # of the processor: the machine is shared
    (step,) = detect([*rng.normal(100, 1, 600), *rng.normal(106, 1, 600)])
    assert step.after.commit == f"{600:040x}"
    assert time.process_time() - begun < 1


def test_an_outlier_is_no_step(detect: Callable[[Sequence[float]], list[Step]]) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(100, 1, 20)
    values[10] = 200
    assert detect(list(values)) == []


def test_a_run_whose_file_was_copied_is_one_run(make_run: Callable[..., Run]) -> None:
    run = make_run(0, 10.0)
    copies = [msgspec.structs.replace(run, path=Path(f"results/{name}/saved.jsonl")) for name in ("m", "backup")]
    (one,) = series([run, *copies, make_run(1, 0.0, status="oom"), make_run(1, 0.0, status="oom")], "p50_ms")
    assert [point.value for stretch in one.stretches for point in stretch.points] == [10.0]
    assert one.failed == 1


def test_a_level_of_two_runs_is_not_yet_a_step(detect: Callable[[Sequence[float]], list[Step]]) -> None:
    rng = np.random.default_rng(4)
    assert detect([*rng.normal(100, 1, 10), 120.0, 121.0]) == []


@pytest.mark.parametrize("noise", [0.003, 0.06])
def test_noise_alone_seldom_makes_a_step(detect: Callable[[Sequence[float]], list[Step]], noise: float) -> None:
    rng = np.random.default_rng(5)
    alarms = sum(bool(detect(list(100 * np.exp(rng.normal(0, noise, 40))))) for _ in range(60))
    assert alarms <= 3


@pytest.mark.parametrize("noise", [0.003, 0.02])
def test_ten_percent_are_found(detect: Callable[[Sequence[float]], list[Step]], noise: float) -> None:
    rng = np.random.default_rng(6)
    levels = np.repeat([0.0, np.log(1.1)], [15, 10])
    hits = sum(len(detect(list(100 * np.exp(levels + rng.normal(0, noise, 25))))) == 1 for _ in range(30))
    assert hits >= 27


# 100 ms, then 150: what the machine's product and copy did meanwhile, and whether the commits are to blame.
@pytest.mark.parametrize(
    ("product", "copy", "machine"),
    [
        ((0.30, 0.20), (20.0, 20.0), -1 / 3),
        ((0.30, 0.30), (20.0, 13.3), -1 / 3),
        ((0.30, 0.30), (20.0, 20.0), None),
        ((0.20, 0.30), (20.0, 20.0), None),  # a faster machine slows nothing down
        ((0.30, 0.28), (20.0, 20.0), None),  # a little slower one does not do all of this
    ],
)
def test_a_step_that_the_machine_made_itself_is_told_from_one_of_the_commits(
    make_run: Callable[..., Run],
    tmp_path: Path,
    product: tuple[float, float],
    copy: tuple[float, float],
    machine: float | None,
) -> None:
    rng = np.random.default_rng(7)

    def run(day: int) -> Run:
        late = int(day >= 8)
        value, *best = np.array([(100.0, 150.0)[late], product[late], copy[late]]) * np.exp(rng.normal(0, 0.01, 3))
        return make_run(day, value, best=tuple(best))

    runs = [run(day) for day in range(14)]
    (one,) = series(runs, "p50_ms", repository=tmp_path)
    (step,) = steps(one)
    assert step.machine_change == (None if machine is None else pytest.approx(machine, abs=0.03))
    assert step.worse is (machine is None)
    # A rate goes the other way; memory is none of the machine's doing.
    for metric, blamed in (("images_per_s", machine is not None), ("peak_memory_mib", False)):
        (step,) = steps(msgspec.structs.replace(one, metric=metric, stretches=_turned(one, metric)))
        assert (step.machine_change is not None) is blamed


def _turned(one: Series, metric: str) -> tuple[Stretch, ...]:
    power = -1 if metric == "images_per_s" else 1
    (stretch,) = one.stretches
    points = tuple(msgspec.structs.replace(point, value=point.value**power) for point in stretch.points)
    return (msgspec.structs.replace(stretch, points=points),)


def test_a_yardstick_that_scatters_hides_no_step(make_run: Callable[..., Run], tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        values = np.repeat([100.0, 106.0], 10) * np.exp(rng.normal(0, 0.005, 20))
        best = np.exp(rng.normal(0, 0.1, (20, 2)))
        runs = [make_run(day, value, best=tuple(best[day])) for day, value in enumerate(values)]
        (one,) = series(runs, "p50_ms", repository=tmp_path)
        assert [step.worse for step in steps(one)] == [True]


def test_a_run_without_a_yardstick_blames_no_machine(make_run: Callable[..., Run], tmp_path: Path) -> None:
    best = [(0.3, 20.0)] * 6 + [(0.2, 13.3)] * 6
    runs = [make_run(day, 100.0 * 0.3 / best[day][0] + day / 100, best=best[day] if day else None) for day in range(12)]
    (one,) = series(runs, "p50_ms", repository=tmp_path)
    assert [step.worse for step in steps(one)] == [True]


def test_counts_that_do_not_scatter_have_steps_too(detect: Callable[[Sequence[float]], list[Step]]) -> None:
    assert [step.change for step in detect([50.0] * 5 + [60.0] * 5)] == pytest.approx([0.2])
    assert detect([50.0] * 10) == []
    assert detect([100.0] * 5 + [102.1] * 5)
    assert detect([100.0] * 5 + [101.9] * 5) == [], "nobody cares"
    assert detect([102.1] * 5 + [100.0] * 5)[0].worse is False
    assert detect([50.0] * 3 + [60.0] * 3), "three on each side are enough"
    assert detect([50.0] * 3 + [60.0] * 2) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"torch_version": "2.14.0"}, "torch_version 2.13.0 → 2.14.0"),
        ({"cores": 4}, None),  # another slug: another series altogether
        ({"kernel": "Linux 7"}, "kernel Linux → Linux 7"),
    ],
)
def test_runs_of_unlike_conditions_are_never_joined(
    make_run: Callable[..., Run], tmp_path: Path, change: dict[str, object], told: str | None
) -> None:
    runs = [make_run(day, 100.0) for day in range(6)] + [make_run(day, 150.0, **change) for day in range(6, 12)]
    found = series(runs, "p50_ms", repository=tmp_path)
    if told is None:
        assert [len(one.stretches) for one in found] == [1, 1]
    else:
        (one,) = found
        assert [stretch.changed for stretch in one.stretches] == ["", told]
    assert [steps(one) for one in found] == [[]] * len(found), "50 % more on other software is no step"


def test_memory_that_differs_from_boot_to_boot_parts_nothing(make_run: Callable[..., Run], tmp_path: Path) -> None:
    (one,) = series([make_run(0, 1.0), make_run(1, 1.0, memory_mib=7999)], "p50_ms", repository=tmp_path)
    assert len(one.stretches) == 1


def test_another_harness_begins_another_stretch_and_other_sources_do_not(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "toy").mkdir()
    toy = Toy(tmp_path / "toy")
    first = toy.commit()
    toy.change("unet/__init__.py", "2.0", "3.0")
    second = toy.commit()
    toy.change("bench/subject.py", "torch.zeros(4)", "torch.zeros(5)")
    third = toy.commit()
    runs = [make_run(day, 1.0, commit=commit) for day, commit in enumerate((first, second, third))]
    (one,) = series(runs, "p50_ms", repository=toy.root)
    assert [(stretch.changed, len(stretch.points)) for stretch in one.stretches] == [("", 2), ("the harness", 1)]


def test_inside_a_hook_history_still_looks_at_our_repository(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").mkdir()
    toy = Toy(tmp_path / "toy")
    runs = [make_run(0, 1.0, commit=toy.commit())]
    toy.change("bench/subject.py", "torch.zeros(4)", "torch.zeros(5)")
    runs.append(make_run(1, 1.0, commit=toy.commit()))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    (one,) = series(runs, "p50_ms", repository=toy.root)
    assert [stretch.changed for stretch in one.stretches] == ["", "the harness"]


def test_what_makes_the_harness_is_there() -> None:
    assert all((ROOT / path).exists() for path in HARNESS), "a file that was moved would no longer part anything"


def test_what_a_subject_is_made_of_is_part_of_the_harness() -> None:
    what = {"bench/case.py", "bench/implementations.py", "bench/weights.py"}  # say what is measured, not how
    tree = ast.parse((ROOT / "bench/subject.py").read_text(encoding="utf-8"))
    made_of = set()
    for one in tree.body:
        if isinstance(one, ast.ImportFrom) and (one.module or "").startswith("bench"):
            names = [f"bench.{name.name}" for name in one.names] if one.module == "bench" else [one.module or ""]
            made_of |= {f"{name.replace('.', '/')}.py" for name in names}
    assert made_of
    assert made_of - what <= set(HARNESS)


def test_runs_are_in_the_order_of_their_commits_not_of_their_measuring(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "toy").mkdir()
    toy = Toy(tmp_path / "toy")
    toy.git("config", "user.name", "t")
    commits = []
    for day in range(3):
        toy.change("unet/__init__.py", f"{2 + day}.0", f"{3 + day}.0")
        toy.git("add", "-A")
        stamp = f"{START + timedelta(days=day):%Y-%m-%dT%H:%M:%S}+0000"
        subprocess.run(
            ["git", "-C", toy.root, "-c", "user.email=t@t", "commit", "-q", "-m", "x"],
            check=True,
            env={"GIT_COMMITTER_DATE": stamp, "GIT_AUTHOR_DATE": stamp, "PATH": "/usr/bin:/bin:/usr/local/bin"},
        )
        commits.append(toy.git("rev-parse", "HEAD").strip())
    runs = [make_run(9 - number, float(number), commit=commit) for number, commit in enumerate(commits)]
    (one,) = series(runs, "p50_ms", repository=toy.root)
    assert [point.value for stretch in one.stretches for point in stretch.points] == [0.0, 1.0, 2.0]


def test_changed_sources_do_not_count_and_failures_are_counted(make_run: Callable[..., Run], tmp_path: Path) -> None:
    runs = [make_run(0, 1.0), make_run(1, 9.0, dirty=True), make_run(2, 0.0, status="oom")]
    (one,) = series(runs, "p50_ms", repository=tmp_path)
    assert [point.value for point in one.stretches[0].points] == [1.0]
    assert one.failed == 1


@pytest.fixture
def written(make_run: Callable[..., Run], tmp_path: Path) -> Path:
    for day, value in enumerate([100.0, 101.0, 99.0, 100.5, 99.5, 100.0, 110.0, 111.0, 109.0]):
        run = make_run(day, value)
        file = RunFile.create(run.header, tmp_path / "results")
        file.append(run.records[0])
    return tmp_path / "results"


def test_history_shows_sparkline_and_steps(bench: Bench, written: Path, tmp_path: Path) -> None:
    told = bench.read("history", "--results", str(written), "--markdown", str(tmp_path / "steps.md"))
    assert told.returncode == 0, told.stderr
    assert "▁" in told.stdout
    assert "█" in told.stdout
    (step,) = [line for line in told.stdout.splitlines() if "WORSE" in line]
    assert "+10.0 %" in step
    assert "| WORSE |" in (tmp_path / "steps.md").read_text()


def test_history_as_json_and_the_status_of_a_step_that_the_newest_run_confirms(bench: Bench, written: Path) -> None:
    told = bench.read("history", "--results", str(written), "--json", "--new")
    assert told.returncode == 1
    (row,) = [json.loads(line) for line in told.stdout.splitlines()]
    assert row["steps"][0]["worse"]
    assert msgspec.convert({k: v for k, v in row.items() if k != "steps"}, Series).case == Case().id
    newest = max(written.glob("*/*.jsonl"))
    newest.unlink()
    assert bench.read("history", "--results", str(written), "--new").returncode == 0, "two runs confirm nothing"


def test_a_slower_machine_fails_no_night(bench: Bench, make_run: Callable[..., Run], tmp_path: Path) -> None:
    for day, value in enumerate([100.0, 101.0, 99.0, 100.5, 99.5, 100.0, 200.0, 202.0, 198.0]):
        run = make_run(day, value, best=(30 / value, 20.0))
        RunFile.create(run.header, tmp_path / "results").append(run.records[0])
    told = bench.read(
        "history", "--results", str(tmp_path / "results"), "--new", "--markdown", str(tmp_path / "steps.md")
    )
    assert told.returncode == 0, told.stderr
    assert "MACHINE" in told.stdout
    assert "(-50 %); not the commits" in told.stdout
    assert "(-50 %); not the commits" in (tmp_path / "steps.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--metric", "p51_ms"], "has 'p51_ms'; its figures are p50_ms"),
        (["-k", "nowhere"], "has 'p50_ms' of a case with 'nowhere'"),
        (["--results", "no-such-folder"], "no-such-folder: no such folder of results"),
    ],
)
def test_history_answers_a_mistake_in_one_line(
    bench: Bench, written: Path, arguments: list[str], expected: str
) -> None:
    given = arguments if "--results" in arguments else ["--results", str(written), *arguments]
    told = bench.read("history", *given)
    assert told.returncode == 2
    assert expected in told.stderr
    assert len(told.stderr.splitlines()) == 1
