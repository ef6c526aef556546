"""What must be alike on all machines that measure together, or the record of one would speak falsely of the others."""

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from bench.case import Case
from bench.environment import Environment
from bench.errors import UsageError
from bench.peers import Peers
from bench.results import Settings, option_of


class Terms(msgspec.Struct, frozen=True):
    """What one of them is about to do, by name, in words."""

    said: dict[str, str]


def terms(environment: Environment, settings: Settings, cases: Sequence[Case], flags: Mapping[str, object]) -> Terms:
    """What this machine is about to do.

    Args:
        environment: where.
        settings: how.
        cases: what, in order.
        flags: what else, by option.
    """
    machine = environment.machine
    ids = "\n".join(case.id for case in cases)
    own = {name: getattr(settings, name) for name in Settings.__struct_fields__}
    own["weights"] = settings.weights and settings.weights.sha256  # the file may lie elsewhere
    said = {
        "number of nodes": machine.nodes,
        "sources": environment.source_hash[:12],
        "Python": machine.python,
        "torch": machine.torch_version,
        "triton": machine.triton_version,
        "engines": machine.engines,
        "GPUs": ", ".join(gpu.name for gpu in machine.gpus) or "none",
        "CPU": machine.cpu,
        "cores": machine.cores,
        "cases": f"{len(cases)} in an order of hash {hashlib.sha256(ids.encode()).hexdigest()[:12]}",
        **flags,
        **{option_of(name): value for name, value in own.items()},
    }
    return Terms({name: str(value) for name, value in said.items()})


def agree(peers: Peers, mine: Terms, wait_s: float) -> None:
    """Make sure that all are about to do the same.

    Raises:
        UsageError: one is not, or has left; says which, and what is different there.
    """
    told = peers.gather(mine, wait_s)
    for number, other in enumerate(told):
        if told[0] is None or other is None:
            raise UsageError(f"{peers.title_of(number)} has left before the first case")
        for name, ours in told[0].said.items():
            if (theirs := other.said.get(name, "not known")) != ours:
                one, first = peers.title_of(number), peers.title_of(0)
                raise UsageError(f"{name} is {theirs} on {one} and {ours} on {first}: make them alike")
