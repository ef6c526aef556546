"""What the compiler makes of every kernel with its shipped settings, for GPUs that are not here.

    for row in rows(["sm_90"]): print(row)

Compilation runs in processes of its own, whose environment does not ask for the interpreter, one for each core; what
they made is read in this one, where one listing serves all kernels of a target.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import kernels
from kernels.inspection import Compiled, Resources, compiled, read, shared_limit
from kernels.problem import Problem, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kernels.spec import Compilation, Kernel

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Resources):
    """One kernel at one problem with the settings shipped for one target.

    `config` is the problem and its settings, `1x512x512 64→64 bf16 | tma 16x16 n64 k64 w4 s4`; `shared_limit_bytes` is
    what the target allows one program.
    """

    kernel: str
    target: str
    config: str
    shared_limit_bytes: int


class CompilationError(Exception):
    """A shipped setting does not compile for a target; the message carries the compiler's words."""


def rows(
    targets: Iterable[str] = TARGETS,
    kernel: str | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Resources of every kernel at the U-Net's own layers, or those that stand for them, in the registry's order.

    Args:
        targets: `sm_80`, `sm_89`, `sm_90`, `sm_100`, `sm_120`.
        kernel: only the kernel of this name.
        workers: compiling processes; one for each core this process may use where None.
        progress: called with (compiled, of) after each compilation, from any thread.

    Raises:
        ValueError: an unknown target or kernel.
        CompilationError: a shipped setting does not compile.
    """
    chosen = _kernels(kernel)
    wanted = [
        (entry, problem, target) for target in targets for entry in chosen for problem in entry.compiled or entry.layers
    ]
    jobs: dict[str, dict[str, object]] = {}
    keys = []
    for entry, problem, target in wanted:
        capability = capability_of(target)
        compilation = entry.compilation(problem, entry.settings(problem, capability))
        keys.append(_key(compilation, capability))
        jobs.setdefault(keys[-1], _job(entry, problem, entry.settings(problem, capability), capability))
    found, errors = _compile(jobs, workers or _cores(), progress or _silent, stop=True)
    if errors:
        raise CompilationError(errors[0])
    return [
        Row(
            kernel=entry.name,
            target=target,
            config=f"{problem} | {entry.settings(problem, capability_of(target))}",
            shared_limit_bytes=shared_limit(capability_of(target)),
            **dataclasses.asdict(found[key]),
        )
        for (entry, problem, target), key in zip(wanted, keys, strict=True)
    ]


def compile_candidates(
    kernel: Kernel, problems: Iterable[Problem], capability: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compile every candidate of the problems, one process a core: `candidates` and launches then find them on disk.

    What does not compile is left to `candidates`, which drops it.
    """
    jobs: dict[str, dict[str, object]] = {}
    for problem in problems:
        for settings in kernel.candidates(problem, capability, compiled=False):
            key = _key(kernel.compilation(problem, settings), capability)
            jobs.setdefault(key, _job(kernel, problem, settings, capability))
    _compile(jobs, _cores(), progress or _silent, stop=False)


def capability_of(target: str) -> int:
    """`sm_90` → 90.

    Raises:
        ValueError: none of `TARGETS`.
    """
    if target not in TARGETS:
        raise ValueError(f"a target is one of {', '.join(TARGETS)}; given {target!r}")
    return int(target.removeprefix("sm_"))


def _kernels(name: str | None) -> list[Kernel]:
    found = [entry for entry in kernels.KERNELS if name in {None, entry.name}]
    if not found:
        known = ", ".join(entry.name for entry in kernels.KERNELS)
        raise ValueError(f"no kernel is called {name!r}; there are: {known}")
    return found


def _key(compilation: Compilation, capability: int) -> str:
    # Layers whose sizes the compiler never sees share one compilation.
    parts = dataclasses.asdict(dataclasses.replace(compilation, function=compilation.function.fn.__qualname__))
    return json.dumps([parts, capability], sort_keys=True)


def _job(kernel: Kernel, problem: Problem, settings: Settings, capability: int) -> dict[str, object]:
    parts = {"problem": dataclasses.asdict(problem), "settings": dataclasses.asdict(settings)}
    return {"kernel": kernel.name, "capability": capability, **parts}


def _silent(_done: int, _of: int) -> None:
    """Progress that nobody watches."""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(
    jobs: dict[str, dict[str, object]], workers: int, progress: Callable[[int, int], None], *, stop: bool
) -> tuple[dict[str, Resources], list[str]]:
    """What was made of each job, and what went wrong; with `stop` the first fault ends it."""
    waiting = list(jobs.items())[::-1]
    found: dict[str, Compiled] = {}
    errors: list[str] = []

    def serve() -> None:
        died = True
        while died and waiting and not (stop and errors):
            died = False
            with _start() as child:
                assert child.stdin is not None  # noqa: S101 - for the type checker: _start asks for pipes
                assert child.stdout is not None  # noqa: S101
                while not died and not (stop and errors):
                    try:
                        key, job = waiting.pop()
                    except IndexError:
                        break
                    child.stdin.write(json.dumps(job) + "\n")
                    child.stdin.flush()
                    line = child.stdout.readline()
                    died = not line
                    answer = json.loads(line or '{"error": "the compiling process died"}')
                    if "error" in answer:
                        errors.append(f"{job}: {answer['error']}")
                    else:
                        found[key] = Compiled(**answer | {"cubin": bytes.fromhex(answer["cubin"])})
                    progress(len(found) + len(errors), len(jobs))

    threads = [threading.Thread(target=serve) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(zip(found, read(found.values()), strict=True)), errors


def _start() -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    room = str(pathlib.Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (room, environment.get("PYTHONPATH"))))
    program = "from kernels.resources import _serve; _serve()"
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603


def _serve() -> None:
    """Answer compilation jobs, one JSON line each, until the input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        problem = Problem(**job["problem"])
        (entry,) = _kernels(job["kernel"])
        try:
            compilation = entry.compilation(problem, Settings(**job["settings"]))
            answer = dataclasses.asdict(compiled(compilation, job["capability"]))
            answer["cubin"] = answer["cubin"].hex()
        except Exception as error:  # noqa: BLE001 - whatever triton's passes raise is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
