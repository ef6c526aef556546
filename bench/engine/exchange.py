"""What several ranks cost each other: the efficiency of a step, and where the rest of it goes."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.engine.metric import Found, Metric
from bench.gpus import MIB
from bench.results import Settings
from bench.strategies import unexchanged
from bench.subject import Subject

# Of what is measured in turns; where a step takes seconds, fewer, but always enough for a median.
ROUNDS = 6
FEWEST = 3


class Exchange(Metric):
    """Steps of one rank alone, of all at once without exchange, and as they are, in turns; after all other timing.

    What one more kind of step takes longer than the one before it has one cause: the ranks' use of the same machine,
    the slowest rank, the exchange that no arithmetic hides. The three shares and the efficiency add up to 1.
    """

    order = 80
    columns: ClassVar = {
        "backward_ms": "backward pass of a training step without exchange, ms: what an all-reduce can hide behind",
        "gradient_mib": "gradients of a training step on one device, MiB: what DistributedDataParallel all-reduces",
        "alone_ms": "of several ranks: a step of rank 0 without exchange while the others wait, ms",
        "compute_ms": "the same of all ranks at once, ms; in `ranks` that of each",
        "exchanged_ms": "the same with exchange, to the last rank, ms; measured in turns with the two",
        "scaling_efficiency": "alone_ms, for a rank's even share of the images, / exchanged_ms: 1 if nothing is lost",
        "lost_to_compute": "(mean compute_ms - that) / exchanged_ms: ranks share cores, caches, memory, power",
        "lost_to_imbalance": "(slowest rank's compute_ms - the mean) / exchanged_ms: the others wait for it",
        "lost_to_allreduce": "(exchanged_ms - slowest rank's compute_ms) / exchanged_ms: all-reduce that nothing hides",
        "allreduce_ms": "all-reduce of the gradients by itself, ms",
        "allreduce_gb_s": "2·(n - 1)/n · gradients / allreduce_ms: what each rank sends in a ring, GB/s",
        "data_ms": "of several ranks: all at once copy their images from host memory to their device, ms; in no step",
        "ranks_agree": "whether after all timed steps every parameter has the same bits on every rank (train)",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:
        """Check first that the ranks have stayed together; then let them go apart, and bring them together again."""
        found = _training(subject, subject.network, settings) if subject.network is not None else Found()
        # Statistics that ranks take together let none of them step alone.
        if subject.group.size > 1 and subject.case.batchnorm == "local":
            found |= _shares(subject, settings)
        if subject.network is not None:
            subject.restart()
        return found


def _rounds(round_s: float, settings: Settings, fewest: int = FEWEST) -> int:
    return max(fewest, min(ROUNDS, int(settings.measure_s / round_s)))


def _training(subject: Subject, network: nn.Module, settings: Settings) -> Found:
    start = time.perf_counter()
    backward = [_backward_ms(subject)]
    round_s = time.perf_counter() - start  # with the forward pass before it
    # Nothing is compared with it in turns: where it takes seconds, one is enough.
    backward += [_backward_ms(subject) for _ in range(1, _rounds(round_s, settings, fewest=1))]
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    found = Found(gradient_mib=sum(gradient.nbytes for gradient in gradients) / MIB, backward_ms=median(backward))
    if subject.group.size > 1:
        digests = subject.group.gather([_digest(parameter) for parameter in network.parameters()])
        found["ranks_agree"] = all(digest == digests[0] for digest in digests)
        if not found["ranks_agree"]:
            found.fault = "parameters are not the same on every rank after the same steps"
        found |= _all_reduce(subject, gradients)
    return found


def _backward_ms(subject: Subject) -> float:
    # Without exchange, the forward pass too: DistributedDataParallel decides there.
    with unexchanged(subject.shared, wanted=True):
        loss = subject.loss(subject.call)
        return _took_ms(subject, loss.backward)


def _digest(parameter: Tensor) -> int:
    """Of the bits: two sums that order and value both change."""
    bits = parameter.detach().flatten().contiguous().view(torch.int32).long()
    return int((bits * torch.arange(1, len(bits) + 1, device=bits.device)).sum())


def _all_reduce(subject: Subject, gradients: Sequence[Tensor]) -> Found:
    import torch.distributed as dist

    size = subject.group.size
    flat = torch.cat([gradient.flatten() for gradient in gradients]).zero_()
    took = []
    for _ in range(ROUNDS):
        subject.group.gather(None)
        took.append(max(subject.group.gather(_took_ms(subject, partial(dist.all_reduce, flat)))))
    ms = median(took)
    return Found(allreduce_ms=ms, allreduce_gb_s=2 * (size - 1) / size * flat.nbytes / ms / 1e6)


def _shares(subject: Subject, settings: Settings) -> Found:
    group = subject.group
    apart = partial(subject.step, exchange=False)
    # The first step after an exchange may still share BatchNorm's statistics; the next ones need nobody.
    apart()
    step_s = _took_ms(subject, apart) / 1000
    steps = group.agree(max(1, math.ceil(settings.measure_s / 2 / (3 * ROUNDS) / step_s)))
    # A round is three times so many, and the two between.
    rounds = group.agree(_rounds((3 * steps + 2) * step_s, settings))
    alone, compute, exchanged = [], [], []
    for _ in range(rounds):
        group.gather(None)
        if group.rank == 0:
            alone.append(_steps_ms(subject, apart, steps))
        group.gather(None)
        compute.append(_steps_ms(subject, apart, steps))
        subject.step()
        group.gather(None)
        exchanged.append(max(group.gather(_steps_ms(subject, subject.step, steps))))
        apart()
    everyone = group.gather(median(compute))
    alone_ms = group.agree(median(alone or [0.0]))
    exchanged_ms, slowest_ms, mean_ms = median(exchanged), max(everyone), mean(everyone)
    # Rank 0 has the largest share where they are uneven.
    even_ms = alone_ms * subject.case.joined_batch / group.size / len(subject.masks)
    return Found(
        alone_ms=alone_ms,
        compute_ms=everyone[group.rank],
        exchanged_ms=exchanged_ms,
        scaling_efficiency=even_ms / exchanged_ms,
        lost_to_compute=(mean_ms - even_ms) / exchanged_ms,
        lost_to_imbalance=(slowest_ms - mean_ms) / exchanged_ms,
        lost_to_allreduce=(exchanged_ms - slowest_ms) / exchanged_ms,
        data_ms=_data_ms(subject),
    )


def _data_ms(subject: Subject) -> float:
    images = subject.inputs[0]
    host = torch.empty_like(images, device="cpu", pin_memory=subject.case.on_gpu).copy_(images)
    there = torch.empty_like(images)
    took = []
    for _ in range(ROUNDS):
        subject.group.gather(None)
        took.append(_took_ms(subject, partial(there.copy_, host, non_blocking=True)))
    return median(took)


def _steps_ms(subject: Subject, step: Callable[[], object], count: int) -> float:
    def steps() -> None:
        for _ in range(count):
            step()

    return _took_ms(subject, steps) / count


def _took_ms(subject: Subject, act: Callable[[], object]) -> float:
    subject.synchronize()
    start = time.perf_counter()
    act()
    subject.synchronize()
    return (time.perf_counter() - start) * 1000
