import io
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.case import AXES, Case, parse_id
from bench.machine import machine
from bench.readings import Ceiling
from bench.recommend.ahead import ahead
from bench.recommend.answer import Answer, _fresh, answers, measure
from bench.recommend.decide import Decision, decide
from bench.recommend.evidence import SCATTER, Evidence, Interval, questions, weigh
from bench.recommend.limits import OPTION, Limits, _rounded
from bench.recommend.say import say
from bench.results import Header, Record, ResultsError, Run, Settings, Status
from bench.support import unsupported
from bench.weights import Weights

from .conftest import MACHINE
from .evidence import NOON, case, record

MakeRecord = Callable[..., Record]


@pytest.fixture
def evidence(header: Header) -> Callable[..., list[Evidence]]:
    return lambda *records, percentile=50: _evidence(header, [records], percentile)


def _evidence(header: Header, runs: Sequence[Sequence[Record]], percentile: int = 50) -> list[Evidence]:
    found = [
        Run(path=Path(f"{number}.jsonl"), header=_later(header, number), records=tuple(records))
        for number, records in enumerate(runs)
    ]
    (measured,) = questions(found).values()
    return weigh(measured, percentile)


def _later(header: Header, hours: int) -> Header:
    env = header.environment
    return msgspec.structs.replace(
        header, environment=msgspec.structs.replace(env, time=env.time + timedelta(hours=hours))
    )


def won(decision: Decision) -> str:
    assert decision.winner is not None
    return parse_id(decision.winner.id).implementation


def why(decision: Decision) -> dict[str, str]:
    return {parse_id(loser.id).implementation: loser.why for loser in decision.losers}


@pytest.mark.parametrize("status", ["inaccurate", "oom", "timeout", "crash", "unsupported"])
def test_a_case_that_is_not_ok_never_wins_however_fast(evidence: Callable[..., list[Evidence]], status: Status) -> None:
    found = decide(evidence(record(case(), p50=10.0), record(case("compile"), status, p50=0.001)), Limits())
    assert won(found) == "eager"
    assert why(found) == {"compile": "failed"}
    assert found.losers[0].reason == f"{status}: for a reason"


def test_a_failure_in_one_run_counts_more_than_success_in_another(header: Header) -> None:
    fast, slow = case("compile"), case()
    runs = [[record(fast, "crash")], [record(fast, p50=1.0), record(slow)]]
    assert won(decide(_evidence(header, runs), Limits())) == "eager"


AGAINST = [
    ({"disturbed": True}, "disturbed: other processes used the cores"),
    ({"warmup_ended": "time"}, "warm-up ended before the steps were steady"),
    ({"drifting": True}, "its speed was still moving"),
    ({"throttled": "sw_power_cap"}, "the GPU's clock was held down"),
    ({"agreement_meaningful": False}, "agreement of classes says nothing"),
]


@pytest.mark.parametrize(("figures", "said"), AGAINST, ids=lambda part: part[:12] if isinstance(part, str) else "")
def test_what_speaks_against_a_winner_is_said_with_it_and_nothing_else(
    evidence: Callable[..., list[Evidence]], figures: dict[str, str | bool], said: str
) -> None:
    winner = decide(evidence(record(case(), **figures)), Limits()).winner
    assert winner is not None
    first, alone = winner.caveats
    assert first.startswith(said)
    assert alone.startswith("one process: another draws another speed")


@pytest.mark.parametrize(("figures", "said"), AGAINST, ids=lambda part: part[:12] if isinstance(part, str) else "")
def test_what_speaks_against_one_of_several_processes_speaks_against_their_case(
    header: Header, figures: dict[str, str | bool], said: str
) -> None:
    for runs in ([[record(case(), **figures)], [record(case())]], [[record(case())], [record(case(), **figures)]]):
        (one,) = _evidence(header, runs)
        (caveat,) = one.caveats
        assert caveat.startswith(said)


def test_intervals_overlap_where_they_touch_whichever_is_asked() -> None:
    one, next_to_it, apart = (Interval(value=low, low=low, high=low + 1) for low in (1.0, 2.0, 2.1))
    assert one.overlaps(next_to_it)
    assert next_to_it.overlaps(one)
    assert not one.overlaps(apart)
    assert not apart.overlaps(one)


