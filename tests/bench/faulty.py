"""Implementations that misbehave, for `--load`: each fault happens for real, in the process of a case.

The parent loads this module too, and imports no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench.implementations import implementation

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from bench.case import Case

# A machine whose cache holds another fit: the module is loaded before the weights are.
if os.environ.get("RANK") == "1" and (cache := os.environ.get("CACHE_OF_RANK_1")):
    os.environ["UNET_BENCH_CACHE"] = cache


def _from_second_call(model: nn.Module, fault: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    calls = 0

    def call(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            fault()
        logits: Tensor = model(images)
        return logits

    return call


@implementation("killed")
def killed(model: nn.Module, _: Case) -> Callable[..., Any]:
    return _from_second_call(model, lambda: os.kill(os.getpid(), signal.SIGKILL))


@implementation("hangs")
def hangs(model: nn.Module, _: Case) -> Callable[..., Any]:
    def hang() -> None:
        if "HELPER_PID" in os.environ:
            # A helper that has left the process group, ignores SIGTERM and would outlive a careless parent.
            code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
            helper = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
            Path(os.environ["HELPER_PID"]).write_text(str(helper.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)

    return _from_second_call(model, hang)


@implementation("greedy")
def greedy(model: nn.Module, _: Case) -> Callable[..., Any]:
    import torch

    return _from_second_call(model, lambda: torch.empty(2**50, dtype=torch.uint8))


@implementation("fills")
def fills(model: nn.Module, _: Case) -> Callable[..., Any]:
    import torch

    hoard: list[Tensor] = []
    # Each allocation is small and succeeds; together they pass the memory of the machine.
    return _from_second_call(model, lambda: [hoard.append(torch.ones(2**28, dtype=torch.uint8)) for _ in range(10**6)])


@implementation("breaks")
def breaks(model: nn.Module, _: Case) -> Callable[..., Any]:
    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access; we ran out of patience, not of memory")

    return _from_second_call(model, fault)


@implementation("chatty")
def chatty(model: nn.Module, _: Case) -> Callable[..., Any]:
    def chat() -> None:
        os.write(1, b'{"status": "ok", "figures": {}}\n\xff\xfe garbage on standard output\n')
        os.write(2, b"\x00\x1b[31m garbage on standard error\n")

    return _from_second_call(model, chat)


@implementation("unwritten")
def unwritten(model: nn.Module, _: Case) -> Callable[..., Any]:
    """Right once; later calls give the same memory back without writing it."""
    kept: list[Tensor] = []

    def call(images: Tensor) -> Tensor:
        if not kept:
            kept.append(model(images))
        return kept[0]

    return call


@implementation("wrong")
def wrong(model: nn.Module, _: Case) -> Callable[..., Any]:
    return lambda images: model(images) * 1.01


@implementation("wrong_gradient")
def wrong_gradient(model: nn.Module, _: Case) -> Callable[..., Any]:
    """Right outputs, a backward pass that is 1 % off."""

    def call(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        return logits + 0.01 * (logits - logits.detach())

    return call


@implementation("remembers")
def remembers(model: nn.Module, _: Case) -> Callable[..., Any]:
    """Knows an image by its address and gives the answer from before, copied."""
    answers: dict[int, Tensor] = {}

    def call(images: Tensor) -> Tensor:
        if images.data_ptr() not in answers:
            answers[images.data_ptr()] = model(images)
        return answers[images.data_ptr()].clone()

    return call


@implementation("writes_input")
def writes_input(model: nn.Module, _: Case) -> Callable[..., Any]:
    def call(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        images.zero_()
        return logits

    return call


@implementation("forgets_statistics")
def forgets_statistics(model: nn.Module, _: Case) -> Callable[..., Any]:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    return model


@implementation("one_rank_killed")
def one_rank_killed(model: nn.Module, _: Case) -> Callable[..., Any]:
    rank = int(os.environ.get("RANK", "0"))
    return _from_second_call(model, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(0.5))


@implementation("overflows")
def overflows(model: nn.Module, _: Case) -> Callable[..., Any]:
    """Gradients that pass the largest fp16 number at GradScaler's first scale."""
    import torch

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:  # noqa: ANN401
            return x.clone()

        @staticmethod
        def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
            return torch.where(gradient.abs().max() * 4 > 1, gradient * float("inf"), gradient)

    return lambda images: Steep.apply(model(images))


