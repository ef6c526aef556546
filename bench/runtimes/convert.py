"""Makes an artefact in a process of its own: what a conversion leaves in memory is none of the running engine's.

`python -m bench.runtimes.convert FOLDER` reads `given.pt` there, and writes the artefact beside it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import allowance
from bench.runtimes.artefact import RUNTIMES

if TYPE_CHECKING:
    from torch import nn

    from bench.case import Case
    from bench.runtimes.artefact import Runtime

GIVEN = "given.pt"


def convert(runtime: Runtime, network: nn.Module, case: Case, folder: Path) -> None:
    """Write the artefact of an eager network in eval mode into a folder.

    Raises:
        MemoryError: it does not fit.
        RuntimeError: the engine cannot convert the network; the engine's last words.
    """
    import torch

    torch.save((network, case), folder / GIVEN)
    command = [sys.executable, "-m", "bench.runtimes.convert", str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603
    (folder / GIVEN).unlink()
    if done.returncode == allowance.OUT_OF_MEMORY:
        raise MemoryError(f"making {runtime.files[0]} ran out of memory")
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"making {runtime.files[0]} failed: {said[-1] if said else f'status {done.returncode}'}")


def main(folder: Path) -> int:
    """Make the artefact that the files in `folder` ask for."""
    import torch

    try:
        # A file of our own, just written: it may hold any network.
        network, case = torch.load(folder / GIVEN, weights_only=False)
        RUNTIMES[case.implementation].save(network, case, folder)
    except Exception as error:
        if not allowance.is_out_of_memory(error):
            raise
        return allowance.OUT_OF_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