def test_a_winner_of_changed_sources_says_that_it_does_not_count(header: Header) -> None:
    changed = msgspec.structs.replace(header, environment=msgspec.structs.replace(header.environment, dirty=True))
    for each, expected in ((header, 0), (changed, 1)):
        winner = decide(_evidence(each, [[record(case())]]), Limits()).winner
        assert winner is not None
        assert sum("such results do not count" in caveat for caveat in winner.caveats) == expected


def test_overlapping_intervals_are_a_tie_and_apart_ones_are_not(evidence: Callable[..., list[Evidence]]) -> None:
    close = decide(evidence(record(case(), p50=10.0), record(case("compile"), p50=10.5)), Limits())
    assert [parse_id(tie.id).implementation for tie in close.ties] == ["compile"]
    assert why(close) == {}
    apart = decide(evidence(record(case(), p50=10.0), record(case("compile"), p50=12.0)), Limits())
    assert (apart.ties, why(apart)) == ((), {"compile": "dominated"})
    wide = decide(evidence(record(case(), p50=10.0, width=1.5), record(case("compile"), p50=12.0, width=1.5)), Limits())
    assert len(wide.ties) == 1


def test_a_run_that_is_named_twice_or_copied_makes_nothing_surer(header: Header) -> None:
    run = Run(path=Path("a.jsonl"), header=header, records=(record(case(), p50=10.0),))
    copy = msgspec.structs.replace(run, path=Path("b.jsonl"))
    (once,), (twice,) = (weigh(*questions(runs).values(), 50) for runs in ([run], [run, copy, run]))
    assert twice == once


def test_two_processes_know_better_than_one(header: Header) -> None:
    one, other = case(), case("compile")
    once = [[record(one, p50=10.0), record(other, p50=10.3)]]
    assert decide(_evidence(header, once), Limits()).ties
    twice = [*once, [record(one, p50=10.05), record(other, p50=10.35)]]
    found = _evidence(header, twice)
    assert not decide(found, Limits()).ties
    (mine,) = (each for each in found if each.case == one)
    interval = mine.estimates["latency"]
    assert (interval.low, interval.value, interval.high) == pytest.approx((10.0, 10.025, 10.05))
    alone = _evidence(header, once)[0].estimates["latency"]
    assert (alone.low, alone.high) == pytest.approx((10.0 * (1 - SCATTER), 10.0 * (1 + SCATTER)))


def test_what_one_of_several_processes_did_not_find_is_not_known(header: Header) -> None:
    whole = {"energy_j_per_image": 5.0, "load_ms": 1.0, "first_call_ms": 2.0}
    lacks = {"agreement_meaningful": False, "p50_ms": None, "first_call_ms": None}
    (both,) = _evidence(header, [[record(case(), **whole)], [record(case(), **whole)]])
    assert set(both.estimates) == {"latency", "throughput", "memory", "energy", "agreement"}
    assert both.start_ms == 3
    for first, second in ((whole, lacks), (lacks, whole)):
        (one,) = _evidence(header, [[record(case(), **first)], [record(case(), **second)]])
        assert set(one.estimates) == {"memory"}
        assert one.start_ms is None


@pytest.mark.parametrize(
    ("figure", "quantity"), [("images_per_s", "throughput"), ("class_agreement", "agreement"), ("p50_ms", "latency")]
)
def test_a_figure_that_is_not_there_is_no_estimate(header: Header, figure: str, quantity: str) -> None:
    (one,) = _evidence(header, [[record(case(), **{figure: None})]])
    assert quantity not in one.estimates
    assert "memory" in one.estimates


def test_of_three_processes_the_median_counts_and_all_their_intervals(header: Header) -> None:
    (one,) = _evidence(header, [[record(case(), p50=p50, peak_memory_mib=p50)] for p50 in (30.0, 10.0, 20.0)])
    assert [one.estimates["memory"].value, one.estimates["memory"].low, one.estimates["memory"].high] == [20, 10, 30]
    assert (one.estimates["latency"].value, one.estimates["latency"].low) == (20, pytest.approx(10))
    assert one.figure("p50_ms") == 20


