"""What the parent asks of a case's process, and what it gets back."""

import msgspec

from bench.case import Case
from bench.readings import Block, Stage
from bench.results import Rank, Settings, Status, Value


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent asks of the process.

    Args:
        case: the case to measure.
        settings: how.
        cores: CPU cores to share among the processes of the case on this machine.
        memory_mib: memory that the case may take: on the CPU in all its processes here, on a GPU each, 0 for all there
            is.
        only_begin: whether to build, take one step and one more, and measure nothing else.
        key: tells this request from all others of the run, where ranks meet in a store that outlives it.
    """

    case: Case
    settings: Settings
    cores: int
    memory_mib: int
    only_begin: bool = False
    key: str = ""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a process reports to the parent; `Record` explains the other fields.

    Args:
        rank: whose report it is.
        secondhand: whether it failed by the fault of another rank, which it waited for or lost.
    """

    rank: int = 0
    secondhand: bool = False

    status: Status
    reason: str = ""
    figures: dict[str, Value] = {}
    samples_ms: tuple[float, ...] = ()
    blocks: tuple[Block, ...] = ()
    stages: tuple[Stage, ...] = ()
    spent_s: dict[str, float] = {}
    ranks: tuple[Rank, ...] = ()
