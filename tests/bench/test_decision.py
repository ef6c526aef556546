import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.gate.decision import Rule, Trial, compare, decide, estimate, leaning
from bench.gate.proceedings import Proceedings
from bench.gate.simulation import simulate

RULE = Rule()
logs = st.lists(st.floats(-1, 1), min_size=2, max_size=30)


def trials(*values: float) -> list[Trial]:
    return [Trial(time=value) for value in values]


def test_the_interval_is_that_of_student_over_trials() -> None:
    found = estimate([0.01, 0.03, 0.05, 0.07], RULE)
    half = 4.540703 * statistics.stdev([0.01, 0.03, 0.05, 0.07]) / 2  # t of 99 %, three degrees of freedom
    assert found.change == pytest.approx(math.expm1(0.04))
    assert found.low == pytest.approx(math.expm1(0.04 - half), rel=1e-6)
    assert found.high == pytest.approx(math.expm1(0.04 + half), rel=1e-6)
    eighty = 0.978472 * statistics.stdev([0.01, 0.03, 0.05, 0.07]) / 2  # t of 80 %
    assert found.smallest == pytest.approx(math.expm1(half + eighty), rel=1e-6)


def test_a_single_trial_and_one_past_all_numbers_bound_nothing() -> None:
    one = estimate([0.1], RULE)
    assert (one.change, one.low, one.high, one.smallest) == (math.expm1(0.1), -1.0, math.inf, math.inf)
    assert estimate([0.0, 900.0], RULE).high == math.inf


@given(logs)
def test_swapping_base_and_head_swaps_slower_and_faster(values: list[float]) -> None:
    mirrored = leaning(trials(*(-value for value in values)), RULE)
    word = leaning(trials(*values), RULE)
    assert (word == "SLOWER") == (mirrored == "FASTER")


@given(logs)
def test_an_interval_holds_its_estimate(values: list[float]) -> None:
    found = estimate(values, RULE)
    assert found.low <= found.change <= found.high
    assert found.smallest >= RULE.margin * 0.999


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((0.10, 0.11, 0.10, 0.11), "SLOWER"),
        ((-0.10, -0.11, -0.10, -0.11), "FASTER"),
        ((0.001, -0.001, 0.002, 0.0), "SAME"),
        ((0.015, 0.016, 0.015, 0.016), "SAME"),  # certainly slower, by less than anybody cares
        ((-0.015, -0.016, -0.015, -0.016), "SAME"),
        ((math.log(1.0199),) * 4, "SAME"),
        ((math.log(1.0201),) * 4, "SLOWER"),
        ((-math.log(1.0199),) * 4, "SAME"),
        ((-math.log(1.0201),) * 4, "FASTER"),
        ((0.1, -0.1, 0.2, 0.0), "INCONCLUSIVE"),
        ((0.10, 0.11, 0.10), "INCONCLUSIVE"),  # too few
        ((0.10, 0.11, math.inf, 0.1), "INCONCLUSIVE"),
        ((0.10, 0.11, math.nan, 0.1), "INCONCLUSIVE"),
    ],
)
def test_what_a_pass_says(values: tuple[float, ...], word: str) -> None:
    assert leaning(trials(*values), RULE) == word


def test_a_suspicion_must_be_seen_again() -> None:
    slow, same, wide = trials(0.1, 0.1, 0.1, 0.1), trials(0, 0, 0, 0), trials(0.2, -0.2, 0.3, 0)
    assert decide(slow, [], RULE) == "INCONCLUSIVE"
    assert decide(slow, slow, RULE) == "SLOWER"
    assert decide(slow, same, RULE) == "SAME"
    assert decide(slow, wide, RULE) == "INCONCLUSIVE"
    assert decide(slow, trials(-0.1, -0.1, -0.1, -0.1), RULE) == "INCONCLUSIVE"


def test_a_clock_that_moved_is_no_regression() -> None:
    moved = [Trial(time=0.1, cycles=0.0)] * 4
    assert leaning(moved, RULE) == "INCONCLUSIVE"
    assert leaning([Trial(time=0.1, cycles=0.1)] * 4, RULE) == "SLOWER"
    assert leaning([Trial(time=0.0, cycles=0.1)] * 4, RULE) == "SAME", "it is time that counts"
    assert leaning([*[Trial(time=0.1, cycles=0.0)] * 3, Trial(time=0.1)], RULE) == "SLOWER", "not known of all"


@pytest.mark.parametrize(
    ("base", "head", "floor", "word"),
    [
        (100.0, 100.5, 0.0, "SAME"),
        (100.0, 100.2, 0.0, "SAME"),
        (100.0, 99.6, 0.0, "SAME"),
        (100.0, 100.6, 0.0, "SLOWER"),
        (100.0, 99.0, 0.0, "FASTER"),
        (1000.0, 1001.1, 1.0, "SLOWER"),  # 1 MiB, though a small share
        (4.0, 4.1, 1.0, "SLOWER"),  # a large share, though less than 1 MiB
        (0.0, 1.0, 0.0, "SLOWER"),  # the first spill, the first graph break
        (0.0, 0.0, 0.0, "SAME"),
    ],
)
def test_deterministic_figures_are_compared_directly(base: float, head: float, floor: float, word: str) -> None:
    assert compare(base, head, RULE, floor=floor) == word


def course(values: dict[str, float], budget_s: float = 1e9, noise: float = 0.0) -> tuple[Proceedings, list[str]]:
    """A whole gate of rows with these changes, one second a trial, and the order in which it asked."""
    draw = random.Random(1)  # noqa: S311
    gate, asked = Proceedings([*values], RULE, budget_s, draw), []
    while (row := gate.ask(float(len(asked)))) is not None:
        asked.append(row)
        gate.tell(row, Trial(time=draw.gauss(values[row], noise)), 1.0)
    return gate, asked


