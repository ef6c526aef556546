"""Measure candidate settings on the GPU at hand and keep the fastest that is right, one problem at a time.

A generator, so that a command can show progress and be stopped: the file is replaced as a whole after each problem, and
problems already measured with this source and this triton are not measured again. Every candidate gets a short look,
the best few a long one in a CUDA graph, as they will run. One that has twice ended the process is not tried again: an
illegal access is the end of a CUDA context, and a barrier that nobody meets is the end of everyone's patience.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch.utils._pytree import tree_leaves

from kernels import around, conv_bn_relu_up, conv_transpose, conv_weight_gradient, convolve, folded_gemm, implicit_gemm
from kernels.inspection import write_atomically
from kernels.launch import place
from kernels.limits import relative_l2, relative_l2_limit
from kernels.settings import file_for, forget

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterable, Iterator

    from kernels.problem import Problem, Settings
    from kernels.spec import Kernel

    Measure = Callable[[Callable[[], object]], float]

# Candidates measured for long: the short look scatters by more than the difference between the best few.
_FINALISTS = 4
_ATTEMPTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clock:
    """How a launch is timed, in ms: `look` for every candidate, `measure` for the best few; the look stands if None."""

    look: Measure
    measure: Measure | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate tried, or one problem passed over because it was measured before (`settings` is None).

    `ms` is the median time, None where the candidate failed; `reason` says why then.
    """

    problem: Problem
    index: int
    of: int
    settings: Settings | None
    ms: float | None
    reason: str


def tune(
    kernel: Kernel,
    problems: Iterable[Problem],
    device: torch.device,
    *,
    path: pathlib.Path | None = None,
    clock: Clock | None = None,
    compiled: bool = True,
) -> Iterator[Trial]:
    """Try every candidate of every problem; after each problem its best goes into the GPU's file.

    Args:
        kernel: from the registry.
        problems: what to measure, in this order.
        device: the GPU; in the interpreter nothing is worth measuring, and tests give a `clock` of their own.
        path: the file, `tuned/<gpu>.json` where None; beside it `.attempts` has what is being tried.
        clock: medians of triton.testing.do_bench and do_bench_cudagraph where None.
        compiled: leave out candidates whose compiled code spills, does not fit, or misses the tensor cores.

    Yields:
        a `Trial` after each candidate.

    Raises:
        NotImplementedError: no GPU that the kernels run on.
    """
    capability, gpu = place(device)
    path = file_for(gpu or "interpreter") if path is None else path
    clock = Clock(look=_looked_ms, measure=_replayed_ms) if clock is None else clock
    document = _document(path, capability, gpu)
    measured = {_name(row["kernel"], row["problem"]) for row in document["rows"]}
    for problem in problems:
        if _name(kernel.name, dataclasses.asdict(problem)) in measured:
            yield Trial(problem=problem, index=0, of=0, settings=None, ms=None, reason="measured before")
            continue
        question = _Question(kernel, problem, device, path.with_suffix(".attempts"))
        settings = kernel.candidates(problem, capability, compiled=compiled)
        trials = []
        for index, candidate in enumerate(settings):
            ms, reason = question.answer(candidate, clock.look)
            trials.append(
                Trial(problem=problem, index=index, of=len(settings), settings=candidate, ms=ms, reason=reason)
            )
            yield trials[-1]
        document["rows"].append(_row(question, trials, clock))
        write_atomically(path, json.dumps(document, indent=1) + "\n")
    forget()


def _row(question: _Question, trials: list[Trial], clock: Clock) -> dict[str, Any]:
    """What is kept of a problem: the fastest of those that were right, and beside it what it is to be compared with.

    No settings are kept where PyTorch's own is what runs unless the kernel is faster, and it is not.
    """
    right = {trial.settings: trial.ms for trial in trials if trial.settings is not None and trial.ms is not None}
    shipped = [trial.settings for trial in trials[:1] if trial.settings is not None and trial.settings in right]
    sure = right
    if clock.measure is not None:
        finalists = sorted(right, key=lambda settings: right[settings])[:_FINALISTS]
        again = {one: question.answer(one, clock.measure)[0] for one in dict.fromkeys([*shipped, *finalists])}
        sure = {one: ms for one, ms in again.items() if ms is not None}
    best = min(sure, key=lambda settings: sure[settings], default=None)
    rival_ms = question.rival_ms(clock.measure or clock.look)
    beaten = best is not None and rival_ms is not None and rival_ms <= sure[best]
    return {
        "kernel": question.kernel.name,
        "problem": dataclasses.asdict(question.problem),
        "settings": None if best is None or beaten else dataclasses.asdict(best),
        "ms": None if best is None else sure[best],
        "shipped_ms": sure.get(shipped[0]) if shipped else None,
        "rival_ms": rival_ms,
        "tried": len(trials),
        "failed": sum(trial.ms is None for trial in trials),
    }


