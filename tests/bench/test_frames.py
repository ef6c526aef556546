import math
from collections.abc import Callable

import msgspec
import pytest

from bench.case import Case
from bench.readings import Block, Ceiling, Stage
from bench.report.samples import thinned
from bench.results import Header, Record

from .pages import gpus, record, run

frames = pytest.importorskip("bench.report.frames")
roof = pytest.importorskip("bench.report.roof")
captions = pytest.importorskip("bench.report.captions")

MakeRecord = Callable[..., Record]


def test_a_failed_case_has_a_word_and_no_figure_in_any_chart(header: Header, make_record: MakeRecord) -> None:
    cases = frames.cases([gpus(header, make_record)])
    ladder = frames.ladder(cases)
    failed = ladder[ladder["word"] != ""]
    assert set(failed["word"]) == {"oom", "timeout", "crash", "inaccurate", "unsupported"}
    assert failed[["images_per_s", "peak_memory_mib"]].isna().all(axis=None)
    # How far off a wrong result is may be told; it is no speed.
    assert failed.set_index("word")["rel_l2"].dropna().to_dict() == {"inaccurate": 0.5}
    for frame in (frames.front(cases, "peak_memory_mib"), frames.break_even(cases), frames.history(cases)):
        assert not set(frame["case"]) & set(failed["case"])


def test_the_front_is_what_no_other_beats_in_both(header: Header, make_record: MakeRecord) -> None:
    speeds_and_memory = [(100.0, 10.0), (50.0, 5.0), (50.0, 7.0), (40.0, 5.0), (20.0, 1.0), (100.0, 11.0)]
    records = [
        record(make_record, Case(implementation=f"i{place}"), speed, peak_memory_mib=memory)
        for place, (speed, memory) in enumerate(speeds_and_memory)
    ]
    front = frames.front(frames.cases([run(header, *records)]), "peak_memory_mib")
    found = {row.case for row in front.itertuples() if row.front}
    beaten = {
        mine
        for mine, (speed, memory) in enumerate(speeds_and_memory)
        for other in speeds_and_memory
        if other[0] >= speed and other[1] <= memory and other != (speed, memory)
    }
    assert found == set(range(6)) - beaten == {0, 1, 4}


def test_the_ideal_of_many_devices_is_the_fewest_times_their_number(header: Header, make_record: MakeRecord) -> None:
    rows = frames.devices(frames.cases([gpus(header, make_record)]))
    assert rows["processes"].tolist() == [1, 2, 4]
    assert rows["ideal"].tolist() == pytest.approx([30.0, 60.0, 120.0])
    assert rows["efficiency"].tolist() == pytest.approx([1.0, 2**-0.1, 4**-0.1])
    assert "4 devices reaches 87% of the dashed ideal" in captions.devices(rows)


def test_the_cause_of_a_loss_is_told_where_the_ranks_have_measured_it(header: Header, make_record: MakeRecord) -> None:
    one = record(make_record, Case(task="train", devices="1gpu"), 100.0)
    causes = {"lost_to_allreduce": 0.12, "lost_to_compute": 0.2, "lost_to_imbalance": -0.01}
    two = record(make_record, Case(task="train", devices="2gpu"), 140.0, **causes)
    rows = frames.devices(frames.cases([run(header, one, two)]))
    assert rows["lost_text"].tolist() == ["", "shared compute 20%, all-reduce 12%"]
    assert captions.devices(rows).endswith("the time of a step lost to shared compute 20%, all-reduce 12%.")
    without = frames.devices(frames.cases([run(header, one, record(make_record, two.case, 140.0))]))
    assert captions.devices(without).endswith("what the rest was lost to is not recorded.")


def test_without_a_figure_of_the_fewest_devices_there_is_no_ideal(header: Header, make_record: MakeRecord) -> None:
    first = make_record(Case(task="train", devices="1gpu"), "oom", "made up")
    more = record(make_record, Case(task="train", devices="2gpu"), 50.0)
    rows = frames.devices(frames.cases([run(header, first, more)]))
    assert rows["ideal"].isna().all()
    assert rows["efficiency_text"].tolist() == ["", ""]