def test_records_of_older_sources_are_another_program(header: Header) -> None:
    env = msgspec.structs.replace(header.environment, source_hash="0" * 64, time=NOON - timedelta(days=1))
    old = Run(
        path=Path("old"),
        header=msgspec.structs.replace(header, environment=env),
        records=(record(case("compile"), p50=1.0), record(case(), p50=50.0)),
    )
    new = Run(path=Path("new"), header=header, records=(record(case("compile"), p50=20.0), record(case(), p50=10.0)))
    (measured,) = questions([new, old]).values()
    assert won(decide(weigh(measured, 50), Limits())) == "eager"


def test_unlike_networks_machines_sizes_and_tasks_are_never_compared(header: Header) -> None:
    records = (
        record(case()),
        record(case(upsampling="bilinear")),
        record(case(size="512x512")),
        record(case(task="train")),
        record(case(width=32)),
        record(case(modification="vector")),
        record(case(batch=8, layout="nhwc", threads=1, devices="2cpu")),
    )
    run = Run(path=Path("x"), header=header, records=records)
    other = msgspec.structs.replace(MACHINE, cpu="Intel Xeon")
    env = msgspec.structs.replace(header.environment, machine=other)
    elsewhere = Run(path=Path("y"), header=msgspec.structs.replace(header, environment=env), records=records[:1])
    found = questions([run, elsewhere])
    assert sorted(map(len, found.values())) == [1, 1, 1, 1, 1, 1, 2]


def test_networks_of_unlike_weights_are_never_compared(header: Header) -> None:
    def of(sha256: str) -> Run:
        weights = Weights(path="x", sha256=sha256, channels=3, classes=2, upsampling="transposed", width=64, depth=4)
        settings = msgspec.structs.replace(header.settings, weights=weights)
        return Run(path=Path(sha256), header=msgspec.structs.replace(header, settings=settings), records=(one,))

    one = record(case())
    fitted = Run(path=Path("fitted"), header=header, records=(one,))
    runs = [fitted, of("a"), of("b"), of("a")]
    assert [question.weights for question in questions(runs)] == ["", "a", "b"]
    wanted = [answers(runs, Limits(), axes={}, weights=sha256) for sha256 in ("a", "c")]
    assert [[answer.question.weights for answer in found] for found in wanted] == [["a"], []]


def test_a_limit_that_is_broken_is_named_with_how_much(evidence: Callable[..., list[Evidence]]) -> None:
    found = decide(
        evidence(record(case(), p50=10.0), record(case("compile"), p50=5.0, peak_memory_mib=900.0)),
        Limits(max_memory_mib=800),
    )
    assert won(found) == "eager"
    assert found.losers[0].why == "limit"
    assert found.losers[0].reason == "memory 900 MiB, limit 800 MiB, 1.12 times as much"


@pytest.mark.parametrize(
    ("limits", "beyond"),
    [
        (Limits(max_latency_ms=10.0), Limits(max_latency_ms=9.99)),
        (Limits(max_memory_mib=600.0), Limits(max_memory_mib=599.0)),
        (Limits(max_joules=5.0), Limits(max_joules=4.99)),
        (Limits(min_agreement=0.99), Limits(min_agreement=0.9901)),
    ],
    ids=str,
)
def test_a_limit_that_is_just_met_is_kept(
    evidence: Callable[..., list[Evidence]], limits: Limits, beyond: Limits
) -> None:
    figures = {"peak_memory_mib": 600.0, "energy_j_per_image": 5.0, "class_agreement": 0.99}
    assert won(decide(evidence(record(case(), p50=10.0, **figures)), limits)) == "eager"
    assert decide(evidence(record(case(), p50=10.0, **figures)), beyond).winner is None


def test_a_limit_kept_by_the_estimate_and_not_by_its_interval_is_said(evidence: Callable[..., list[Evidence]]) -> None:
    found = decide(evidence(record(case(), p50=10.0, width=2.0)), Limits(max_latency_ms=11))
    assert found.winner is not None
    assert "latency may break its limit: 12.0 ms is possible, 11 is allowed" in found.winner.caveats


def test_a_percentile_that_was_not_recorded_is_not_made_up(evidence: Callable[..., list[Evidence]]) -> None:
    found = decide(
        evidence(record(case(), wall_step_ms=10.0), percentile=99), Limits(max_latency_ms=100, percentile=99)
    )
    assert found.winner is None
    assert found.losers[0].why == "unjudged"
    assert found.losers[0].reason == (
        "p99 is not recorded, 50 samples of the 200 it needs: measure it with --measure-s 4"
    )


