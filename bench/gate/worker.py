"""The process of a trial or a probe: `python -m bench.gate.worker FOLDER` reads `ask.json` and leaves `answer.json`.

This program's own modules step aside while a version is active, so nothing here is imported late.
"""

import os
import sys
import traceback
from pathlib import Path

import msgspec

from bench import allowance
from bench.gate.probe import probe
from bench.gate.protocol import Answer, Ask
from bench.gate.trial import SideError, trial
from bench.gate.versions import UnshareableError, taken
from bench.lifeline import stop_with_parent

LONGEST = 500


def main(folder: Path) -> int:
    """Do what `ask.json` asks, and write the answer whatever happens."""
    ask = msgspec.json.decode((folder / "ask.json").read_bytes(), type=Ask)
    stop_with_parent()
    if "gpu" not in ask.case:  # a GPU limits itself, and CUDA maps far more address space than it uses
        allowance.limit(ask.memory_mib)
    taken()
    try:
        answer = probe(ask) if ask.job == "probe" else trial(ask)
    except UnshareableError as error:
        answer = Answer(status="unshareable", reason=str(error))
    except SideError as error:
        traceback.print_exc()
        answer = Answer(status=error.status, side=error.side, reason=_one_line(str(error)))
    except Exception as error:  # noqa: BLE001 (whatever else goes wrong is an answer too)
        traceback.print_exc()
        answer = Answer(status="broken", reason=_one_line(f"{type(error).__name__}: {error}"))
    part = folder / "answer.part"
    part.write_bytes(msgspec.json.encode(answer))
    part.replace(folder / "answer.json")
    return 0


def _one_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:LONGEST]


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # two versions of everything are not worth taking apart in order
