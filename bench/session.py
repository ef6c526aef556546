"""One run from its options to its file: which cases, what is done already, how long the rest will take."""

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from bench import display, estimate, matrix
from bench.case import Case
from bench.environment import Environment, environment
from bench.errors import UsageError
from bench.formats import benchmark_json
from bench.options import Options
from bench.peers import Peers
from bench.processes import ending_in_order
from bench.report.table import counted, three_digits
from bench.report.terminal import print_table
from bench.results import Header, Record, Run, read, resumable
from bench.runfile import RunFile
from bench.runner import Runner
from bench.support import unsupported
from bench.terms import agree, terms


class _Kept(msgspec.Struct, frozen=True):
    """What the continued run has already; known to number 0 alone, which writes."""

    records: tuple[Record, ...]


class Session:
    """A run in progress.

    Args:
        options: what it is asked to do.

    Raises:
        CaseError: an unknown preset.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.peers = Peers(options.place)
        self.environment = _of_nodes(_with_sources(environment(), options.settings.load), options.place.nodes)
        axes = options.axes
        if options.place.launched and not options.chosen:
            axes = {"devices": (str(options.place.count),), **axes}
        cases = matrix.cases(self.environment.machine, preset=options.preset, axes=axes, chosen=options.chosen)
        self.cases = cases if options.chosen else matrix.shuffled(cases, options.seed)
        self.runner = Runner(self.environment, options.settings, self.peers)
        self.file: RunFile | None = None
        self._kept: dict[Case, Record] = {}
        self._ahead: list[Case] = []
        self._expected_s = self._taken_s = 0.0

    def open(self, selected: Sequence[Case], console: Console) -> None:
        """Begin the run's file, or find the one to continue.

        Args:
            selected: the cases that will be measured, in order.
            console: where to say which.

        Raises:
            ResultsError: the file cannot be written.
            UsageError: those that are to measure together do not come, or are about to measure different things; or a
                torchrun has started more or fewer processes than a case has.
        """
        self._ahead = list(selected)
        if self.options.place.count > 1:
            self._meet(console)
        run = self._continued() if self.peers.number == 0 else None
        kept = self.peers.gather(_Kept(records=tuple(self._kept.values())), self.options.settings.join_timeout_s)[0]
        self._kept = {record.case: record for record in (kept.records if kept else ())}
        if self.peers.number:
            return
        if run is not None:
            self.file = RunFile(run.path, run.header)
            self.file.hold()
            console.print(Text(f"continuing {run.path}, which has {counted(len(self._kept), 'case')}"))
            return
        if self.options.resume:
            console.print(
                Text("nothing to continue from this machine, commit, sources, preset and settings: a new run")
            )
        header = self._header()
        if self.options.ceilings:
            console.print(Text("ceilings first: a large matrix product, a large copy"))
            header = msgspec.structs.replace(header, ceilings=self.runner.ceilings(selected))
            for one in header.ceilings:
                place = f"{one.threads} threads" if one.threads else one.device
                rates = f"{three_digits(one.tflop_per_s)} TFLOP/s, {three_digits(one.gb_per_s)} GB/s"
                console.print(Text(f"  {one.precision}, {place}: {rates}"))
        self.file = RunFile.create(header, self.options.results)
        self.file.hold()

    def _meet(self, console: Console) -> None:
        started = self.options.place.count
        for case in self._ahead if self.options.place.launched else ():
            if case.processes != started:
                raise UsageError(
                    f"{case.id} has {case.processes} processes and torchrun has started {started}: "
                    "leave the devices to it, or leave torchrun out"
                )
        wait_s = self.options.settings.join_timeout_s
        self.peers.meet(wait_s)
        flags = {"--ceilings": self.options.ceilings, "--resume": self.options.resume}
        agree(self.peers, terms(self.environment, self.options.settings, self._ahead, flags), wait_s)
        words = f"{self.peers.title} of {self.options.place.count} that measure together"
        if self.peers.number:
            words += f"; {self.peers.title_of(0)} writes the run's file, nothing is written here"
        console.print(Text(words))

    def plan(self, selected: Sequence[Case], console: Console) -> None:
        """Say what `open` and `measure` would do and how long that takes, and do nothing of it."""
        self._ahead = list(selected)
        self._continued()
        machine, settings = self.environment.machine, self.options.settings
        rows = []
        left = 0
        for case in selected:
            if (why := unsupported(case, machine)) is not None:
                words = f"unsupported: {why}"
            elif case in self._kept:
                words = "measured before"
            else:
                left += 1
                words = estimate.words(estimate.prior_s(case, settings, machine))
            rows.append((case.id, words))
        print_table(console, ("case", "to measure it"), rows, labels=2)
        time_left = f": {estimate.words(self.left_s(0))}" if left else ""
        console.print(Text(f"{counted(len(selected), 'case')}, {left} to measure{time_left}"))

    def _header(self) -> Header:
        seed = None if self.options.chosen else self.options.seed
        return Header(
            environment=self.environment, settings=self.options.settings, preset=self.options.preset, seed=seed
        )

    def _continued(self) -> Run | None:
        """The run to continue, if there is one and that is wanted."""
        run = resumable(self._header(), self.options.results) if self.options.resume else None
        if run is not None:
            self._kept = {record.case: record for record in run.records if record.status == "ok"}
        return run

    def measure(self, case: Case, console: Console) -> Record:
        """Measure a case, or take what the continued run has of it; say so in a line and write it down.

        Raises:
            ResultsError: the record cannot be written.
            KeyboardInterrupt: Ctrl-C or SIGTERM; this case is lost, the others are not.
        """
        total = len(self._ahead)
        kept = self._kept.get(case)
        number = self._ahead.index(case) + 1
        if kept is None:
            start = time.perf_counter()
            # This case is lost, the others are not.
            with (
                ending_in_order(),
                display.shown(case, console, done=number - 1, total=total, left_s=self.left_s(number - 1)) as tell,
            ):
                record = self.runner.run(case, tell)
            if record.status != "unsupported":
                self._expected_s += self._prior_s(case)
                self._taken_s += time.perf_counter() - start
            if self.file is not None:
                self.file.append(record)
        else:
            record = kept
        line = display.line(record, f"{number:>{len(str(total))}}/{total}", kept=kept is not None)
        console.print(line, soft_wrap=True)
        return record

    def left_s(self, done: int) -> float:
        """Seconds that the cases after the first `done` will take, as far as those measured so far let one know."""
        ahead = (case for case in self._ahead[done:] if case not in self._kept)
        pace = self._taken_s / self._expected_s if self._expected_s else 1.0
        return pace * sum(self._prior_s(case) for case in ahead)

    def _prior_s(self, case: Case) -> float:
        return estimate.prior_s(case, self.options.settings, self.environment.machine)

    def close(self) -> Run | None:
        """Write the file for pytest-benchmark beside the run's own.

        Returns:
            What was recorded; None if nothing was, or another machine writes it.
        """
        if self.file is None:
            return None
        self.file.release()
        run = read(self.file.path)
        if any(record.status == "ok" for record in run.records):
            self.benchmark_path.write_bytes(msgspec.json.format(msgspec.json.encode(benchmark_json(run)), indent=1))
        return run

    def leave(self, *, together: bool) -> None:
        """Part from those that measured together.

        Args:
            together: whether to wait until all are ready to: a torchrun ends all its processes when one has failed.
        """
        if together and self.peers.met.links:
            self.peers.gather(_Kept(records=()), self.options.settings.join_timeout_s)
        self.peers.leave()

    @property
    def benchmark_path(self) -> Path:
        """Where `close` writes."""
        if self.file is None:
            raise RuntimeError("Session.open comes first")
        return self.file.path.with_suffix(".json")


def _of_nodes(env: Environment, nodes: int) -> Environment:
    return msgspec.structs.replace(env, machine=msgspec.structs.replace(env.machine, nodes=nodes))


def _with_sources(env: Environment, modules: Sequence[str]) -> Environment:
    """Loaded modules are sources too: results of one that was changed since must not be continued."""
    files = [sys.modules[module].__file__ or "" for module in modules]
    if not files:
        return env
    texts = [env.source_hash.encode(), *(Path(file).read_bytes() for file in files)]
    return msgspec.structs.replace(env, source_hash=hashlib.sha256(b"\0".join(texts)).hexdigest())