def test_agreement_that_means_nothing_keeps_no_limit_on_agreement(evidence: Callable[..., list[Evidence]]) -> None:
    found = decide(evidence(record(case(), agreement_meaningful=False)), Limits(min_agreement=0.9))
    assert found.winner is None
    assert found.losers[0].why == "unjudged"


def test_agreement_is_rounded_down(evidence: Callable[..., list[Evidence]]) -> None:
    found = evidence(record(case(), class_agreement=0.99999))
    assert decide(found, Limits(min_agreement=1.0)).winner is None
    assert found[0].estimates["agreement"].value == 0.9999


def test_where_nothing_fits_the_smallest_relaxation_comes_first(evidence: Callable[..., list[Evidence]]) -> None:
    records = (
        record(case(), p50=10.0, peak_memory_mib=900.0),
        record(case("compile"), p50=21.0, peak_memory_mib=700.0),
    )
    found = decide(evidence(*records), Limits(max_latency_ms=20, max_memory_mib=750))
    assert [(one.option, one.given, one.to) for one in found.relax] == [
        ("--max-latency-ms", 20.0, 21.0),
        ("--max-memory-mib", 750.0, 900.0),
    ]


def test_a_change_is_small_as_a_share_of_its_limit_and_goes_to_the_nearest_case(
    evidence: Callable[..., list[Evidence]],
) -> None:
    records = (
        record(case(), p50=1.0, peak_memory_mib=1100.0),
        record(case(batch=4), p50=1.0, peak_memory_mib=1500.0),
        record(case("compile"), p50=3.0, peak_memory_mib=900.0),
    )
    found = decide(evidence(*records), Limits(max_latency_ms=2, max_memory_mib=1000))
    assert [(one.option, one.to) for one in found.relax] == [("--max-memory-mib", 1100.0), ("--max-latency-ms", 3.0)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0.165, 0.165), (0.16501, 0.166), (7.0, 7.0), (21.234, 21.3), (21.0, 21.0)),
        *((1234.0, 1240.0), (1234.5, 1240.0), (999.5, 1000.0), (0.012341, 0.0124)),
    ],
)
def test_a_relaxed_limit_is_told_in_three_digits_and_lets_the_value_in(value: float, expected: float) -> None:
    assert _rounded(value, "latency") == expected
    assert _rounded(value, "latency") >= value
    assert _rounded(0.98765, "agreement") == 0.98765


def test_of_cases_that_break_several_limits_the_one_with_fewest_that_can_be_judged_is_told(
    evidence: Callable[..., list[Evidence]],
) -> None:
    records = (
        record(case(), p50=30.0, peak_memory_mib=900.0, class_agreement=0.5),
        record(case(batch=4), p50=40.0, peak_memory_mib=900.0),
        record(case("compile"), p50=30.0, agreement_meaningful=False),
    )
    found = decide(evidence(*records), Limits(max_latency_ms=20, max_memory_mib=750, min_agreement=0.9))
    assert found.relax == ()
    assert [(one.id, one.option) for one in found.together] == [
        (case(batch=4).id, "--max-latency-ms"),
        (case(batch=4).id, "--max-memory-mib"),
    ]


def test_why_agreement_cannot_be_judged_is_told(evidence: Callable[..., list[Evidence]]) -> None:
    for figures, expected in (
        ({"agreement_meaningful": False}, "agreement of classes says nothing about this network on this picture"),
        ({"class_agreement": None}, "agreement was not measured"),
    ):
        (loser,) = decide(evidence(record(case(), **figures)), Limits(min_agreement=0.9)).losers
        assert (loser.why, loser.reason) == ("unjudged", expected)


def test_where_no_single_limit_is_enough_all_that_the_nearest_breaks_is_said(
    evidence: Callable[..., list[Evidence]],
) -> None:
    found = decide(
        evidence(record(case(), p50=30.0, peak_memory_mib=900.0)), Limits(max_latency_ms=20, max_memory_mib=750)
    )
    assert found.relax == ()
    assert [(one.option, one.to) for one in found.together] == [("--max-latency-ms", 30.0), ("--max-memory-mib", 900.0)]


