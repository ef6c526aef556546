"""Several machines, one run: here two on the loopback, each a `pytest bench` of its own; and under a torchrun."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from bench.case import Case
from bench.processes import MARK

from .conftest import TINY, Bench
from .nodes import TORCHRUN, endpoint, two_ranks

ABOUT = "UNET_BENCH_TEST"


def on_two_nodes(bench: Bench, *cases: Case, one: tuple[str, ...] = (), other: tuple[str, ...] = ()) -> list[str]:
    """What the two print, each given the same cases and options of its own."""
    bench.variables[ABOUT] = str(bench.results)
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(endpoint())
        common = ("--nodes", "2", "--rdzv-endpoint", where, "--time-limit-s", "200")
        nodes = [stack.enter_context(bench.started(*cases, options=(*common, *own))) for own in (one, other)]
        return [node.communicate(timeout=600)[0] for node in nodes]


def of_this_test(bench: Bench) -> Iterator[psutil.Process]:
    """Processes of cases of this test's runs, zombies left out."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            variables = process.environ()
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and MARK in variables and variables.get(ABOUT) == str(bench.results):
                yield process


def torchrun_of_node_1(bench: Bench, nodes: list[subprocess.Popen[str]]) -> psutil.Process:
    """As soon as it is there, long before it has imported torch."""
    while all(node.poll() is None for node in nodes):
        with contextlib.suppress(psutil.Error):
            for process in of_this_test(bench):
                if "--node-rank=1" in process.cmdline():
                    return process
        time.sleep(0.1)
    raise AssertionError("a node ended before its first case")


@pytest.mark.slow
def test_two_nodes_measure_each_case_together_tell_of_the_right_rank_and_write_one_file(bench: Bench) -> None:
    cases = [two_ranks(name) for name in ("one_rank_raises", "one_rank_killed", "agent_killed", "eager")]
    told = on_two_nodes(bench, *cases)
    (run,) = bench.runs()
    assert run.header.environment.machine.nodes == 2
    assert run.path.parent.name.startswith("2-nodes-")
    found = {record.case.implementation: record for record in run.records}
    # Rank 1 is the other node's: what it said itself has come over, not what the first node saw of it.
    assert found["one_rank_raises"].reason.startswith("rank 1: ValueError: this rank has had enough")
    assert found["one_rank_killed"].reason.startswith("rank 1: the process was killed by SIGKILL")
    assert found["agent_killed"].reason.startswith("torchrun of node 1 (")
    assert {found[name].status for name in ("one_rank_raises", "one_rank_killed", "agent_killed")} == {"crash"}
    assert found["eager"].status == "ok", found["eager"].reason
    assert [rank.rank for rank in found["eager"].ranks] == [0, 1]
    assert found["eager"].figures["ranks_agree"] is True
    assert found["eager"].repeat.count("--nodes 2 --rdzv-endpoint HOST:PORT") == 1
    writer, other = sorted(told, key=lambda text: "nothing is written here" in text)
    assert f"saved: {run.path}" in writer
    assert "saved:" not in other
    for text in told:  # both come to the same end
        assert "3 failed, 1 passed" in text
    assert not list(of_this_test(bench))


@pytest.mark.slow
def test_a_node_that_never_comes_to_a_case_ends_it_in_time_and_the_next_one_is_measured(bench: Bench) -> None:
    bench.variables[ABOUT] = str(bench.results)
    cases = (two_ranks("sleeps"), two_ranks())
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(endpoint())
        # To meet at all they have a minute, for a case half of its limit.
        options = ("--nodes", "2", "--rdzv-endpoint", where, "--join-timeout-s", "60", "--time-limit-s", "70")
        nodes = [stack.enter_context(bench.started(*cases, options=options)) for _ in range(2)]
        torchrun_of_node_1(bench, nodes).send_signal(signal.SIGSTOP)
        for node in nodes:
            node.communicate(timeout=600)
    found = bench.records()
    assert found["sleeps"].status == "timeout"
    assert "torchrun of node 0 (" in found["sleeps"].reason
    assert "waited for the others in vain" in found["sleeps"].reason
    assert found["sleeps"].wall_s < 70
    assert found["eager"].status == "ok", found["eager"].reason
    assert not list(of_this_test(bench))


