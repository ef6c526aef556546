import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import derive
from bench.case import AXES, Case
from bench.engine import measure
from bench.engine.metric import metrics
from bench.formats import benchmark_json
from bench.results import (
    SCHEMA,
    Header,
    Record,
    ResultsError,
    Settings,
    frame,
    newest,
    read,
    resumable,
    rows,
)
from bench.runfile import RunFile

MakeRecord = Callable[..., Record]


@pytest.fixture
def run_file(header: Header, make_record: MakeRecord, tmp_path: Path) -> RunFile:
    file = RunFile.create(header, tmp_path)
    for batch in (1, 2, 3):
        file.append(make_record(Case(batch=batch), p50_ms=float(batch), note='Übergröße\n"quoted"'))
    return file


def test_a_file_is_named_after_machine_time_and_commit(run_file: RunFile, tmp_path: Path) -> None:
    assert run_file.path.relative_to(tmp_path).as_posix() == "amd-epyc-2cpu/20261123T120000Z_0123456.jsonl"


def test_changed_sources_mark_the_file(header: Header, tmp_path: Path) -> None:
    changed = msgspec.structs.replace(header, environment=msgspec.structs.replace(header.environment, dirty=True))
    assert RunFile.create(changed, tmp_path).path.name.endswith("-dirty.jsonl")


def test_two_runs_begun_in_one_second_get_two_files(header: Header, tmp_path: Path) -> None:
    assert RunFile.create(header, tmp_path).path != RunFile.create(header, tmp_path).path


def test_what_is_written_reads_back(run_file: RunFile, header: Header) -> None:
    run = read(run_file.path)
    assert run.header == header
    assert [record.case.batch for record in run.records] == [1, 2, 3]
    assert run.records[0].figures == {"p50_ms": 1.0, "note": 'Übergröße\n"quoted"'}
    assert run.records[0].samples_ms == (1.0, 2.0, 4.0)
    assert run.damaged == 0


def test_the_last_record_of_a_case_counts(run_file: RunFile, make_record: MakeRecord) -> None:
    run_file.append(make_record(Case(batch=1), "crash", "later"))
    run = read(run_file.path)
    assert [(record.case.batch, record.status) for record in run.records] == [(1, "crash"), (2, "ok"), (3, "ok")]


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_off_at_any_byte_keeps_every_earlier_record(run_file: RunFile, data: st.DataObject) -> None:
    whole = run_file.path.read_bytes()
    first = whole.index(b"\n") + 1
    cut = data.draw(st.integers(first, len(whole)))
    torn = run_file.path.with_name("torn.jsonl")
    torn.write_bytes(whole[:cut])
    run = read(torn)
    # A last line that lacks nothing but its line break is whole.
    complete = sum(cut >= end for end, byte in enumerate(whole) if byte == ord("\n")) - 1
    assert [record.case.batch for record in run.records] == [1, 2, 3][:complete]
    assert run.damaged == (whole[:cut].rpartition(b"\n")[2] != b"" and cut not in _ends(whole))


def _ends(text: bytes) -> set[int]:
    return {position for position, byte in enumerate(text) if byte == ord("\n")}


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_cut_off_in_mid_line_is_continued_without_loss(
    run_file: RunFile, make_record: MakeRecord, data: st.DataObject
) -> None:
    whole = run_file.path.read_bytes()
    cut = data.draw(st.integers(whole.index(b"\n"), len(whole)))
    torn = RunFile(run_file.path.with_name("torn.jsonl"), run_file.header)
    torn.path.write_bytes(whole[:cut])
    before = read(torn.path).records
    torn.append(make_record(Case(batch=9)))
    assert read(torn.path).records == (*before, make_record(Case(batch=9)))