def test_a_compiler_pays_off_after_as_many_images_as_its_start_costs(evidence: Callable[..., list[Evidence]]) -> None:
    slow = record(case(), p50=20.0, load_ms=100.0, first_call_ms=100.0)
    fast = record(case("compile"), p50=10.0, load_ms=100.0, first_call_ms=20_095.0)
    even = decide(evidence(slow, fast), Limits()).break_even
    assert even is not None
    assert even.images == 2000  # 19,995 ms at 10 ms an image saved, rounded up
    assert even.against == slow.case.id


def test_what_starts_later_and_runs_slower_never_pays_off(evidence: Callable[..., list[Evidence]]) -> None:
    small = record(case(), p50=20.0, first_call_ms=9000.0, peak_memory_mib=100.0)
    found = decide(evidence(small, record(case("compile"), p50=10.0)), Limits(objective="memory"))
    assert won(found) == "eager"
    assert found.break_even is None


def test_what_was_not_measured_in_the_objective_cannot_win(evidence: Callable[..., list[Evidence]]) -> None:
    one, other = record(case()), record(case("compile"), energy_j_per_image=5.0)
    found = decide(evidence(one, other), Limits(objective="energy"))
    assert won(found) == "compile"
    assert [(loser.why, loser.reason) for loser in found.losers] == [("unjudged", "energy was not measured")]


def test_an_artefact_starts_as_soon_as_it_is_loaded(evidence: Callable[..., list[Evidence]]) -> None:
    (one,) = evidence(record(case(), load_ms=30_000.0, artefact_load_ms=50.0, first_call_ms=10.0))
    assert one.start_ms == 60.0


FIGURES = st.fixed_dictionaries(
    {
        "p50": st.sampled_from([1.0, 10.0]) | st.floats(1, 100),
        "width": st.floats(0, 0.5),
        "peak_memory_mib": st.sampled_from([500.0, 600.0, 700.0, 800.0]),
        "class_agreement": st.sampled_from([0.99, 0.999, 0.9999, 1.0]),
        "first_call_ms": st.floats(1, 1e5),
    }
)
STATUSES = st.sampled_from(["ok", "ok", "ok", "inaccurate", "oom"])
CASES = [
    case(name, precision, batch)
    for name in ("eager", "compile")
    for precision in ("fp32", "amp_bf16")
    for batch in (1, 4)
]
RECORDS = st.lists(st.sampled_from(CASES), min_size=1, unique=True).flatmap(
    lambda cases: st.tuples(*(st.builds(lambda s, f, c=c: record(c, s, **f), STATUSES, FIGURES) for c in cases))
)
LIMITS = st.builds(
    Limits,
    max_latency_ms=st.none() | st.floats(1, 100),
    max_memory_mib=st.none() | st.sampled_from([550.0, 650.0, 750.0]),
    min_agreement=st.none() | st.sampled_from([0.995, 0.9995]),
    objective=st.sampled_from(["throughput", "latency", "memory"]),
)


def _decided(records: Sequence[Record], limits: Limits) -> Decision:
    header = msgspec.convert(
        {
            "environment": {
                "machine": msgspec.to_builtins(MACHINE),
                "commit": "0" * 40,
                "dirty": False,
                "source_hash": "f" * 64,
                "load_average": [0, 0, 0],
                "time": NOON,
            },
            "settings": {},
            "preset": "quick",
        },
        Header,
    )
    return decide(_evidence(header, [records]), limits)


@given(RECORDS, LIMITS)
def test_every_case_is_told_of_exactly_once_and_the_winner_keeps_every_limit(
    records: Sequence[Record], limits: Limits
) -> None:
    found = _decided(records, limits)
    winner = [found.winner.id] if found.winner else []
    told = [*winner, *(one.id for one in found.ties), *(one.id for one in found.losers)]
    assert sorted(told) == sorted(record.case.id for record in records)
    by_id = {record.case.id: record for record in records}
    for one in [*winner, *(tie.id for tie in found.ties), *(standing.id for standing in found.front)]:
        assert by_id[one].status == "ok"
        figures = by_id[one].figures
        assert limits.max_latency_ms is None or figures["p50_ms"] <= limits.max_latency_ms
        assert limits.max_memory_mib is None or figures["peak_memory_mib"] <= limits.max_memory_mib
        assert limits.min_agreement is None or figures["class_agreement"] >= limits.min_agreement
    assert set(winner) <= {standing.id for standing in found.front}


