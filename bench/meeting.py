"""How the machines of one run find each other: each is given the same command, one of them listens, the others come.

Processes that a `torchrun` has started meet in the same way; it has told them all they need. Lives in the parent,
so it imports no torch.
"""

import contextlib
import errno
import os
import platform
import socket
import struct
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait

import msgspec

from bench.errors import UsageError

LONGEST_HELLO = 10_000
"""Bytes of one machine's name and number."""
END = b"\n"
"""Of a hello."""
HALF_MESSAGE_S = 10
RETRY_S = 0.25


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where this process stands among those that were given the same command.

    Args:
        count: how many there are: machines, or processes of a torchrun.
        nodes: how many machines they are on.
        host: name or address of number 0.
        port: where it listens.
        number: which this is, if a torchrun has said so; otherwise 0 is the machine that `host` is an address of.
        local: which this is of those on the same machine.
    """

    count: int = 1
    nodes: int = 1
    host: str = ""
    port: int = 0
    number: int | None = None
    local: int = 0

    @property
    def launched(self) -> bool:
        """Whether a torchrun has started the ranks already: one is in the hands of each process."""
        return self.number is not None

    @property
    def endpoint(self) -> str:
        """Where they meet, for messages."""
        return f"--rdzv-endpoint {self.host}:{self.port}"


def place(nodes: int, endpoint: str, variables: Mapping[str, str] = os.environ) -> Place:
    """This process's place, from `--nodes` and `--rdzv-endpoint`, or from what a torchrun has set.

    Raises:
        UsageError: they do not go together, or the endpoint is none.
    """
    if "TORCHELASTIC_RUN_ID" in variables and (count := int(variables["WORLD_SIZE"])) > 1:
        if nodes > 1:
            raise UsageError(f"--nodes {nodes}: torchrun has started this and says how many there are: leave it out")
        # At MASTER_PORT itself torchrun's own store listens.
        usual = variables["MASTER_ADDR"], int(variables["MASTER_PORT"]) + 1
        host, port = _parsed(endpoint) if endpoint else usual
        return Place(
            count=count,
            nodes=count // int(variables["LOCAL_WORLD_SIZE"]),
            host=host,
            port=port,
            number=int(variables["RANK"]),
            local=int(variables["LOCAL_RANK"]),
        )
    if nodes == 1 and not endpoint:
        return Place()
    if nodes == 1 or not endpoint:
        raise UsageError(
            f"--nodes {nodes} --rdzv-endpoint {endpoint or '(none)'}: expected both, the same on every node: "
            "how many there are, from 2, and the address of one of them with a free port"
        )
    host, port = _parsed(endpoint)
    return Place(count=nodes, nodes=nodes, host=host, port=port)


def _parsed(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    if not host or not (port.isdecimal() and port.isascii()) or not 0 < int(port) < 2**16:
        raise UsageError(f"--rdzv-endpoint {endpoint}: expected HOST:PORT, such as node0:29400")
    return host.strip("[]"), int(port)


class Met(msgspec.Struct, frozen=True, kw_only=True):
    """Those that have found each other, as one of them sees it.

    Args:
        number: which this is.
        names: of all their machines, in order.
        ranks_port: a port on number 0 for the ranks of every case.
        links: number → connection: of number 0 to all others, of these to number 0.
        reserved: what keeps the port from being given to anyone else.
    """

    number: int = 0
    names: tuple[str, ...] = ()
    ranks_port: int = 0
    links: dict[int, Connection] = {}
    reserved: socket.socket | None = None


class _Hello(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    number: int | None


class _Welcome(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    names: tuple[str, ...]
    ranks_port: int


def meet(here: Place, wait_s: float) -> Met:
    """Find the others, or be found.

    Raises:
        UsageError: they have not all come within `wait_s`, or the endpoint cannot be reached.
    """
    if here.count == 1:
        return Met(names=(platform.node(),))
    try:
        listener = _listener(here)
        if listener is None:
            return _come(here, wait_s)
        with listener:
            return _receive(here, listener, wait_s)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"{here.endpoint}: {error}: expected the address of a node") from error


def _listener(here: Place) -> socket.socket | None:
    """The socket of number 0; None on the others."""
    addresses = socket.getaddrinfo(here.host, here.port, type=socket.SOCK_STREAM)
    mine = [family for family, *_, to in addresses if _is_mine(family, to[0])]
    if here.number or (here.number is None and not mine):
        return None
    family = next(iter(mine), addresses[0][0])
    try:
        # On all addresses: to itself a machine's name is often a loopback address.
        return socket.create_server(
            ("", here.port),
            family=family,
            backlog=min(here.count, socket.SOMAXCONN),
            dualstack_ipv6=family == socket.AF_INET6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        if here.number is None and error.errno == errno.EADDRINUSE:  # by number 0, on the same machine
            return None
        raise UsageError(f"{here.endpoint}: cannot listen there ({error.strerror})") from error


def _is_mine(family: int, address: object) -> bool:
    try:
        with socket.socket(family) as trial:  # a name may have an IPv6 address where the kernel has no IPv6
            trial.bind((address, 0))
    except OSError:
        return False
    return True


def _receive(here: Place, listener: socket.socket, wait_s: float) -> Met:
    end = time.monotonic() + wait_s
    came: list[tuple[_Hello, Connection]] = []
    knocking: dict[Connection, bytes] = {}
    while len(came) < here.count - 1:
        waiting = [link for _, link in came]
        ready = wait([listener, *knocking, *waiting], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise UsageError(
                f"{len(came) + 1} of {here.count} came to {here.endpoint} within {wait_s:g} s: "
                "give the same command on every node"
            )
        came = [one for one in came if one[1] not in ready]  # not welcomed yet, it has nothing to say but that it left
        if listener in ready:
            knocking[_link(listener.accept()[0])] = b""
        for link in [one for one in knocking if one in ready]:
            said = knocking.pop(link)
            try:
                said += (more := os.read(link.fileno(), LONGEST_HELLO))
                if more and not said.endswith(END) and len(said) < LONGEST_HELLO:
                    knocking[link] = said  # the rest may never come: the others are heard meanwhile
                else:
                    came.append((msgspec.json.decode(said, type=_Hello), link))
            except (OSError, msgspec.DecodeError):  # anyone can knock at a port
                link.close()
    came.sort(key=lambda one: (one[0].number or 0, one[0].name))
    names = (platform.node(), *(hello.name for hello, _ in came))
    links = {number: link for number, (_, link) in enumerate(came, start=1)}
    # Bound and not listening, it lets the ranks' store listen there, case after case, and nobody is given it by chance.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    port = reserved.getsockname()[1]
    for number, link in links.items():
        with contextlib.suppress(OSError):  # it has left again, as will show
            link.send_bytes(msgspec.json.encode(_Welcome(number=number, names=names, ranks_port=port)))
    return Met(names=names, ranks_port=port, links=links, reserved=reserved)


def _come(here: Place, wait_s: float) -> Met:
    end = time.monotonic() + wait_s
    link = _reached(here, end, wait_s)
    try:
        os.write(link.fileno(), msgspec.json.encode(_Hello(name=platform.node(), number=here.number)) + END)
        said = link.poll(max(0.0, end - time.monotonic()))
        answer = link.recv_bytes(LONGEST_HELLO * here.count) if said else b""
        welcome = msgspec.json.decode(answer, type=_Welcome)
    except (EOFError, OSError, msgspec.DecodeError) as error:
        raise UsageError(
            f"{here.endpoint}: what listens there has not made this one of its {here.count} within {wait_s:g} s: "
            "give the same command on every node, and no more often"
        ) from error
    return Met(number=welcome.number, names=welcome.names, ranks_port=welcome.ranks_port, links={0: link})


def _reached(here: Place, end: float, wait_s: float) -> Connection:
    while True:
        try:
            reached = socket.create_connection((here.host, here.port), timeout=max(1.0, end - time.monotonic()))
        except socket.gaierror:
            raise
        except OSError as error:
            if time.monotonic() > end:
                raise UsageError(
                    f"{here.endpoint}: cannot be reached within {wait_s:g} s ({error.strerror or error}): "
                    "expected the address of a node that was given the same command"
                ) from error
            time.sleep(RETRY_S)
        else:
            return _link(reached)


def _link(one: socket.socket) -> Connection:
    """A connection that fails when the other machine is gone, and when only half of a message comes."""
    one.settimeout(None)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", HALF_MESSAGE_S, 0))
    return Connection(one.detach())