@pytest.mark.slow
def test_a_node_that_dies_fails_its_case_and_those_after_it_at_once(bench: Bench) -> None:
    bench.variables[ABOUT] = str(bench.results)
    cases = (two_ranks("one_rank_hangs"), two_ranks())
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(endpoint())
        options = ("--nodes", "2", "--rdzv-endpoint", where, "--time-limit-s", "400", "--rank-timeout-s", "200")
        nodes = [stack.enter_context(bench.started(*cases, options=options)) for _ in range(2)]
        dying = psutil.Process(torchrun_of_node_1(bench, nodes).ppid())
        (alive,) = (node for node in nodes if node.pid != dying.pid)
        dying.kill()
        alive.communicate(timeout=600)
    found = bench.records()
    assert found["one_rank_hangs"].status == found["eager"].status == "crash"
    assert found["one_rank_hangs"].reason.startswith("node 1 (")
    assert found["eager"].reason.endswith("has left the run")
    assert found["one_rank_hangs"].wall_s < 150
    assert found["eager"].wall_s < 5
    assert not list(of_this_test(bench))


@pytest.mark.slow
def test_under_a_torchrun_its_processes_are_the_ranks_and_nothing_is_launched_again(bench: Bench) -> None:
    with endpoint() as where:
        options = ("--rdzv-endpoint", where, "--rank-timeout-s", "60")
        command = bench.command(two_ranks("one_rank_raises"), two_ranks("counts_torchruns"), options=options)
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        told = bench.call(command[0], *torchrun, *command[1:])
    (run,) = bench.runs()
    found = {record.case.implementation: record for record in run.records}
    assert found["one_rank_raises"].reason.startswith("rank 1: ValueError: this rank has had enough"), told.stdout
    assert found["counts_torchruns"].status == "ok", found["counts_torchruns"].reason
    assert len(found["counts_torchruns"].ranks) == 2
    assert run.header.environment.machine.nodes == 1
    assert told.stdout.count("saved: ") == 2  # the run, and the file for pytest-benchmark


def test_nodes_that_would_not_do_the_same_are_told_what_differs_and_measure_nothing(bench: Bench) -> None:
    cases = (two_ranks(), Case(devices="2cpu", **TINY))  # type: ignore[arg-type]
    for text in on_two_nodes(bench, *cases, one=("-k", "train")):
        (line,) = {line for line in text.splitlines() if "make them alike" in line}
        assert "cases is " in line
        assert " on node 1 (" in line
    assert not bench.runs()


def test_a_node_that_nobody_joins_says_so_in_time(bench: Bench) -> None:
    with endpoint() as where:
        options = ("--nodes", "2", "--rdzv-endpoint", where, "--join-timeout-s", "0.5")
        told = bench.measure(two_ranks(), options=options)
    assert told.returncode == 4
    assert f"1 of 2 came to --rdzv-endpoint {where} within 0.5 s: give the same command on every node" in told.stdout
    assert not bench.runs()


def test_a_case_of_more_or_fewer_processes_than_torchrun_has_started_is_refused(bench: Bench) -> None:
    bench.variables |= {**TORCHRUN, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    told = bench.measure(two_ranks())
    assert told.returncode == 4
    assert f"{two_ranks().id} has 2 processes and torchrun has started 4: leave the devices to it" in told.stdout


def test_the_same_command_is_planned_on_one_node_without_the_others(bench: Bench) -> None:
    options = ("--nodes", "2", "--rdzv-endpoint", "127.0.0.1:1", "--dry-run")
    told = bench.measure(two_ranks(), Case(**TINY), options=options)  # type: ignore[arg-type]
    assert told.returncode == 0, told.stdout
    assert "unsupported: 1 process cannot be shared out evenly among 2 nodes" in told.stdout
    assert "2 cases, 1 to measure" in told.stdout