def test_every_row_gets_its_fewest_and_only_suspects_are_measured_afresh() -> None:
    gate, asked = course({"same": 0.0, "slow": 0.1, "fast": -0.1})
    assert asked.count("same") == RULE.fewest
    assert asked.count("slow") == asked.count("fast") == 3 * RULE.fewest
    assert [gate.word(row) for row in ("same", "slow", "fast")] == ["SAME", "SLOWER", "FASTER"]


def test_the_order_of_rows_is_drawn_anew_in_every_round() -> None:
    rows = dict.fromkeys("abcdefgh", 0.0)
    _, asked = course(rows)
    rounds = [asked[start : start + len(rows)] for start in range(0, len(asked), len(rows))]
    assert all(sorted(one) == [*rows] for one in rounds)
    assert len({tuple(one) for one in rounds}) == RULE.fewest


def test_trials_are_added_to_what_is_inconclusive_while_time_remains() -> None:
    noisy = {"noisy": 0.0, "slow": 0.3}
    patient, _ = course(noisy, noise=0.05)
    hurried, asked = course(noisy, budget_s=10.0, noise=0.05)
    assert RULE.fewest < len(patient.first["noisy"]) <= RULE.most
    assert len(hurried.first["noisy"]) == RULE.fewest
    assert hurried.word("slow") == "SLOWER", "the confirming pass is owed, whatever the budget"
    assert len(asked) > 10


def test_a_dropped_row_is_not_asked_for_again() -> None:
    gate = Proceedings(["a", "b"], RULE, 1e9, random.Random(1))  # noqa: S311
    first = gate.ask(0.0)
    assert first is not None
    (other,) = {"a", "b"} - {first}  # due in the round that is under way
    gate.drop(other)
    gate.tell(first, Trial(time=0.0), 1.0)
    asked = set()
    while (row := gate.ask(0.0)) is not None:
        asked.add(row)
        gate.tell(row, Trial(time=0.0), 1.0)
    assert asked == {first}


def test_what_is_owed_is_counted_down_through_both_passes() -> None:
    gate, owed = Proceedings(["slow"], RULE, 1e9, random.Random(1)), []  # noqa: S311
    assert gate.trial_s == 0
    while (row := gate.ask(0.0)) is not None:
        owed.append(gate.waiting)
        gate.tell(row, Trial(time=0.1), 2.0)
    assert owed == [*range(RULE.fewest, 0, -1), *range(2 * RULE.fewest, 0, -1)]
    assert gate.waiting == 0
    assert gate.trial_s == 2.0
    assert len(gate.evidence("slow")) == 3 * RULE.fewest


@pytest.mark.parametrize(("budget_s", "trials"), [(16.9, 4), (17.0, 5), (18.0, 6)])
def test_no_trial_is_added_in_the_time_that_confirming_will_take(budget_s: float, trials: int) -> None:
    # Eight seconds for the first pass, eight for the suspect's second: what is left goes to the inconclusive row.
    gate, asked = course({"noisy": 0.0, "slow": 0.3}, budget_s=budget_s, noise=0.05)
    assert (gate.word("noisy"), gate.word("slow")) == ("INCONCLUSIVE", "SLOWER")
    assert len(gate.first["noisy"]) == trials
    assert len(asked) == 8 + (trials - 4) + 8


def test_what_is_inconclusive_is_looked_at_again_after_twice_as_many_trials() -> None:
    gate = Proceedings(["row"], RULE, 1e9, random.Random(1))  # noqa: S311
    values = iter([0.02, -0.02, 0.02, -0.02, *[0.0] * 99])
    while (row := gate.ask(0.0)) is not None:
        gate.tell(row, Trial(time=next(values)), 1.0)
    assert len(gate.first["row"]) == 8
    assert gate.word("row") == "SAME"


def test_time_that_runs_out_within_a_round_of_further_trials_ends_it() -> None:
    rows, draw = ["a", "b", "c"], random.Random(1)  # noqa: S311
    gate = Proceedings(rows, RULE, 100.0, draw)
    values = {row: iter([0.3, -0.3] * RULE.most) for row in rows}
    for number in range(len(rows) * RULE.fewest + 2):
        row = gate.ask(float(number))
        assert row is not None
        gate.tell(row, Trial(time=next(values[row])), 1.0)
    assert gate.phase == "more trials"
    assert gate.ask(99.5) is None


def test_a_suspect_that_is_dropped_is_not_confirmed() -> None:
    gate = Proceedings(["a", "b"], RULE, 1e9, random.Random(1))  # noqa: S311
    while (row := gate.ask(0.0)) is not None:
        if gate.phase == "confirming pass" and row == "a":
            gate.drop("a")
        else:
            gate.tell(row, Trial(time=0.1), 1.0)
    assert [len(trials) for trials in gate.confirming.values()] == [2 * RULE.fewest]


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.02, 0.06])
@pytest.mark.parametrize("budget_s", [600.0, pytest.param(6000.0, marks=pytest.mark.slow)])
def test_a_whole_gate_cries_wolf_in_at_most_two_of_a_hundred(noise: float, budget_s: float) -> None:
    rates = simulate(noise, gates=300, budget_s=budget_s)
    assert rates.false_alarms <= 0.02
    assert rates.self_fired <= 0.02


def test_five_percent_are_found_at_one_percent_noise_within_the_budget() -> None:
    rates = simulate(0.01, gates=300)
    assert rates.found >= 0.85
    assert rates.seconds <= 600
    assert rates.conclusive >= 0.8, "a gate that shrugs at everything raises no false alarm either"
