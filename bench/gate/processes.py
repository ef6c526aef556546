"""The gate's processes: one a probe, one a trial, and what each version says its cases are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import allowance
from bench.environment import ROOT, files_hash
from bench.gate.checkout import Side
from bench.gate.protocol import Answer, Ask
from bench.machine import usable_cores
from bench.processes import died, supervise, tail

# A compilation with an empty cache on two busy cores is the longest of what a process does.
LIMIT_S = 600.0

Tell = Callable[[str], None]
Layer = Mapping[str, str | int]
"""What the compiler made of a kernel for one layer and target."""


class Processes:
    """Starts one process after another.

    Args:
        folder: where they may write; a case keeps its compiler caches there from trial to trial.
        load: modules that register further implementations.
    """

    def __init__(self, folder: Path, load: Sequence[str]) -> None:
        self.folder = folder
        self.load = tuple(load)

    def probe(self, case: str, side: Side, tell: Tell = lambda _: None) -> Answer:
        """Count what is deterministic about a case in one version."""
        return self._run(case, "probe", (side.root,), tell=tell)

    def trial(
        self, case: str, roots: tuple[str, str], *, together: bool, seed: int, tell: Tell = lambda _: None
    ) -> Answer:
        """Time two checkouts against each other once."""
        return self._run(case, "trial", roots, together=together, seed=seed, tell=tell)

    def _run(
        self, case: str, job: str, roots: tuple[str, ...], *, together: bool = True, seed: int = 0, tell: Tell
    ) -> Answer:
        folder = self.folder / case
        folder.mkdir(exist_ok=True)
        answer = folder / "answer.json"
        answer.unlink(missing_ok=True)
        ask = Ask(
            job="probe" if job == "probe" else "trial",
            case=case,
            roots=roots,
            together=together,
            load=self.load,
            cores=usable_cores(),
            memory_mib=allowance.free_mib(),
            seed=seed,
        )
        (folder / "ask.json").write_bytes(msgspec.json.encode(ask))
        command = [sys.executable, "-m", "bench.gate.worker", str(folder)]
        code, timed_out = supervise(command, folder, LIMIT_S, lambda _phase, seconds: tell(f"{seconds:.0f} s"))
        if timed_out:
            return Answer(status="broken", reason=f"longer than {LIMIT_S:g} s")
        try:
            return msgspec.json.decode(answer.read_bytes(), type=Answer)
        except (OSError, msgspec.DecodeError):
            return Answer(status="broken", reason=died(code) + tail(folder))


def cases(side: Side, preset: str, load: Sequence[str]) -> Mapping[str, str | None]:
    """Ids of a preset in a checkout, each with the reason why it is not supported here; asked of the checkout itself.

    Raises:
        LookupError: it cannot tell; the text says why.
    """
    loads = [word for module in load for word in ("--load", module)]
    return {row["id"]: row["unsupported"] for row in _told(side, "list", "--preset", preset, *loads)}


def resources(side: Side, targets: Sequence[str]) -> list[Layer]:
    """What the compiler makes of a checkout's kernels, a row a layer and target, from its own `bench resources`.

    Raises:
        LookupError: it cannot tell; the text says why.
    """
    return _told(side, "resources", "--target", ",".join(targets))


def _told(side: Side, command: str, *options: str) -> list[Any]:
    """What a command of a checkout tells, an object a line."""
    done = in_checkout(side, ["-m", "bench", command, "--json", *options])
    if done.returncode:
        raise LookupError((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
    try:
        return [json.loads(line) for line in done.stdout.splitlines()]
    except json.JSONDecodeError as error:
        raise LookupError(f"`bench {command} --json` prints what is no JSON: {error.doc}") from error


def kernels_hash(side: Side) -> str:
    """Over a checkout's kernels and launch settings."""
    root = Path(side.root)
    return files_hash(root, [*(root / "kernels").rglob("*.py"), *(root / "kernels").rglob("*.json")])


def in_checkout(side: Side, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run this Python with a checkout's own packages, without the interpreter of Triton."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    here = [str(Path.cwd())] if Path.cwd() != ROOT else []
    variables["PYTHONPATH"] = os.pathsep.join([side.root, *here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=side.root, env=variables, capture_output=True, text=True, check=False)  # noqa: S603