def test_a_batch_that_is_shared_out_is_compared_with_the_same_batch_on_one_device(
    header: Header, make_record: MakeRecord
) -> None:
    def case(devices: str, **axes: str) -> Case:
        return Case(task="train", batch=16, devices=devices, **axes)  # type: ignore[arg-type]

    strong = [
        record(make_record, case(f"{count}gpu", scaling="strong"), speed) for count, speed in ((2, 90.0), (4, 160.0))
    ]
    weak = [record(make_record, case("1gpu"), 50.0), record(make_record, case("2gpu"), 100.0)]
    synced = record(make_record, case("2gpu", batchnorm="syncbn"), 80.0)
    other = record(make_record, msgspec.structs.replace(case("1gpu"), batch=8), 40.0)
    rows = frames.devices(frames.cases([run(header, *strong, *weak, synced, other)]))
    found = {view: group.set_index("processes")["ideal"].to_dict() for view, group in rows.groupby("view")}
    assert sorted(map(list, found.values())) == [[1, 2], [1, 2], [1, 2, 4]]
    (shared,) = [ideal for view, ideal in found.items() if "strong" in view]
    assert shared == {1: 50.0, 2: 100.0, 4: 200.0}
    assert sorted(rows[rows["most"]]["processes"]) == [2, 2, 4]


def test_a_start_pays_off_after_what_the_figures_say(header: Header, make_record: MakeRecord) -> None:
    records = [
        record(make_record, Case(), 10.0, first_call_ms=100.0),
        record(make_record, Case(implementation="compile"), 20.0, first_call_ms=20_100.0),
        record(make_record, Case(implementation="triton"), 5.0, first_call_ms=200.0),
    ]
    rows = frames.break_even(frames.cases([run(header, *records)])).set_index("rung")
    # 20 s more at the start, 0.05 s less an image.
    assert rows.loc["compile fp32", "images"] == pytest.approx(400)
    assert rows.loc["compile fp32", "text"] == "400 images, 20.0 s"
    assert math.isnan(rows.loc["triton fp32", "images"])
    assert rows.loc["triton fp32", "text"] == "never"


def test_each_stage_stands_under_the_roof_of_its_own_run(header: Header, make_record: MakeRecord) -> None:
    """A ceiling of 1 TFLOP/s and 100 GB/s: the ridge is at 10 FLOP a byte."""
    ceiling = Ceiling(device="cpu", threads=2, precision="fp32", tflop_per_s=1.0, gb_per_s=100.0)
    stages = (Stage(name="inc", ms=10.0, gflop=1.0, gbyte=0.5), Stage(name="down1", ms=20.0, gflop=10.0, gbyte=0.1))
    measured = msgspec.structs.replace(record(make_record, Case(), 10.0), stages=stages)
    other = msgspec.structs.replace(record(make_record, Case(precision="amp_bf16"), 10.0), stages=stages)
    with_roof = msgspec.structs.replace(header, ceilings=(ceiling,))
    rows = roof.frame(frames.cases([run(with_roof, measured, other)]))
    assert set(rows["precision"]) == {"fp32"}, "no roof is borrowed from another precision"
    points = rows[rows["kind"] == "stage"].set_index("stage")
    assert points.loc["inc", ["flop_per_byte", "tflop_per_s", "share"]].tolist() == pytest.approx([2.0, 0.1, 0.5])
    assert points.loc["down1", ["flop_per_byte", "tflop_per_s", "share"]].tolist() == pytest.approx([100.0, 0.5, 0.5])
    assert points["bound"].tolist() == ["bandwidth", "arithmetic"]
    line = rows[rows["kind"] == "roof"]
    assert line["flop_per_byte"].tolist() == pytest.approx([1.0, 10.0, 200.0])
    assert line["tflop_per_s"].tolist() == pytest.approx([0.1, 1.0, 1.0])
    assert roof.frame(frames.cases([run(header, measured)])).empty


