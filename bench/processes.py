"""A command in a process of its own: its time limit, its output, and its end, with nothing of it left behind.

The parent sleeps while it runs.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from bench.environment import ROOT
from bench.lifeline import PARENT

# The environment variable by which every process of a case is known, however far it has detached itself.
MARK = "UNET_BENCH_PROCESS"
POLL_S = 0.25
GRACE_S = 3.0
LOG_TAIL = 12
LONGEST_TAIL = 16_384  # bytes: a process may print anything

Handler = Callable[[int, FrameType | None], object] | signal.Handlers
Progress = Callable[[str, float], None]
"""Told about four times a second the phase and the seconds since the start."""


def died(code: int) -> str:
    """What an exit status says, in words; negative: the signal that killed it."""
    if code >= 0:
        return f"the process ended with status {code}"
    hint = " (by hand, or by the kernel when memory ran out)" if -code == signal.SIGKILL else ""
    with contextlib.suppress(ValueError):
        return f"the process was killed by {signal.Signals(-code).name}{hint}"
    return f"the process was killed by signal {-code}"


def phase(folder: Path) -> str:
    """What the process, or the first of several, was doing last."""
    with contextlib.suppress(OSError, ValueError):
        first = min(folder.glob("phase.*"), key=lambda path: int(path.suffix[1:]))
        return first.read_text(encoding="utf-8") or "start"
    return "start"


def tail(folder: Path, most: int = LOG_TAIL) -> str:
    """The last lines that the process printed, on a line of their own each, without torchrun's account of its ranks."""
    own = re.split(r"^E\d{4} .*/elastic/", _end_of_log(folder), maxsplit=1, flags=re.MULTILINE)[0]
    return "".join(f"\n{line}" for line in own.splitlines()[-most:])


def _end_of_log(folder: Path) -> str:
    with contextlib.suppress(OSError), (folder / "log").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - LONGEST_TAIL))
        return log.read().decode(errors="replace")
    return ""


def killed_rank(folder: Path) -> str | None:
    """The rank that a signal ended first, by torchrun's account: the others only lost their connection to it."""
    account = r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: -(\d+)"
    found = re.search(account, _end_of_log(folder), flags=re.DOTALL)
    return f"rank {found[1]}: {died(-int(found[2]))}" if found else None


def never_met(folder: Path) -> bool:
    """Whether torchrun has waited in vain for those of other machines, as far as its log tells."""
    told = r"clients joined|client socket has (timed out|failed)|[Tt]imeout after \d+ms, keys: \S*torchelastic"
    return re.search(told, _end_of_log(folder)) is not None


def supervise(
    command: list[str], folder: Path, limit_s: float, progress: Progress, *, cwd: Path | None = None
) -> tuple[int, bool]:
    """Run a command to its end, its time limit or Ctrl-C; whichever comes, nothing of it is left running.

    Its log, its temporary files and its compilers' caches are in `folder`, where it also runs unless `cwd` says where.

    Returns:
        Its exit status (negative: the signal that killed it) and whether the limit was reached.
    """
    mark = uuid.uuid4().hex
    start = time.monotonic()
    with (folder / "log").open("wb") as log:
        # A session of its own: Ctrl-C in the terminal reaches the parent alone, which then ends the case in order.
        process = subprocess.Popen(  # noqa: S603 (this Python, our own module)
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd or folder,
            env=_variables(folder, mark),
            start_new_session=True,
        )
        try:
            while (elapsed := time.monotonic() - start) < limit_s:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=POLL_S), False
                progress(phase(folder), elapsed)
            return 0, True
        finally:
            _end(process, mark)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """An order to end (SIGTERM), as CI gives it, and a closed terminal are as good as Ctrl-C inside.

    Under nohup a closed terminal is to be ignored, and stays so.
    """

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    ends = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    with _handled_by(interrupt, ends):
        yield


@contextlib.contextmanager
def _handled_by(handler: Handler, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    before = [signal.signal(one, handler) for one in numbers]
    try:
        yield
    finally:
        for one, old in zip(numbers, before, strict=True):
            signal.signal(one, old)


def _variables(folder: Path, mark: str) -> Mapping[str, str]:
    """The child's environment: compiler caches of its own, so that a first call is a first call, and our packages."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # never timed
    return {
        **inherited,
        MARK: mark,
        PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(Path.cwd()), os.environ.get("PYTHONPATH")])),
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONUNBUFFERED": "1",
    }


def _end(process: "subprocess.Popen[bytes]", mark: str) -> None:
    """End every process that carries the mark: first with SIGTERM, then with SIGKILL."""
    # Impatience, a second Ctrl-C, would leave processes behind.
    with _handled_by(signal.SIG_IGN, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        for send in ("terminate", "kill"):
            left = list(_marked(mark))
            for one in left:
                with contextlib.suppress(psutil.Error):
                    getattr(one, send)()
            psutil.wait_procs(left, timeout=GRACE_S)
        process.wait()


def _marked(mark: str) -> Iterator[psutil.Process]:
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if one.status() != psutil.STATUS_ZOMBIE and one.environ().get(MARK) == mark:
                yield one
