"""Which trial comes next, and when there is enough: the gate's course without its processes.

`ask` and `tell` are all that a driver needs: CI's starts processes in between, the simulation draws numbers.
"""

import random
import statistics
from collections.abc import Sequence

from bench.gate.decision import Rule, Trial, Word, decide, leaning


class Proceedings:
    """A gate in progress.

    The first pass gives every row `rule.fewest` trials, in rounds whose order is drawn. Then rows that are inconclusive
    get as many again, and again, while time remains for them and for what must follow: evidence is looked at after 4,
    8 and 16 trials, since every further look is another chance to be wrong. At last the suspects alone are measured
    afresh, each twice as often as in its first pass, since what looked clear after few trials was partly luck; how
    often is fixed before, so that nobody stops when it suits. The first and the last part are never cut short: a gate
    that had no time to confirm would let every regression pass.

    Args:
        rows: names.
        rule: the rule.
        budget_s: seconds after which no further trial is added.
        draw: where the orders come from.
    """

    def __init__(self, rows: Sequence[str], rule: Rule, budget_s: float, draw: random.Random) -> None:
        self.rule = rule
        self.budget_s = budget_s
        self.first: dict[str, list[Trial]] = {row: [] for row in rows}
        self.confirming: dict[str, list[Trial]] = {}
        self.phase = "first pass"
        self._draw = draw
        self._round: list[str] = []
        self._target = dict.fromkeys(rows, rule.fewest)
        self._owed = 0
        self._took_s: list[float] = []

    def ask(self, elapsed_s: float) -> str | None:
        """The row that the next trial is of; None when all is said.

        Args:
            elapsed_s: since the gate began.
        """
        if self.phase == "more trials" and not self._time_for_more(elapsed_s):
            self._round.clear()
            self._confirm()
        while not self._round:
            if not (rows := self._wanted(elapsed_s)):
                return None
            self._draw.shuffle(rows)
            self._round = rows
        return self._round.pop()

    def tell(self, row: str, trial: Trial, took_s: float) -> None:
        """Take in what the trial found, and how long it took."""
        (self.confirming if self.phase == "confirming pass" else self.first)[row].append(trial)
        self._took_s.append(took_s)

    def drop(self, row: str) -> None:
        """Leave a row out from now on: its trials fail."""
        self._round = [other for other in self._round if other != row]
        self.first.pop(row, None)
        self.confirming.pop(row, None)

    def word(self, row: str) -> Word:
        """The verdict as far as it is known."""
        return decide(self.first[row], self.confirming.get(row, ()), self.rule)

    def evidence(self, row: str) -> list[Trial]:
        """Every trial of a row: the estimate that is shown rests on both passes."""
        return self.first[row] + self.confirming.get(row, [])

    @property
    def waiting(self) -> int:
        """Trials that are still owed, further ones not counted."""
        owed = sum(max(0, self.rule.fewest - len(trials)) for trials in self.first.values())
        return owed + sum(self._confirmations(row) - len(trials) for row, trials in self.confirming.items())

    @property
    def trial_s(self) -> float:
        """Seconds that a trial takes, as seen so far."""
        return statistics.fmean(self._took_s) if self._took_s else 0.0

    def _wanted(self, elapsed_s: float) -> list[str]:
        if self.phase == "first pass":
            if short := self._below_target():
                return short
            self.phase = "more trials"
        if self.phase == "more trials":
            if not (more := self._below_target()):
                self._owed = sum(map(self._confirmations, self._leaning("SLOWER", "FASTER")))
                for row in self._leaning("INCONCLUSIVE"):
                    self._target[row] = min(2 * self._target[row], self.rule.most)
                more = self._below_target()
            if more and self._time_for_more(elapsed_s):
                return more
            self._confirm()
        return [row for row, trials in self.confirming.items() if len(trials) < self._confirmations(row)]

    def _below_target(self) -> list[str]:
        return [row for row, trials in self.first.items() if len(trials) < self._target[row]]

    def _confirm(self) -> None:
        self.phase = "confirming pass"
        self.confirming = {row: [] for row in self._leaning("SLOWER", "FASTER")}

    def _confirmations(self, row: str) -> int:
        return 2 * len(self.first[row])

    def _leaning(self, *words: Word) -> list[str]:
        return [row for row, trials in self.first.items() if leaning(trials, self.rule) in words]

    def _time_for_more(self, elapsed_s: float) -> bool:
        return elapsed_s + (self._owed + 1) * self.trial_s <= self.budget_s