@given(RECORDS, LIMITS, st.randoms())
def test_the_order_of_the_records_decides_nothing(records: Sequence[Record], limits: Limits, random: object) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = _decided(records, limits), _decided(shuffled, limits)
    assert one == other


@given(RECORDS, LIMITS)
def test_a_relaxation_that_is_told_lets_its_case_in(records: Sequence[Record], limits: Limits) -> None:
    found = _decided(records, limits)
    fields = {"latency": "max_latency_ms", "memory": "max_memory_mib", "agreement": "min_agreement"}
    field = {option: fields[quantity] for quantity, option in OPTION.items() if quantity in fields}
    for one in found.relax:
        again = _decided(records, msgspec.structs.replace(limits, **{field[one.option]: one.to}))
        assert again.winner is not None
        assert one.id not in {loser.id for loser in again.losers if loser.why == "limit"}
    if found.together:
        relaxed = {field[one.option]: one.to for one in found.together}
        assert _decided(records, msgspec.structs.replace(limits, **relaxed)).winner is not None


def test_what_was_not_measured_is_named_the_likest_to_the_best_first() -> None:
    best = case("compile", "amp_bf16")
    found = ahead(Case(), [case(), best], MACHINE, axes={}, best=best)
    apart = [sum(getattr(one, name) != getattr(best, name) for name in AXES) for one in found.cases]
    assert apart == sorted(apart)
    assert case("compile", "amp_bf16", layout="nhwc") in found.cases
    assert not {case(), best} & set(found.cases)
    assert {unsupported(one, MACHINE) for one in found.cases} == {None}
    assert found.absent["triton"] == "no CUDA device"


def test_what_was_not_measured_keeps_to_what_the_person_allows() -> None:
    axes = {"precision": ("fp32",), "layout": ("nchw",), "task": ("infer",), "batch": (4,)}
    found = ahead(Case(), [case()], MACHINE, axes=axes, best=case(), larger=True)
    assert {(one.precision, one.layout, one.batch) for one in found.cases} == {("fp32", "nchw", 4)}


def test_for_throughput_a_larger_batch_and_a_further_device_may_win() -> None:
    found = ahead(Case(), [case()], MACHINE, axes={}, best=case(), larger=True)
    assert {case(batch=2), case(devices="2cpu")} <= set(found.cases)
    assert not {case(batch=2), case(devices="2cpu")} & set(ahead(Case(), [case()], MACHINE, axes={}, best=case()).cases)


def test_a_roofline_is_told_of_only_where_the_run_has_ceilings(header: Header) -> None:
    one = record(case(), p50=100.0, gflop=50.0, gbyte=1.0)
    (bare,) = _evidence(header, [[one]])
    assert bare.shares == {}
    # 50 GFLOP in 0.1 s are 0.5 TFLOP/s; 1 GB in 0.1 s are 10 GB/s.
    ceiling = Ceiling(device="cpu", threads=2, precision="fp32", tflop_per_s=2.0, gb_per_s=40.0)
    (with_ceilings,) = _evidence(msgspec.structs.replace(header, ceilings=(ceiling,)), [[one]])
    assert with_ceilings.shares == pytest.approx({"mfu": 0.25, "bandwidth_share": 0.25})
    other = record(case("compile"), p50=50.0, gflop=50.0, gbyte=1.0)
    both = _evidence(msgspec.structs.replace(header, ceilings=(ceiling,)), [[one, other]])
    assert [each.shares["mfu"] for each in both] == pytest.approx([0.25, 0.5]), "each its own"


def test_what_was_not_measured_takes_every_value_of_a_choice_that_the_person_names() -> None:
    axes = {"implementation": ("eager",), "precision": ("fp32",), "layout": ("nchw",), "batch": (1, 4)}
    found = ahead(Case(), [case()], MACHINE, axes={**axes, "size": ("256x256", "512x512")})
    assert found.cases == (case(batch=4),), "another size is another question"