@functools.cache
def source_hash() -> str:
    """Names the code that was measured: the loops, their launcher, and triton's version."""
    text = triton.__version__ + "".join(
        inspect.getsource(module)
        for module in (
            *(implicit_gemm, around, convolve, folded_gemm),
            *(conv_bn_relu_up, conv_transpose, conv_weight_gradient),
        )
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Question:
    """One problem, put to one candidate after another: is it right, and how fast.

    Arguments and exact results are made once. Right is shown by two images at most: one doesn't show all, and fp64 of
    more takes long.
    """

    def __init__(self, kernel: Kernel, problem: Problem, device: torch.device, attempts: pathlib.Path) -> None:
        self.kernel = kernel
        self.problem = problem
        self._small = dataclasses.replace(problem, batch=min(problem.batch, 2))
        self._device = device
        self._attempts = attempts

    @functools.cached_property
    def _given(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        generator = torch.Generator(self._device).manual_seed(0)
        small, whole = (self.kernel.inputs(one, self._device, generator) for one in (self._small, self.problem))
        return small, whole

    @functools.cached_property
    def _exact(self) -> list[torch.Tensor]:
        return tree_leaves(self.kernel.reference(*(_double(argument) for argument in self._given[0])))

    def answer(self, settings: Settings, measure: Measure) -> tuple[float | None, str]:
        """Milliseconds, or None and why not: a fast wrong answer has no time."""
        with self._attempt(settings) as before:
            if before >= _ATTEMPTS:
                return None, f"ended the process {before} times"
            try:
                small, whole = self._given
                launch = self.kernel.launcher(small, self._small, settings)
                for written in tree_leaves(launch()):
                    written.fill_(float("nan"))  # this memory may hold the right answer of the candidate before
                limit = relative_l2_limit(self.problem.precision, self.kernel.depth(self.problem))
                error = max(relative_l2(*pair) for pair in zip(tree_leaves(launch()), self._exact, strict=True))
                if not error <= limit:
                    return None, f"wrong: relative L2 {error:.3g}, at most {limit:.3g}"
                return measure(self.kernel.launcher(whole, self.problem, settings)), ""
            except (triton.OutOfResources, triton.CompilationError, torch.cuda.OutOfMemoryError) as error:
                return None, f"{type(error).__name__}: {error}".splitlines()[0]

    def rival_ms(self, measure: Measure) -> float | None:
        """Milliseconds of the kernel's rival, if it has one."""
        rival = self.kernel.rival
        return None if rival is None else measure(functools.partial(rival, *self._given[1]))

    @contextlib.contextmanager
    def _attempt(self, settings: Settings) -> Iterator[int]:
        """Note on disk what is tried until it has ended; give how often it was tried before and never ended."""
        known: dict[str, int] = json.loads(self._attempts.read_text()) if self._attempts.exists() else {}
        parts = [source_hash(), self.kernel.name, dataclasses.asdict(self.problem), dataclasses.asdict(settings)]
        name = json.dumps(parts, sort_keys=True)
        before = known.pop(name, 0)
        write_atomically(self._attempts, json.dumps({**known, name: before + 1}))
        yield before
        if before >= _ATTEMPTS:
            known[name] = before
        if known:
            write_atomically(self._attempts, json.dumps(known))
        else:
            self._attempts.unlink()


def _looked_ms(launch: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(launch, warmup=2, rep=8, return_mode="median"))


def _replayed_ms(launch: Callable[[], object]) -> float:
    # Launch gaps do not count, and the caches are as the launch before left them: as in a network's graph.
    return float(triton.testing.do_bench_cudagraph(launch, rep=20, return_mode="median"))


def _double(argument: object) -> object:
    return argument.double() if isinstance(argument, torch.Tensor) else argument


def _document(path: pathlib.Path, capability: int, gpu: str | None) -> dict[str, Any]:
    header = {"gpu": gpu, "capability": capability, "triton": triton.__version__, "source": source_hash()}
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if all(known.get(name) == value for name, value in header.items()):
            return known
    return header | {"rows": []}


def _name(kernel: str, problem: dict[str, Any]) -> str:
    return json.dumps([kernel, problem], sort_keys=True)
