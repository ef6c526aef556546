"""Cases → processes → records. A case can fail in any way it likes; the run goes on and the record says how it failed.

The parent imports no torch, sleeps while a process measures, and leaves nothing of it behind. Where several machines
measure together each runs its part of a case, and all come to the same record.
"""

import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench import allowance, ceilings, fitted
from bench.case import Case
from bench.ceilings import Request as CeilingsRequest
from bench.distributed import launcher
from bench.engine.protocol import Outcome, Request
from bench.environment import Environment
from bench.errors import UsageError
from bench.peers import PeerFailedError, Peers
from bench.processes import Progress, died, phase, supervise, tail
from bench.readings import Ceiling
from bench.results import Record, Settings, Value, option_of
from bench.support import unsupported
from bench.verdict import FAILED, Part, joint, part_of

SLACK_S = 120.0
"""Beyond the time limit: how long machines wait for each other's account of a case."""


def _silent(_phase: str, _seconds: float) -> None:
    """Progress that nobody watches."""


class Runner:
    """Measures cases one after another.

    Args:
        environment: where.
        settings: how.
        peers: the machines that measure each case together; nobody else if not given.
    """

    def __init__(self, environment: Environment, settings: Settings, peers: Peers | None = None) -> None:
        self.environment = environment
        self.settings = settings
        self.peers = peers or Peers()

    def run(self, case: Case, progress: Progress = _silent) -> Record:
        """Measure one case in a process of its own.

        Args:
            case: the case.
            progress: called about four times a second with the phase and the seconds since the start.

        Raises:
            KeyboardInterrupt: Ctrl-C; the process of the case is gone by then.
        """
        started, start = datetime.now(UTC), time.perf_counter()
        outcome = self._joint(self._unready(case, progress)) or self._measure(case, progress)
        return Record(
            case=case,
            status=outcome.status,
            reason=outcome.reason,
            figures=outcome.figures,
            samples_ms=outcome.samples_ms,
            blocks=outcome.blocks,
            stages=outcome.stages,
            spent_s=outcome.spent_s,
            ranks=outcome.ranks,
            started=started,
            wall_s=time.perf_counter() - start,
            repeat=repeat_command(case, self.settings, self.environment.machine.nodes),
        )

    def _unready(self, case: Case, progress: Progress) -> Outcome | None:
        """Why the case cannot begin here, if it cannot."""
        why = unsupported(case, self.environment.machine)
        if why is not None:
            return Outcome(status="unsupported", reason=why)
        # Of several on one machine, the first fits for all.
        failed = self._fit(case, progress) if self.peers.place.local == 0 else None
        if failed is not None and self.peers.place.count > 1:
            return msgspec.structs.replace(failed, reason=f"{self.peers.title}: {failed.reason}")
        return failed

    def _joint(self, mine: Outcome | None) -> Outcome | None:
        """What all machines have to say of a case; None if none of them has anything to."""
        parts = self.peers.gather(Part(outcome=mine), self.settings.time_limit_s + SLACK_S)
        return joint(parts, [self.peers.title_of(number) for number in range(len(parts))])

    def _fit(self, case: Case, progress: Progress) -> Outcome | None:
        """Make the fitted weights that the case wants, once; what went wrong if it did."""
        if self.settings.weights is not None:
            return None
        recipe = fitted.Recipe(upsampling=case.upsampling, width=case.width, depth=case.depth)
        if fitted.cached(recipe):
            return None
        with _folder() as folder:
            (folder / "recipe.json").write_bytes(msgspec.json.encode(recipe))
            command = [sys.executable, "-m", "bench.fitted", str(folder / "recipe.json")]

            def tell(_: str, seconds: float) -> None:
                step = tail(folder, 1).strip()
                progress(f"fitting the network to a picture, once: {step}", seconds)

            code, timed_out = supervise(command, folder, self.settings.time_limit_s, tell)
            if timed_out:
                return Outcome(
                    status="timeout", reason=f"fitting its weights took over {self.settings.time_limit_s:g} s"
                )
            if code == allowance.OUT_OF_MEMORY:
                return Outcome(status="oom", reason="fitting its weights ran out of memory")
            if code != 0:
                why = tail(folder, 1).strip() or died(code)
                return Outcome(status="crash", reason=f"fitting its weights failed: {why}{tail(folder)}")
        return None

    def ceilings(self, cases: Sequence[Case], progress: Progress = _silent) -> tuple[Ceiling, ...]:
        """What the device does at its best, for the precisions and threads of `cases`, in processes of their own.

        Raises:
            UsageError: it could not be measured.
        """
        possible = [case for case in cases if unsupported(case, self.environment.machine) is None]
        found: list[Ceiling] = []
        for request in ceilings.requests(possible, self.environment.machine.cores):
            found += self.ceilings_of(request, progress)
        return tuple(found)

    def ceilings_of(self, request: CeilingsRequest, progress: Progress = _silent) -> list[Ceiling]:
        """What one device does at its best, in a process of its own.

        Raises:
            UsageError: it could not be measured.
        """
        with _folder() as folder:
            (folder / "request.json").write_bytes(msgspec.json.encode(request))
            command = [sys.executable, "-m", "bench.ceilings", str(folder)]
            code, timed_out = supervise(command, folder, self.settings.time_limit_s, progress)
            if code or timed_out:
                why = "it took too long" if timed_out else died(code)
                raise UsageError(f"ceilings could not be measured: {why}{tail(folder)}; run without them")
            return msgspec.json.decode((folder / "ceilings.json").read_bytes(), type=list[Ceiling])

    def fits(self, case: Case, memory_mib: int = 0, progress: Progress = _silent) -> Outcome:
        """Whether two steps of a case run within `memory_mib`, or where that is 0 at all: `ok`, `oom`, or what else."""
        why = unsupported(case, self.environment.machine)
        if why is not None:
            return Outcome(status="unsupported", reason=why)
        if (failed := self._fit(case, progress)) is not None:
            return failed
        with _folder() as folder:
            return self._ask(folder, self._request(case, memory_mib, only_begin=True), progress)

    def _measure(self, case: Case, progress: Progress) -> Outcome:
        with _folder() as folder:
            outcome = self._ask(folder, self._request(case), progress)
            if not self.settings.cold_start or outcome.status not in {"ok", "inaccurate"}:
                return outcome
            # Another process in the same folder finds the compiler caches that the first has filled.
            again = self._ask(folder, self._request(case, only_begin=True), progress)
            if again.status != "ok":
                why = f"started anew with full compiler caches: {again.reason}"
                return msgspec.structs.replace(outcome, status=again.status, reason=why)
            warm: dict[str, Value] = {"first_call_warm_ms": again.figures["first_call_ms"]}
            return msgspec.structs.replace(outcome, figures={**outcome.figures, **warm})

    def _request(self, case: Case, memory_mib: int = 0, *, only_begin: bool = False) -> Request:
        if not case.on_gpu:
            memory_mib = min(memory_mib or allowance.free_mib(), allowance.free_mib())
        cores = self.environment.machine.cores
        return Request(
            case=case,
            settings=self.settings,
            cores=cores,
            memory_mib=memory_mib,
            only_begin=only_begin,
            key=f"case {self.peers.rounds}",
        )

    def _ask(self, folder: Path, request: Request, progress: Progress) -> Outcome:
        for left in folder.glob("outcome.*"):
            left.unlink()
        (folder / "request.json").write_bytes(msgspec.json.encode(request))
        command = [*launcher(request.case, self.settings, self.peers), "bench.engine", str(folder)]
        limit_s = self.settings.time_limit_s
        try:
            code, timed_out = supervise(command, folder, limit_s, self.peers.watched(progress))
        except PeerFailedError:
            mine = None
        else:
            late = Outcome(status="timeout", reason=f"longer than {limit_s:g} s, in phase: {phase(folder)}")
            mine = late if timed_out else part_of(folder, code, self._launched(request.case))
            if mine.status in FAILED:
                self.peers.alarm()
            elif self.peers.number:  # number 0 has found the same, and more
                mine = None
        silent = Outcome(status="crash", reason="every machine ended its part for another's sake")
        return self._joint(mine) or silent

    def _launched(self, case: Case) -> str:
        """What has been started for a case of several processes; empty for one that is alone."""
        if case.processes == 1 or self.peers.place.launched:
            return "" if case.processes == 1 else self.peers.title
        return "torchrun" if self.peers.place.count == 1 else f"torchrun of {self.peers.title}"


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="unet-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def repeat_command(case: Case, settings: Settings, nodes: int = 1) -> str:
    """The shell command that measures this case alone, in the same way; on several machines, the same on each."""
    options = [f"--case {case.id}"]
    options += [f"--nodes {nodes} --rdzv-endpoint HOST:PORT"] if nodes > 1 else []
    defaults = Settings()
    for name in Settings.__struct_fields__:
        value = getattr(settings, name)
        if name in {"load", "weights"} or value == getattr(defaults, name):
            continue
        options.append(option_of(name) if value is True else f"{option_of(name)} {value:g}")
    options += [f"--load {module}" for module in settings.load]
    options += [f"--weights {shlex.quote(settings.weights.path)}"] if settings.weights is not None else []
    return f"python -m pytest bench {' '.join(options)}"