@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_thinned_samples_lose_no_slow_step_and_no_mark(make_record: MakeRecord, most: int) -> None:
    times = tuple(1.0 + (number == 4) * 50 for number in range(11))
    blocks = (Block(samples=5, sm_mhz=1500), Block(samples=6, sm_mhz=1200, throttled=("sw_power_cap",)))
    points = thinned(msgspec.structs.replace(make_record(Case()), samples_ms=times, blocks=blocks), most)
    assert len(points) <= most
    assert points[-1][0] == pytest.approx(sum(times) / 1000, rel=1e-4)
    assert max(point[3] for point in points) == 51.0
    assert min(point[2] for point in points) == 1.0
    assert points[-1][4] == "sw_power_cap"
    if most > 11:
        assert [point[5] for point in points] == [1500] * 5 + [1200] * 6
        assert [bool(point[4]) for point in points] == [False] * 5 + [True] * 6


def test_history_joins_no_runs_of_unlike_machines_or_versions(header: Header, make_record: MakeRecord) -> None:
    def at(hour: int, torch: str) -> Header:
        env = header.environment
        machine = msgspec.structs.replace(env.machine, torch_version=torch)
        moment = env.time.replace(hour=hour)
        return msgspec.structs.replace(header, environment=msgspec.structs.replace(env, machine=machine, time=moment))

    runs = [
        run(at(hour, torch), record(make_record, Case(), 10.0 + hour))
        for hour, torch in ((1, "2.13.0"), (3, "2.13.0"), (2, "2.14.0"))
    ]
    rows = frames.history(frames.cases(runs))
    assert rows["images_per_s"].tolist() == [11.0, 12.0, 13.0]
    assert rows["line"].nunique() == 3
    assert "torch_version 2.14.0 → 2.13.0" in rows["changed"].iloc[-1]
    assert "nothing beyond is comparable" in captions.history(rows)


def test_history_rings_a_step_with_the_commits_it_came_with(header: Header, make_record: MakeRecord) -> None:
    def at(hour: int) -> Header:
        moment = header.environment.time.replace(hour=hour)
        env = msgspec.structs.replace(header.environment, commit=f"{hour:x}" * 40, time=moment)
        return msgspec.structs.replace(header, environment=env)

    speeds = [10.0, 10.1, 10.0, 10.1, 10.0, 10.1, 8.0, 8.1, 8.0, 8.1, 8.0, 8.1]
    runs = [run(at(hour), record(make_record, Case(), speed)) for hour, speed in enumerate(speeds)]
    rows = frames.history(frames.cases(runs))
    assert rows[rows["step"] != ""]["step"].tolist() == ["-19.9 % with 5555555..6666666"]
    assert rows[rows["step"] != ""]["time"].str.contains("T06").all()
    assert "1 step, ringed" in captions.history(rows)


def test_a_long_ladder_keeps_eager_and_the_fastest_of_each(header: Header, make_record: MakeRecord) -> None:
    cases = [
        Case(implementation=name, precision=precision, layout=layout)
        for name in ("eager", "compile", "triton")
        for precision in ("fp32", "tf32", "amp_bf16", "amp_fp16")
        for layout in ("nchw", "nhwc")
    ]
    records = [record(make_record, case, 10.0 + place) for place, case in enumerate(cases)]
    rungs = frames.ladder(frames.cases([run(header, *records)]))["rung"].tolist()
    precisions = {"eager fp32", "eager tf32", "eager amp_bf16", "eager amp_fp16"}
    assert set(rungs[:5]) == {*precisions, "eager amp_fp16 nhwc"}
    assert rungs[5:] == ["compile amp_fp16 nhwc", "triton amp_fp16 nhwc"]


def test_agreement_is_never_rounded_up_in_a_chart(header: Header, make_record: MakeRecord) -> None:
    ladder = frames.ladder(frames.cases([gpus(header, make_record)]))
    assert set(ladder["same_class"]) == {"0.9999", "–"}


def test_a_run_without_a_single_record_makes_empty_frames(header: Header) -> None:
    cases = frames.cases([run(header)])
    for make in (frames.ladder, frames.upsampling, frames.devices, frames.break_even, frames.history):
        assert make(cases).empty
