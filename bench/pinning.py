"""The CPU cores that a process keeps to, so that the scheduler does not move it about in the middle of a step."""

import os

import psutil

from bench.case import Case

LOOK_S = 0.1


def pin(case: Case, cores: int, rank: int, processes: int) -> None:
    """Keep this process, before it has any thread of its own, to as many cores as the case has threads.

    Of several processes each gets cores of its own; a single one gets those that are idlest now. Nothing happens where
    the case wants all cores, or the system has no such thing.

    Args:
        case: whose process this is.
        cores: that its processes on this machine share.
        rank: which of these this is.
        processes: how many they are.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    each = case.threads or max(1, cores // processes)
    if each * processes > len(allowed) or each == len(allowed):
        return
    if processes == 1:
        busy = psutil.cpu_percent(interval=LOOK_S, percpu=True)
        # The last of equals: the first cores serve interrupts.
        allowed.sort(key=lambda core: (busy[core] if core < len(busy) else 0.0, -core))
    os.sched_setaffinity(0, allowed[rank * each : (rank + 1) * each])
