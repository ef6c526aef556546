"""What tests of several machines share."""

import contextlib
import socket
from collections.abc import Iterator

from bench.case import Case

from .conftest import TINY

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "WORLD_SIZE": "16",
    "LOCAL_WORLD_SIZE": "8",
    "RANK": "11",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "gpu-0",
    "MASTER_PORT": "29500",
}


def two_ranks(implementation: str = "eager") -> Case:
    return Case(implementation=implementation, task="train", devices="2cpu", **TINY)  # type: ignore[arg-type]


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """An endpoint on the loopback that nobody else is given meanwhile: bound, and free to be listened at."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