@implementation("sleeps")
def sleeps(_: nn.Module, case: Case) -> Callable[..., Any]:
    """Nothing but a sleep of 20 ms: what a parent costs while a child works, and what a case costs beyond its steps."""
    import torch

    logits = torch.zeros(case.batch, 2, case.height, case.breadth)

    def call(_: Tensor) -> Tensor:
        time.sleep(0.02)
        return logits

    return call


def _on_rank_1(fault: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: fault() if os.environ.get("RANK") == "1" else None


@implementation("one_rank_raises")
def one_rank_raises(model: nn.Module, _: Case) -> Callable[..., Any]:
    def fault() -> None:
        raise ValueError("this rank has had enough")

    return _from_second_call(model, _on_rank_1(fault))


@implementation("one_rank_hangs")
def one_rank_hangs(model: nn.Module, _: Case) -> Callable[..., Any]:
    return _from_second_call(model, _on_rank_1(lambda: time.sleep(1000)))


@implementation("one_rank_greedy")
def one_rank_greedy(model: nn.Module, _: Case) -> Callable[..., Any]:
    import torch

    return _from_second_call(model, _on_rank_1(lambda: torch.empty(2**50, dtype=torch.uint8)))


@implementation("one_rank_absent")
def one_rank_absent(model: nn.Module, _: Case) -> Callable[..., Any]:
    return model


_request = Path(sys.argv[-1], "request.json")
if os.environ.get("RANK") == "1" and _request.exists() and b"one_rank_absent" in _request.read_bytes():
    time.sleep(1000)  # while modules are loaded: no group has been joined yet


@implementation("one_rank_cut_off")
def one_rank_cut_off(model: nn.Module, _: Case) -> Callable[..., Any]:
    """Rank 1 loses the other, waits until that has told of it, and only then says what was wrong."""

    def fault() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which the other's report brings
        for connection in psutil.Process().net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port != int(os.environ["MASTER_PORT"]):
                with socket.socket(fileno=os.dup(connection.fd)) as one:
                    one.shutdown(socket.SHUT_RDWR)
        while not Path(sys.argv[1], "outcome.0.json").exists():
            time.sleep(0.05)
        raise ValueError("somebody pulled the cable")

    return _from_second_call(model, _on_rank_1(fault))


@implementation("one_rank_raises_once")
def one_rank_raises_once(model: nn.Module, _: Case) -> Callable[..., Any]:
    """It would be `ok` if it were tried again."""

    def fault() -> None:
        before = Path(sys.argv[1], "raised")
        if not before.exists():
            before.touch()
            raise ValueError("not the first time")

    return _from_second_call(model, _on_rank_1(fault))


@implementation("agent_killed")
def agent_killed(model: nn.Module, _: Case) -> Callable[..., Any]:
    return _from_second_call(model, _on_rank_1(lambda: os.kill(os.getppid(), signal.SIGKILL)))


@implementation("sets_clock_back")
def sets_clock_back(model: nn.Module, _: Case) -> Callable[..., Any]:
    """As an NTP daemon does, for all that asks this process's wall clock."""
    clock, hours = time.time, iter(range(10**9))
    return _from_second_call(model, lambda: setattr(time, "time", lambda: clock() - 3600 * next(hours)))


@implementation("writes_half")
def writes_half(model: nn.Module, _: Case) -> Callable[..., Any]:
    def fault() -> None:
        folder = Path(sys.argv[1])
        (folder / "outcome.0.json").write_bytes(b'{"status": "ok", "figures": {"p50_ms": 0.0')
        os._exit(0)

    return _from_second_call(model, fault)


@implementation("counts_torchruns")
def counts_torchruns(model: nn.Module, _: Case) -> Callable[..., Any]:
    """Fails where one torchrun stands above another."""
    above = [" ".join(process.cmdline()) for process in psutil.Process().parents()]
    if sum("torch.distributed.run" in words or "bench.distributed" in words for words in above) > 1:
        raise RuntimeError("launched again")
    return model
