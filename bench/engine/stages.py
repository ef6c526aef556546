"""Where the time of a forward pass goes: the network's blocks one by one."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from bench.engine.counting import gbyte, gflop
from bench.engine.metric import Found, Metric
from bench.readings import Stage
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.results import Settings
    from bench.subject import Subject

SECONDS = 2.0
FEWEST = 3


class Stages(Metric):
    """Each block's share of eager inference, between hooks at its beginning and its end. Asked for by `--stages`.

    Of the plain UNet run by eager alone: a compiled or fused network has no such blocks any more.
    """

    order = 70
    columns: ClassVar = {}

    def measure(self, subject: Subject, settings: Settings) -> Found:
        """Time the blocks in passes of their own, for two seconds and at least three times."""
        network, case = subject.call, subject.case
        if not (settings.stages and case.task == "infer" and isinstance(network, UNet)):
            return Found()
        blocks = dict(network.named_children())
        marks = _Marks(subject.device)
        hooks = [hook for name, block in blocks.items() for hook in marks.put(name, block)]
        end = time.perf_counter() + SECONDS
        passes: list[dict[str, float]] = []
        while time.perf_counter() < end or len(passes) < FEWEST:
            subject.step()
            subject.synchronize()
            passes.append(marks.durations_ms())
        for hook in hooks:
            hook.remove()
        work = dict(_work(subject.eager(), subject.inputs, case.precision))
        found = Found()
        found.stages = tuple(
            Stage(name=name, ms=median(one[name] for one in passes), gflop=work[name][0], gbyte=work[name][1])
            for name in blocks
        )
        return found


class _Marks:
    """Moments at which blocks begin and end, on the clock of the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._moments: dict[str, list[Any]] = {}

    def put(self, name: str, block: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Mark every call of `block`."""
        yield block.register_forward_pre_hook(lambda *_: self._moments.__setitem__(name, [self._now()]))
        yield block.register_forward_hook(lambda *_: self._moments[name].append(self._now()))

    def durations_ms(self) -> dict[str, float]:
        """What each block took in the last pass; the device has done all of it."""
        if self._cuda:
            return {name: begin.elapsed_time(end) for name, (begin, end) in self._moments.items()}
        return {name: (end - begin) * 1000 for name, (begin, end) in self._moments.items()}

    def _now(self) -> Any:  # noqa: ANN401 (an event, or seconds)
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _work(network: nn.Module, inputs: Sequence[Tensor], precision: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """Operations and bytes of each block, 10⁹, for what comes into it."""
    came: dict[str, tuple[Tensor, ...]] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda _module, given: came.__setitem__(name, given)

    network.to("meta")
    hooks = [block.register_forward_pre_hook(remember(name)) for name, block in network.named_children()]
    with torch.no_grad():
        network(*(torch.empty_like(tensor, device="meta") for tensor in inputs))
    for hook in hooks:
        hook.remove()
    for name, block in network.named_children():
        given = came[name]

        def run(block: nn.Module = block, given: tuple[Tensor, ...] = given) -> None:
            with torch.no_grad():
                block(*given)

        yield name, (gflop(run), gbyte(block, given, precision))
