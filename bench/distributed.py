"""Ranks: how a case of several processes is launched, and the little that its ranks must tell one another."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from bench.lifeline import stop_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch._C._distributed_c10d import Store  # `torch.distributed.Store`, which does not export it to type checkers

    from bench.case import Case
    from bench.peers import Peers
    from bench.results import Settings

T = TypeVar("T")

ROLL_CALL_S = 5.0
"""How long a rank that has lost others waits for each to say that it is there."""


def launcher(case: Case, settings: Settings, peers: Peers) -> list[str]:
    """The command before the module's name: this Python, or torchrun with a process a device.

    Args:
        case: the case.
        settings: how long the torchruns of several machines wait for each other.
        peers: those that run it together. Where a torchrun has started them, each is the parent of one rank.
    """
    here = peers.place
    if case.processes == 1 or here.launched:
        return [sys.executable, "-m"]
    meeting = ["--standalone"]
    if here.count > 1:
        meeting = [
            *(f"--nnodes={here.count}", f"--node-rank={peers.number}"),
            *(f"--master-addr={here.host}", f"--master-port={peers.met.ranks_port}"),
            f"--rdzv-conf=timeout={join_timeout_s(settings):.0f}",
        ]
    each = f"--nproc-per-node={case.processes // here.count}"
    return [sys.executable, "-m", "bench.distributed", *meeting, each, "--max-restarts=0", "-m"]


def join_timeout_s(settings: Settings) -> float:
    """How long ranks and their machines wait for those that have not come yet: the parent must learn of it in time."""
    return max(1.0, min(settings.join_timeout_s, settings.time_limit_s / 2))


class AbsentError(Exception):
    """Ranks that have not come to the group in time: says which."""


class Group:
    """The processes of one case. Alone, every answer is this process's own.

    Args:
        rank: which of them this is, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def agree(self, decision: T) -> T:
        """Rank 0's decision: ranks that stop at different steps would wait for each other for ever."""
        if self.size == 1:
            return decision
        import torch.distributed as dist

        decisions = [decision]
        dist.broadcast_object_list(decisions, src=0)
        return decisions[0]

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in order; on every rank. They wait for each other."""
        if self.size == 1:
            return [mine]
        import torch.distributed as dist

        everyone: list[T] = [mine] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone

    def slowest(self, durations: Sequence[float]) -> list[float]:
        """Step by step the longest duration of any rank: a step is over when its last rank is."""
        return [max(step) for step in zip(*self.gather(list(durations)), strict=True)]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place, as DistributedDataParallel does with gradients."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(self.size)


class Ranks:
    """This process's way into the group of its case, and out of it.

    Args:
        case: the case.
        settings: how long ranks wait: for each other to come, and within an exchange.
        key: what the case has to itself in a store that outlives it.
    """

    def __init__(self, case: Case, settings: Settings, key: str = "") -> None:
        self.case = case
        self.key = key
        self.rank = int(os.environ["RANK"]) if case.processes > 1 else 0
        # In time for the parent to learn who was waited for, and by whom.
        self.timeout = timedelta(seconds=min(settings.rank_timeout_s, settings.time_limit_s / 2))
        self.join_timeout = timedelta(seconds=join_timeout_s(settings))
        self.store: Store | None = None

    @contextlib.contextmanager
    def joined(self) -> Iterator[Group]:
        """The group: of this process alone, or of all the ranks that were launched.

        Raises:
            AbsentError: some of them have not come in time.
        """
        if self.case.processes == 1:
            yield Group()
            return
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=self.join_timeout))
        self.store = dist.PrefixStore(self.key, store)  # type: ignore[attr-defined]  # as with `Store`
        self._wait_for_all()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.case.on_gpu else None
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            # What ranks tell one another beside the tensors goes by gloo, past a GPU's queue.
            "cpu:gloo,cuda:nccl" if self.case.on_gpu else "gloo",
            store=self.store,
            rank=rank,
            world_size=size,
            timeout=self.timeout,
            device_id=device,
        )
        group = Group(rank, size)
        yield group
        # A rank that leaves early would take the connection away from one that still reads. One that failed leaves by
        # its end: closing the connections first would let the others report it before it has said why.
        group.gather(None)
        dist.destroy_process_group()

    def _wait_for_all(self) -> None:
        """Within the time to join: an exchange, which has a limit of its own, would not say who is absent."""
        import torch.distributed as dist

        if self.store is None:
            return
        self.store.set(f"came/{self.rank}", "")
        keys = [f"came/{rank}" for rank in range(self.case.processes)]
        try:
            self.store.wait(keys, self.join_timeout)
        except dist.DistStoreError as error:
            absent = ", ".join(str(rank) for rank, key in enumerate(keys) if not self.store.check([key]))
            waited = f"{self.join_timeout.total_seconds():g} s"
            raise AbsentError(f"rank {absent} did not come within {waited}; rank {self.rank} waited") from error

    def answers(self) -> list[int]:
        """Say that this rank is there though an exchange failed, and hear which others are: all but these are lost."""
        if self.store is None:
            return [self.rank]
        there = {self.rank}
        with contextlib.suppress(Exception):  # the store may be lost too; whoever was heard before is there
            self.store.set(f"there/{self.rank}", "")
            end = time.monotonic() + ROLL_CALL_S
            while time.monotonic() < end and len(there) < self.case.processes:
                there |= {rank for rank in range(self.case.processes) if self.store.check([f"there/{rank}"])}
                time.sleep(0.1)
        return sorted(there)


def is_exchange(error: BaseException) -> bool:
    """Whether an exchange between ranks failed, by another's fault: gloo says so in nothing but its text."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "ncclRemoteError" in str(error))
    )


def waited_in_vain(error: BaseException) -> bool:
    """Whether the other rank of a failed exchange was silent, not gone."""
    return re.search("timed? ?out", str(error), flags=re.IGNORECASE) is not None


if __name__ == "__main__":
    # torchrun, which ends its ranks when it ends, and itself ends with the process that measures.
    stop_with_parent()
    from torch.distributed.run import main

    main()