def test_a_newer_schema_is_refused(run_file: RunFile) -> None:
    run_file.path.write_text(run_file.path.read_text().replace(f'"schema":{SCHEMA}', '"schema":999', 1))
    with pytest.raises(ResultsError, match=r"schema 999 is newer than this program's 2; update the program"):
        read(run_file.path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}",
        b"[1]",
        b"null",
        b'"text"',
        b'{"schema": "1"}',
        b'{"schema": 1}',
        b"\xff\xfe\x00",
        b"PK\x03\x04",
    ],
)
def test_a_file_that_is_no_run_is_refused_in_a_line_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_bytes(content)
    with pytest.raises(ResultsError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(ResultsError, match=str(path)):
            read(path)


def test_a_full_disk_loses_the_record_in_hand_and_nothing_else(run_file: RunFile) -> None:
    before = run_file.path.read_bytes()
    # A limit on the size of files fails a write half-way, as a full disk does.
    code = f"""
import pathlib, resource, signal, sys
from bench.results import ResultsError, read
from bench.runfile import RunFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, resource.RLIM_INFINITY))
path = pathlib.Path(sys.argv[1])
run = read(path)
try:
    RunFile(path, run.header).append(run.records[0])
except ResultsError as error:
    print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", code, str(run_file.path)], capture_output=True, text=True, check=True
    ).stdout
    assert "what was recorded before is whole" in told
    assert "--resume" in told
    assert run_file.path.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(header: Header, tmp_path: Path) -> None:
    (tmp_path / "amd-epyc-2cpu").write_text("a file where the folder should be")
    with pytest.raises(ResultsError, match="amd-epyc-2cpu: cannot write results there"):
        RunFile.create(header, tmp_path)


def test_resume_finds_the_run_of_the_same_machine_sources_preset_and_settings(
    run_file: RunFile, tmp_path: Path
) -> None:
    run = resumable(run_file.header, tmp_path)
    assert run is not None
    assert run.path == run_file.path


@pytest.mark.parametrize("change", ["preset", "settings", "sources", "commit", "machine"])
def test_resume_never_mixes_unlike_runs(run_file: RunFile, tmp_path: Path, change: str) -> None:
    header, env = run_file.header, run_file.header.environment
    replace = msgspec.structs.replace
    other = {
        "preset": replace(header, preset="full"),
        "settings": replace(header, settings=Settings(measure_s=1)),
        "sources": replace(header, environment=replace(env, source_hash="0" * 64)),
        "commit": replace(header, environment=replace(env, commit="f" * 40)),
        "machine": replace(header, environment=replace(env, machine=replace(env.machine, torch_version="2.11.0"))),
    }[change]
    assert resumable(other, tmp_path) is None


def test_load_and_time_do_not_stand_in_the_way_of_resume(run_file: RunFile, tmp_path: Path) -> None:
    env = msgspec.structs.replace(run_file.header.environment, load_average=(9.0, 9.0, 9.0))
    assert resumable(msgspec.structs.replace(run_file.header, environment=env), tmp_path) is not None


def test_the_newest_run_is_the_one_begun_last_on_any_machine(tmp_path: Path) -> None:
    for name in ("b/20260101T000000Z_aaaaaaa.jsonl", "a/20260201T000000Z_bbbbbbb.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert newest(tmp_path) == tmp_path / "a/20260201T000000Z_bbbbbbb.jsonl"
    assert newest(tmp_path / "empty") is None


def test_a_frame_has_a_row_a_record_and_a_column_an_axis_and_a_figure(
    run_file: RunFile, make_record: MakeRecord
) -> None:
    run_file.append(make_record(Case(batch=8), "oom", "out of memory"))
    table = frame([read(run_file.path)])
    assert list(table["batch"]) == [1, 2, 3, 8]
    assert list(table["status"]) == ["ok", "ok", "ok", "oom"]
    # A case without figures has none: not a zero that someone would rank.
    assert table["p50_ms"].isna().tolist() == [False, False, False, True]
    assert set(next(rows(read(run_file.path)))) == {*table.columns}


def test_no_figure_takes_the_place_of_an_axis(run_file: RunFile, make_record: MakeRecord) -> None:
    run_file.append(make_record(Case(batch=8, threads=1), threads=2))  # as old files have it
    assert list(rows(read(run_file.path)))[-1]["threads"] == 1
    figures = {*measure.COLUMNS, *derive.COLUMNS, *(name for metric in metrics() for name in metric.columns)}
    assert not figures & {*AXES}


def test_pytest_benchmark_compares_what_we_export(run_file: RunFile, make_record: MakeRecord, tmp_path: Path) -> None:
    run_file.append(make_record(Case(batch=8), "oom", "out of memory"))
    exported = benchmark_json(read(run_file.path))
    assert [one["stats"]["data"] for one in exported["benchmarks"]] == [[0.001, 0.002, 0.004]] * 3
    path = tmp_path / "run.json"
    path.write_text(json.dumps(exported))
    table = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=median,rounds"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert table.returncode == 0, table.stderr
    assert Case(batch=3).id in table.stdout + table.stderr
    assert Case(batch=8).id not in table.stdout + table.stderr


def test_ten_thousand_records_are_a_frame_in_under_two_seconds(
    header: Header, make_record: MakeRecord, tmp_path: Path
) -> None:
    figures = {f"figure_{number}": number * 1.5 for number in range(40)}
    for threads in range(20):
        file = RunFile.create(header, tmp_path)
        record = make_record(Case(), p50_ms=1.0, **figures)
        cases = (Case(batch=batch, threads=threads) for batch in range(1, 501))
        lines = [
            msgspec.json.encode(msgspec.structs.replace(record, case=case, samples_ms=(1.2345,) * 100))
            for case in cases
        ]
        with file.path.open("ab") as out:
            out.write(b"\n".join(lines) + b"\n")
    frame([])  # pandas is imported
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    table = frame(read(path) for path in tmp_path.glob("*/*.jsonl"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - start < 2
    assert len(table) == 10_000
