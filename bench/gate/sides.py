"""A side of a comparison: one version's case, built and called, in this process or in one of its own."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.gate.versions import Version

Clocked = tuple[float, float]
"""Duration of a step, ms, and the SM clock after it, MHz (0 without a GPU)."""


class MissingError(Exception):
    """The version has no such case."""


class Side(Protocol):
    """What a trial needs of a version."""

    def build(self) -> None:
        """Build the case and take its first step."""

    def take(self, steps: int) -> Clocked:
        """Take steps and give the duration of one."""

    def close(self) -> None:
        """Let go of it."""


class Local:
    """A version in this process.

    Args:
        version: the version.
        case: id of the case.
        cores: CPU cores that it may use.
    """

    def __init__(self, version: Version, case: str, cores: int) -> None:
        self.version = version
        self.case = case
        self.cores = cores
        self.subject: Any = None

    def build(self) -> None:
        """Build the case and take its first step; fit its weights if this version has none yet.

        Raises:
            MissingError: the version cannot read the case's id.
            Exception: whatever the version's code raises.
        """
        with self.version.active():
            self.version.implementations()
            module = self.version.module
            try:
                case = module("bench.case").parse_id(self.case)
            except module("bench.case").CaseError as error:
                raise MissingError(str(error)) from error
            subject, fitted = module("bench.subject"), module("bench.fitted")
            subject.prepare_process(case, self.cores)
            if not fitted.cached(recipe := subject.recipe(case)):
                fitted.fit(recipe)
            self.subject = subject.build(case, module("bench.distributed").Group())
            self.subject.step()
            self.subject.synchronize()

    def take(self, steps: int) -> Clocked:
        """Take steps one after another; the table of modules is swapped outside the timed part."""
        with self.version.active():
            subject = self.subject
            if subject.device.type == "cuda":
                return _on_gpu(subject.step, steps)
            start = time.perf_counter()
            for _ in range(steps):
                subject.step()
            return (time.perf_counter() - start) * 1000 / steps, 0.0

    def close(self) -> None:
        """Drop the subject."""
        self.subject = None


def _on_gpu(step: Callable[[], Any], steps: int) -> Clocked:
    """Steps queued one behind the other, between two events: the launch of the first is not timed."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    first.record()
    for _ in range(steps):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / steps, float(torch.cuda.clock_rate())


class Remote:
    """A version in a process of its own, which works only while it is asked to.

    Args:
        root: its checkout.
        case: id of the case.
        cores: CPU cores that it may use.
        load: modules that register further implementations.
    """

    def __init__(self, root: Path, case: str, cores: int, load: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, root, case, cores, tuple(load)), daemon=True)
        self._process.start()
        there.close()

    def build(self) -> None:
        """As `Local.build`."""
        self._ask(0)

    def take(self, steps: int) -> Clocked:
        """As `Local.take`."""
        clocked: Clocked = self._ask(steps)
        return clocked

    def close(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join(5)
        self._process.kill()

    def _ask(self, steps: int) -> Any:  # noqa: ANN401 (what the other process sends)
        try:
            self._here.send(steps)
            answer = self._here.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe: Any, root: Path, case: str, cores: int, load: tuple[str, ...]) -> None:  # noqa: ANN401 (no public type)
    side = Local(Version(root, "", load), case, cores)
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        try:
            if steps:
                pipe.send(side.take(steps))
            else:
                side.build()
                pipe.send(None)
        except MissingError as error:
            pipe.send(error)
        except Exception as error:  # noqa: BLE001 (whatever the version's code raises is the answer)
            # As text: an exception of the version's own class is unknown to the other process.
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