def test_where_nothing_is_measured_yet_every_value_that_the_person_names_is() -> None:
    axes = {"implementation": ("eager",), "precision": ("fp32",), "layout": ("nchw",), "devices": ("1",)}
    fresh = _fresh(MACHINE, {**axes, "size": ("64x64", "128x128"), "batch": (1, 4)}, None)
    assert {(one.size, one.batch) for one in fresh} == {("64x64", 1), ("64x64", 4), ("128x128", 1), ("128x128", 4)}
    assert len(fresh) == 4


def test_a_winner_that_no_loaded_module_registers_is_recommended_all_the_same(header: Header) -> None:
    own = case("somebodys")
    run = Run(path=Path("x"), header=header, records=(record(case(), p50=20.0), record(own, p50=10.0)))
    (found,) = answers([run], Limits(), axes={}, weights=None)
    assert found.decision.winner is not None
    assert found.decision.winner.id == own.id
    assert case("compile").id in found.not_measured
    assert not any("somebodys" in id_ for id_ in found.not_measured)


def test_runs_with_weights_are_added_to_with_their_file_alone(header: Header, tmp_path: Path) -> None:
    weights = Weights(path="x", sha256="a" * 64, channels=3, classes=2, upsampling="transposed", width=4, depth=2)
    here = msgspec.structs.replace(
        header,
        environment=msgspec.structs.replace(header.environment, machine=machine()),
        settings=msgspec.structs.replace(header.settings, weights=weights),
    )
    axes = {"implementation": ("eager",), "precision": ("fp32",), "devices": ("1cpu",)}
    run = Run(path=Path("x"), header=here, records=(record(case(size="32x32", width=4, depth=2)),))
    found = answers([run], Limits(objective="latency"), axes=axes, weights=None)
    assert found[0].not_measured
    settings = Settings(measure_s=0.1)
    with pytest.raises(ResultsError, match="the runs are of weights aaaaaaaaaaaa: --measure needs their file"):
        measure(found, Console(file=io.StringIO()), axes=axes, settings=settings, results=tmp_path)
    assert list(tmp_path.iterdir()) == []


def told(header: Header, limits: Limits, *records: Record) -> list[str]:
    """What is said of these records, line by line."""
    (found,) = answers([Run(path=Path("x"), header=header, records=records)], limits, axes={}, weights=None)
    return said(found)


def said(answer: Answer) -> list[str]:
    file = io.StringIO()
    say(answer, Console(file=file, width=300))
    return [line.strip() for line in file.getvalue().splitlines()]


def test_a_winner_is_said_with_its_figures_and_how_sure_it_is(header: Header) -> None:
    slow = record(case(), p50=20.0, first_call_ms=20.0)
    fast = record(case("compile"), p50=10.0, first_call_ms=20_020.0, energy_j_per_image=2.0)
    lines = told(header, Limits(max_latency_ms=30, min_agreement=0.99), slow, fast)
    assert "wanted: most images a second; --max-latency-ms 30 at p50; --min-agreement 0.99" in lines
    at = lines.index(f"recommended: {case('compile').id}")
    assert lines[at + 1] == (
        "10.0 ms (p50) (9.60 … 10.4) · 100 img/s (96.2 … 104) · 700 MiB · 2.00 J an image · same class 1.0000"
    )
    assert lines[at + 2] == "sure: its interval of throughput overlaps no other's that keeps the limits"
    assert lines[at + 3].startswith("but: one process")
    assert f"pays off after 2,000 images against {case().id}: starting takes 20.4 s, there 0.420 s" in lines
    (lost,) = [line for line in lines if line.startswith(f"{case().id}: ")]
    assert lost == f"{case().id}: 2.00× the latency, 0.50× the throughput of the winner"


def test_a_tie_is_said_with_what_else_may_decide(header: Header) -> None:
    lines = told(header, Limits(objective="latency", percentile=50), record(case(), p50=10.0), record(case("compile")))
    assert "wanted: shortest step (p50)" in lines
    at = lines.index("not to be told apart from it in latency (intervals overlap): choose by what else matters")
    assert lines[at + 1].startswith(f"{case().id}: 10.0 ms (p50)")
    assert not any(line.startswith("sure") for line in lines)


