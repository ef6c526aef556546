"""How machines find each other, agree and stay in step, each played by a thread."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from bench.engine.protocol import Outcome
from bench.errors import UsageError
from bench.meeting import LONGEST_HELLO, Place, _is_mine, place
from bench.peers import Peers
from bench.results import Header
from bench.terms import Terms, agree, terms
from bench.verdict import Part, joint

from .conftest import MACHINE
from .nodes import TORCHRUN, endpoint, two_ranks


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sources is cccccccccccc on rank 1", {"source_hash": "c" * 64}),
        ("torch is 2.11.0 on rank 1", {"machine": msgspec.structs.replace(MACHINE, torch_version="2.11.0")}),
        ("number of nodes is 3 on rank 1", {"machine": msgspec.structs.replace(MACHINE, nodes=3)}),
        ("--rank-timeout-s is 7.0 on rank 1", {"rank_timeout_s": 7.0}),
        ("--resume is True on rank 1", {"--resume": True}),
        ("cases is 0 in an order of hash", {"cases": ()}),
    ],
)
def test_what_differs_between_nodes_is_named_on_all_of_them(header: Header, name: str, changes: dict[str, Any]) -> None:
    def said(**other: Any) -> Terms:  # noqa: ANN401 (fields of several structs)
        environment, settings = (
            msgspec.structs.replace(one, **{key: other[key] for key in other if key in one.__struct_fields__})
            for one in (header.environment, header.settings)
        )
        return terms(environment, settings, other.get("cases", (two_ranks(),)), {"--resume": "--resume" in other})

    refusals: list[str] = []

    def check(one: Peers) -> None:
        try:
            agree(one, said(**(changes if one.number else {})), 60)
        except UsageError as error:
            refusals.append(str(error))

    with together(2) as peers:
        in_threads(check, peers)
    assert len(set(refusals)) == 1
    assert len(refusals) == 2
    assert refusals[0].startswith(name)


def test_an_endpoint_that_cannot_be_reached_is_named() -> None:
    with endpoint() as where:  # bound, and nobody listens
        here = Place(count=2, host="127.0.0.1", port=int(where.split(":")[1]), number=1)
        with pytest.raises(UsageError, match=f"--rdzv-endpoint {where}: cannot be reached within 0.3 s .*refused"):
            Peers(here).meet(0.3)


def test_a_host_that_is_none_is_named() -> None:
    none = "x" * 64  # longer than any part of a name: no server need be asked
    with pytest.raises(UsageError, match=f"--rdzv-endpoint {none}:29400: .*: expected the address of a node"):
        Peers(Place(count=2, host=none, port=29400)).meet(1)


class Thing(msgspec.Struct, frozen=True):
    value: int


@contextlib.contextmanager
def together(count: int, *strange: bytes, leave: bool = False, wait_s: float = 60) -> Iterator[list[Peers]]:
    """Peers that have met, in order; each in a thread while they did, and after strangers have knocked, or left."""
    with endpoint() as where:
        host, _, port = where.partition(":")
        peers = [Peers(Place(count=count, host=host, port=int(port), number=number)) for number in range(count)]
        threads = [threading.Thread(target=one.meet, args=(wait_s,)) for one in peers]
        threads[0].start()
        with contextlib.ExitStack() as strangers:
            for said in strange:
                strangers.enter_context(_knocking(host, int(port))).sendall(said)
            if leave:
                strangers.close()
            for thread in threads[1:]:
                thread.start()
            for thread in threads:
                thread.join()
        try:
            yield peers
        finally:
            for one in peers:
                one.leave()


def _knocking(host: str, port: int) -> socket.socket:
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, port))
        time.sleep(0.01)


def all_gather(peers: list[Peers]) -> list[list[Thing | None]]:
    told: list[list[Thing | None]] = [[] for _ in peers]

    def gather(one: Peers) -> None:
        told[one.number] = one.gather(Thing(one.number), 60)

    in_threads(gather, peers)
    return told


def in_threads(act: Callable[[Peers], None], peers: list[Peers]) -> None:
    threads = [threading.Thread(target=act, args=(one,)) for one in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("strange", [(), (b"GET / HTTP/1.1\r\n\r\n",), (b"nope\n",), (b"4\n",)])
def test_each_hears_what_all_have_in_order_and_strangers_are_not_counted(strange: tuple[bytes, ...]) -> None:
    with together(3, *strange) as peers:
        for _ in range(3):
            assert all_gather(peers) == [[Thing(0), Thing(1), Thing(2)]] * 3


def test_what_one_has_to_say_may_be_long() -> None:
    class Long(msgspec.Struct, frozen=True):
        value: str

    told: list[object] = []
    with together(2) as peers:
        in_threads(lambda one: told.append(one.gather(Long("x" * 10_000_000), 60)), peers)
    assert told == [[Long("x" * 10_000_000)] * 2] * 2


def test_strangers_who_say_half_a_hello_hold_nobody_up() -> None:
    # To wait ten seconds for the rest of each would be longer than nodes wait for each other here.
    with together(3, b'{"name":', b'{"name":"half', wait_s=15) as peers:
        assert peers[0].met.names == peers[2].met.names
        assert "half" not in peers[0].met.names


def test_a_stranger_who_never_comes_to_an_end_is_shown_out() -> None:
    with endpoint() as where:
        peers = [Peers(place(2, where, {})) for _ in range(2)]
        first = threading.Thread(target=peers[0].meet, args=(60,))
        first.start()
        with _knocking("127.0.0.1", peers[0].place.port) as stranger:
            stranger.sendall(b"x" * LONGEST_HELLO)
            stranger.settimeout(20)
            assert stranger.recv(1) == b""
        peers[1].meet(60)
        first.join()
        for one in peers:
            one.leave()


def test_who_leaves_before_all_have_come_is_not_counted() -> None:
    with together(3, b'{"name":"gone","number":1}\n', leave=True) as peers:
        assert "gone" not in peers[0].met.names
        assert all_gather(peers) == [[Thing(0), Thing(1), Thing(2)]] * 3


@pytest.mark.skipif(not _is_mine(socket.AF_INET6, "::1"), reason="no IPv6 here")
def test_a_node_that_knows_only_the_old_protocol_comes_to_one_that_listens_by_the_new() -> None:
    with endpoint() as where:
        port = int(where.split(":")[1])
        hosts = enumerate(["::1", "127.0.0.1"])
        peers = [Peers(Place(count=2, host=host, port=port, number=number)) for number, host in hosts]
        in_threads(lambda one: one.meet(10), peers)
        assert all_gather(peers) == [[Thing(0), Thing(1)]] * 2
        for one in peers:
            one.leave()


def test_the_port_of_the_ranks_is_given_to_nobody_and_ranks_can_listen_there_case_after_case() -> None:
    with together(2) as peers:
        port = peers[0].met.ranks_port
        assert peers[1].met.ranks_port == port
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        for _ in range(2):
            with socket.create_server(("", port)), socket.create_connection(("127.0.0.1", port)):
                pass


def test_a_machine_that_vanished_without_a_word_is_missed_within_minutes() -> None:
    with together(2) as peers:
        for link in (*peers[0].met.links.values(), *peers[1].met.links.values()):
            with socket.socket(fileno=os.dup(link.fileno())) as one:
                assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle, each, probes = (
                    one.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert idle + each * probes <= 180


@pytest.mark.parametrize(
    "said", [b"\xff" * 12, b"\xff\xff\xff\xff\x40" + b"\0" * 7, b"SSH-2.0-OpenSSH\r\n", b'\0\0\0\7{"a":1}', b""]
)
def test_what_listens_there_and_is_no_node_is_refused_at_once_whatever_it_says(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer() -> None:
            with other.accept()[0] as knocked:
                knocked.recv(100)
                knocked.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UsageError, match=f":{port}: what listens there has not made this one of its 2"):
            Peers(Place(count=2, host="127.0.0.1", port=port, number=1)).meet(60)
        thread.join()


def test_half_a_welcome_is_not_waited_for_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.meeting.HALF_MESSAGE_S", 1)
    refused, in_time = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            with other.accept()[0] as knocked:
                knocked.sendall(b'\0\0\0\x40{"number"')
                in_time.append(refused.wait(20))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UsageError, match="what listens there has not made this one of its 2"):
            Peers(Place(count=2, host="127.0.0.1", port=other.getsockname()[1], number=1)).meet(60)
        refused.set()
        thread.join()
    assert in_time == [True]


def test_more_nodes_than_can_ever_queue_are_waited_for() -> None:
    with endpoint() as where, pytest.raises(UsageError, match="1 of 99999999999 came to "):
        Peers(place(99_999_999_999, where, {})).meet(0.1)


def test_an_address_of_a_kind_that_the_kernel_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(family, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)) for family in (socket.AF_IRDA, socket.AF_INET)]
    with endpoint() as where:
        here = place(2, where, {})
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: kinds)
        with pytest.raises(UsageError, match="1 of 2 came to "):
            Peers(here).meet(0.1)


def test_who_has_left_is_missed_by_all_and_waited_for_by_none() -> None:
    with together(3) as peers:
        peers.pop().leave()
        for _ in range(2):
            assert all_gather(peers) == [[Thing(0), Thing(1), None]] * 2


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failed_part_is_known_to_all_before_they_are_asked_and_forgotten_after(failing: int) -> None:
    with together(3) as peers:
        peers[failing].alarm()
        end = time.monotonic() + 60
        others = [one for one in peers if one.number != failing]
        while not all(one._is_alarmed() for one in others):
            assert time.monotonic() < end
        assert all_gather(peers) == [[Thing(0), Thing(1), Thing(2)]] * 3
        assert not any(one._is_alarmed() for one in peers)


def test_of_several_failures_a_first_hand_one_counts_wherever_it_is_told() -> None:
    second = Outcome(status="timeout", reason="rank 3 does not answer", secondhand=True)
    first = Outcome(status="oom", reason="rank 3: too much")
    fine = Outcome(status="ok")
    for parts in ([second, first], [first, second], [None, first], [fine, second, first]):
        told = joint([Part(outcome=one) for one in parts], ["node"] * len(parts))
        assert told == first
    assert joint([Part(outcome=fine), Part()], ["node 0", "node 1"]) == fine
    assert joint([Part(), Part()], ["node 0", "node 1"]) is None
    gone = joint([Part(outcome=second), None], ["node 0 (a)", "node 1 (b)"])
    assert gone is not None
    assert (gone.status, gone.reason) == ("crash", "node 1 (b) has left the run")


def test_a_place_is_read_from_options_or_from_what_torchrun_has_set() -> None:
    assert place(1, "", {}) == Place()
    assert place(1, "", {**TORCHRUN, "WORLD_SIZE": "1"}) == Place()
    assert place(2, "gpu-0:29400", {}) == Place(count=2, nodes=2, host="gpu-0", port=29400)
    assert place(2, "[fd00::1]:29400", {}).host == "fd00::1"
    here = place(1, "", TORCHRUN)
    assert here == Place(count=16, nodes=2, host="gpu-0", port=29501, number=11, local=3)
    assert place(1, "gpu-0:4000", TORCHRUN).port == 4000


@pytest.mark.parametrize(
    ("nodes", "where", "variables", "told"),
    [
        (2, "", {}, "--nodes 2 --rdzv-endpoint (none): expected both"),
        (1, "gpu-0:1", {}, "--nodes 1 --rdzv-endpoint gpu-0:1: expected both"),
        (2, "gpu-0", {}, "--rdzv-endpoint gpu-0: expected HOST:PORT"),
        (2, "gpu-0:66000", {}, "--rdzv-endpoint gpu-0:66000: expected HOST:PORT"),
        (2, ":29400", {}, "--rdzv-endpoint :29400: expected HOST:PORT"),
        (2, "gpu-0:1", TORCHRUN, "--nodes 2: torchrun has started this and says how many there are"),
    ],
)
def test_a_place_that_cannot_be_is_refused(nodes: int, where: str, variables: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        place(nodes, where, variables)
    assert str(refused.value).startswith(told)
