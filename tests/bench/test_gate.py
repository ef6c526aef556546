"""Whole gates of a toy project: real commits, real worktrees, real processes."""

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

from bench.errors import UsageError
from bench.gate.checkout import checked_out
from bench.gate.decision import Rule
from bench.gate.driver import Gate
from bench.gate.markdown import markdown
from bench.gate.report import Report, Row
from bench.gate.screening import Options
from bench.gate.tell import Teller

from .conftest import ROOT, Bench
from .toy import Toy

# As few trials as there can be: Student's t with one degree of freedom would want nearly no noise for 99 %.
RULE = Rule(fewest=2, most=4, confidence=0.9)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    (tmp_path / "toy").mkdir()
    return Toy(tmp_path / "toy")


def gate(toy: Toy, base: str, head: str | None = None) -> tuple[Report, str]:
    """A gate of as few trials as there can be, and what it said meanwhile."""
    said = io.StringIO()
    options = Options(base=base, head=head, rule=RULE, budget_s=1.0, repository=toy.root)
    report = Gate(options, Teller(Console(file=said, width=200))).run()
    assert toy.git("worktree", "list").count("\n") == 1, "no worktree is left behind"
    return report, said.getvalue()


def rows(report: Report) -> dict[tuple[str, str], Row]:
    return {(row.name, row.metric): row for row in report.rows}


@pytest.mark.slow
def test_a_slower_op_of_the_same_name_fails_and_everything_else_is_told_by_name(toy: Toy) -> None:
    toy.change("bench/case.py", '("infer-toy",)', '("infer-toy", "infer-removed", "infer-raises")')
    base = toy.commit()
    toy.change("unet/__init__.py", "2.0", "6.0")
    toy.change("bench/__main__.py", "REGISTERS = 100", "REGISTERS = 110")
    toy.change("kernels/__init__.py", "return x + MILLISECONDS", "return MILLISECONDS + x")
    toy.change("bench/case.py", '"infer-removed", "infer-raises"', '"infer-new", "infer-raises"')
    toy.change("bench/subject.py", "return Subject()", "return Subject() if case != 'infer-raises' else 1 / 0")
    head = toy.commit()
    report, said = gate(toy, base, head)
    found = rows(report)

    slow = found["infer-toy", "time"]
    assert (slow.word, slow.fails, slow.processes) == ("SLOWER", True, 1)
    assert (slow.change or 0) > 0.5
    assert found["A/A infer-toy", "time"].twin
    assert found["infer-toy", "live_mib"].word == "SAME"
    assert (found["infer-removed", "*"].word, found["infer-removed", "*"].fails) == ("MISSING", True)
    assert (found["infer-new", "*"].word, found["infer-new", "*"].fails) == ("MISSING", False)
    assert (found["infer-raises", "*"].word, found["infer-raises", "*"].fails) == ("BROKEN", True)
    assert "ZeroDivisionError" in found["infer-raises", "*"].reason
    for target in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"):
        assert found[f"work {target}", "registers"].word == "SLOWER"
        assert found[f"work {target}", "instructions"].word == "SAME"
    assert report.status == 1
    assert report.verdict.startswith("fail: ")
    assert "2 missing or broken" in report.verdict
    assert "SLOWER  infer-toy" in said
    assert len([one for one in report.samples if one.phase == "confirming pass" and one.row == "infer-toy"]) >= 4
    assert "infer-removed" in markdown(report)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


@pytest.mark.slow
def test_a_base_that_does_not_build_leaves_nothing_to_compare(toy: Toy) -> None:
    toy.change("unet/__init__.py", "MILLISECONDS", "MILLISECONDS (")
    base = toy.commit()
    toy.change("unet/__init__.py", "MILLISECONDS (", "MILLISECONDS")
    report, _ = gate(toy, base)
    row = rows(report)["infer-toy", "*"]
    assert (row.word, row.fails) == ("BROKEN", False)
    assert row.reason.startswith("broken in base: SyntaxError")
    assert report.status == 5


@pytest.mark.slow
def test_a_head_that_lists_no_cases_is_broken_by_name(toy: Toy) -> None:
    base = toy.commit()
    toy.change("bench/__main__.py", "import json, sys", "raise SystemExit('no preset ci')")
    report, _ = gate(toy, base)
    assert [(row.name, row.word, row.fails) for row in report.rows] == [("every case", "BROKEN", True)]
    assert "no preset ci" in report.rows[0].reason
    assert report.status == 3