def test_where_nothing_fits_it_is_said_what_would_let_a_case_in(header: Header) -> None:
    one = record(case(), p50=30.0, peak_memory_mib=900.0)
    lines = told(header, Limits(max_latency_ms=20), one)
    at = lines.index("recommended: nothing. No measured case keeps every limit")
    assert lines[at + 1 : at + 3] == [f"relax --max-latency-ms from 20 to 30, and {case().id} fits", ""]
    lines = told(header, Limits(max_latency_ms=20, max_memory_mib=750), one)
    at = lines.index(f"no single limit is enough; the nearest is {case().id}, with all of")
    assert lines[at + 1 : at + 4] == ["--max-latency-ms 20 → 30", "--max-memory-mib 750 → 900", ""]
    lines = told(header, Limits(objective="energy"), one)
    assert "no single limit is to blame: see below what each case lacks" in lines
    assert f"{case().id}: energy was not measured" in lines


def test_cases_of_an_implementation_that_failed_alike_share_a_line(header: Header) -> None:
    failed = [record(case("triton", batch=batch), "unsupported") for batch in (1, 2, 4)]
    lines = told(header, Limits(), record(case()), *failed, record(case("compile"), "oom"))
    lost = lines[lines.index("lost:") + 1 :]
    assert lost[:3] == ["compile: oom: for a reason", "triton: unsupported: for a reason (3 cases)", ""]


def test_of_what_was_not_measured_the_likest_of_each_implementation_is_named_and_the_rest_counted(
    header: Header,
) -> None:
    (answer,) = answers(
        [Run(path=Path("x"), header=header, records=(record(case()),))], Limits(), axes={}, weights=None
    )
    names = [f"i{number}" for number in range(9)]
    left = tuple(case(name, layout=layout).id for layout in ("nchw", "nhwc") for name in names)
    question = msgspec.structs.replace(answer.question, weights="0123456789abcdef")
    know = (
        f"to know: python -m pytest bench --case {left[0]} --weights FILE, 0123456789ab; or this command with --measure"
    )
    for absent in ({}, {"triton": "no CUDA device", "onnx": "not installed", "triton_fold": "no CUDA device"}):
        changed = msgspec.structs.replace(answer, not_measured=left, absent=absent, question=question)
        lines = said(changed)
        at = lines.index("not measured, so it might win (nothing here is extrapolated):")
        assert lines[at + 1 : at + 9] == [case(name).id for name in names[:8]]
        assert lines[at + 9] == "… and 10 more"
        more = ["triton, triton_fold: no CUDA device", "onnx: not installed"] if absent else []
        assert lines[at + 10 : -1] == [
            *more,
            know + ", for all",
        ]
    nothing = said(msgspec.structs.replace(answer, not_measured=(), absent={}))
    assert not any("not measured" in line or "to know" in line for line in nothing)


def test_a_further_device_is_one_more_of_the_same_kind_and_only_one_that_is_there() -> None:
    axes = {"implementation": ("eager",), "precision": ("fp32",), "layout": ("nchw",)}
    best = case(batch=3)
    found = ahead(Case(), [best], MACHINE, axes=axes, best=best, larger=True)
    assert set(found.cases) == {case(batch=6), case(batch=3, devices="2cpu")}
    both = case(batch=3, devices="2cpu")
    assert ahead(Case(), [both], MACHINE, axes=axes, best=both, larger=True).cases == (case(batch=6, devices="2cpu"),)


def test_padding_and_tiles_are_tried_only_where_they_are_another_thing() -> None:
    axes = {"implementation": ("eager",), "precision": ("fp32",), "layout": ("nchw",)}

    def frames(**asked: str) -> set[str]:
        return {one.frame for one in ahead(case(**asked), [case(**asked)], MACHINE, axes=axes).cases}

    assert frames(size="256x250") == frames(size="250x256") == {"padded", "tiled"}
    assert frames(size="256x256") == frames(size="256x250", task="train") == set()


def test_an_implementation_is_absent_only_where_the_machine_lacks_it_for_every_case() -> None:
    found = ahead(Case(), [case(), case("triton")], MACHINE, axes={})
    assert "triton" not in found.absent, "it has a record, whatever it says"
    assert found.absent["triton_fold"] == "no CUDA device"
    assert not {"eager", "compile"} & set(found.absent)
