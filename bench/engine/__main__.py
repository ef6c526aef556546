"""The process of a case: reads `request.json` in a folder of its own, leaves `outcome.json` there.

Standard output belongs to libraries, so nothing is said on it. Each rank of a distributed case is such a process; the
outcome of rank 0 counts unless another rank fails.
"""

import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench import allowance
from bench.engine.protocol import Outcome, Request
from bench.lifeline import stop_with_parent
from bench.pinning import pin

if TYPE_CHECKING:
    from bench.distributed import Ranks

LONGEST = 500
"""Characters of an error's message that a record keeps."""


def main(folder: Path) -> int:
    """Measure what the request in `folder` asks for, and write the outcome whatever happens.

    Returns:
        The exit status: 0, or 1 if something was raised.
    """
    request = msgspec.json.decode((folder / "request.json").read_bytes(), type=Request)
    rank = int(os.environ.get("RANK", "0"))
    phase_file = folder / f"phase.{rank}"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    stop_with_parent()
    if not request.case.on_gpu:  # a GPU limits itself, and CUDA maps far more address space than it uses
        allowance.limit(request.memory_mib // local)
        pin(request.case, request.cores, int(os.environ.get("LOCAL_RANK", "0")), local)

    def announce(phase: str) -> None:
        phase_file.write_text(phase, encoding="utf-8")

    announce("import")
    start = time.perf_counter()
    from bench.distributed import Ranks
    from bench.engine.measure import begin, measure
    from bench.implementations import load
    from bench.subject import prepare_process

    ranks = Ranks(request.case, request.settings, request.key)
    try:
        load(request.settings.load)
        prepare_process(request.case, request.cores // local)
        imported_s = time.perf_counter() - start
        with ranks.joined() as group:
            if request.case.on_gpu and request.memory_mib:
                allowance.limit_gpu(request.memory_mib)
            if request.only_begin:
                outcome = begin(request.case, request.settings, group, announce)
            else:
                outcome = measure(request.case, request.settings, group, announce)
        outcome = msgspec.structs.replace(outcome, spent_s={"import": imported_s, **outcome.spent_s})
    except Exception as error:  # noqa: BLE001 (whatever the implementation raises is the result of the case)
        traceback.print_exc()
        _write(folder, rank, _failed(error, ranks))
        return 1
    _write(folder, rank, outcome)
    return 0


def _failed(error: Exception, ranks: "Ranks") -> Outcome:
    from bench.distributed import AbsentError, is_exchange, waited_in_vain
    from bench.implementations import UnsupportedError

    if isinstance(error, AbsentError):
        return Outcome(status="timeout", reason=str(error), secondhand=True)
    if is_exchange(error):
        there = ranks.answers()
        lost = ", ".join(str(rank) for rank in range(ranks.case.processes) if rank not in there)
        silent = waited_in_vain(error)
        told = f"rank {lost} does not answer" if lost else "every rank answers, but they waited for different exchanges"
        reason = f"{told}; rank {ranks.rank} {'waited' if silent else 'lost a connection'}: {_one_line(error)}"
        return Outcome(status="timeout" if silent else "crash", reason=reason, secondhand=True)
    if isinstance(error, UnsupportedError):
        return Outcome(status="unsupported", reason=str(error))
    return Outcome(status="oom" if allowance.is_out_of_memory(error) else "crash", reason=_one_line(error))


def _write(folder: Path, rank: int, outcome: Outcome) -> None:
    part = folder / f"outcome.{rank}.part"
    part.write_bytes(msgspec.json.encode(msgspec.structs.replace(outcome, rank=rank)))
    part.replace(folder / f"outcome.{rank}.json")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = lines[0][:LONGEST] if lines else "no message"
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # What was found is written. The interpreter's own end is left out: after torch.distributed it aborts now and then
    # ("terminate called without an active exception"), which would pass for a crash of the case.
    os._exit(status)