@pytest.mark.slow
def test_a_worker_that_dies_is_broken_and_leaves_no_worktree(toy: Toy) -> None:
    base = toy.commit()
    toy.change("unet/__init__.py", "MILLISECONDS = 2.0", "import os; os._exit(7)")
    report, _ = gate(toy, base)
    row = rows(report)["infer-toy", "*"]
    assert (row.word, row.fails) == ("BROKEN", True)
    assert "the process ended with status 7" in row.reason


def test_an_unknown_commit_is_a_mistake_and_no_traceback(toy: Toy) -> None:
    toy.commit()
    with pytest.raises(UsageError, match="'no-such-branch' is no commit of"), checked_out(toy.root, "no-such-branch"):
        pass


def test_a_folder_without_a_repository_is_a_mistake_and_no_traceback(tmp_path: Path) -> None:
    said = r"is no commit of .*: give a branch, a tag or a hash that git knows here \(.*git"  # in git's own words
    with pytest.raises(UsageError, match=said), checked_out(tmp_path, "HEAD"):
        pass


def test_a_base_that_a_shallow_clone_lacks_is_a_mistake_that_says_so(toy: Toy, tmp_path: Path) -> None:
    toy.commit()
    toy.change("unet/__init__.py", "2.0", "3.0")
    toy.commit()
    shallow = tmp_path / "shallow"
    toy.git("clone", "--quiet", "--depth", "1", toy.root.as_uri(), str(shallow))
    said = r"\(the clone is shallow: `git fetch --unshallow`"
    with pytest.raises(UsageError, match=said), checked_out(shallow, "HEAD~1"):
        pass


def test_inside_a_hook_it_is_still_our_repository_that_is_checked_out(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = toy.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    with checked_out(toy.root, commit) as side:
        assert (Path(side.root) / "unet/__init__.py").exists()
    monkeypatch.delenv("GIT_DIR")
    assert len(toy.git("worktree", "list").splitlines()) == 1


def test_a_worktree_is_gone_even_after_an_interruption(toy: Toy) -> None:
    commit = toy.commit()

    def interrupted() -> None:
        with checked_out(toy.root, commit) as side:
            assert (Path(side.root) / "unet").is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert toy.git("worktree", "list").count("\n") == 1


ENDLESS = """
import sys
from pathlib import Path
from rich.console import Console
from bench.gate.driver import Gate
from bench.gate.screening import Options
from bench.gate.tell import Teller
Gate(Options(base="HEAD", repository=Path(sys.argv[1])), Teller(Console())).run()
"""


def told_to_end(toy: Toy, begun: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """A gate that would never end gets the order to as soon as it has `begun`; the processes that it had then."""
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(toy.root)], cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not begun(psutil.Process(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        found = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
    assert toy.git("worktree", "list").count("\n") == 1
    return found


def has_worker(gate: psutil.Process) -> bool:
    """Whether a process of the gate measures, which neither git nor a list of cases does."""
    with contextlib.suppress(psutil.Error):
        return any(child.cmdline()[1:3] == ["-m", "bench.gate.worker"] for child in gate.children())
    return False


def test_an_order_to_end_leaves_no_worktree_and_no_process(toy: Toy) -> None:
    toy.change("unet/__init__.py", "MILLISECONDS", "import time; time.sleep(1000); MILLISECONDS")
    toy.commit()
    workers = told_to_end(toy, has_worker)
    assert workers
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_an_order_to_end_while_git_still_checks_out_leaves_no_worktree(toy: Toy, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (toy.root / ".gitattributes").write_text("unet/__init__.py filter=slow\n")
    toy.git("config", "filter.slow.smudge", f"touch {begun}; sleep 2; cat")
    toy.commit()
    told_to_end(toy, lambda _: begun.exists())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gate"], "Missing option '--base'"),
        (["gate", "--base", "no-such-ref"], "'no-such-ref' is no commit"),
        (["gate", "--base", "HEAD", "--budget", "long"], "--budget long: expected a number of seconds above 0"),
        (["gate", "--base", "HEAD", "--markdown", "no/such/folder/x.md"], "no/such/folder/x.md: cannot write a report"),
        (["gate", "--base", "HEAD", "--trials", "1"], "Invalid value for '--trials'"),
        (["gate", "--base", "HEAD", "--case", "infer-eager"], "'infer-eager' is no case's id"),
        (["gate", "--base", "HEAD", "--preset", "fast"], "unknown preset 'fast'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_a_mistake_is_answered_in_one_line_before_anything_is_measured(
    bench: Bench, arguments: list[str], expected: str
) -> None:
    told = bench.read(*arguments)
    assert told.returncode == 2
    assert expected in told.stderr
    assert len(told.stderr.splitlines()) == 1, told.stderr


def test_the_driver_imports_no_torch() -> None:
    code = "import bench.gate.driver, bench.gate.simulation, sys, json; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
