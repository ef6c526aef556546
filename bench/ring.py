"""What training costs on more devices: all-reduces in a ring, behind the backward pass. A model, no measurement.

Known: one device's step and backward pass, and the bytes of its gradients. Stated: the interconnect. Left out: what
devices take from each other, ranks of unlike speed, loading of data (each makes the truth worse), and more rings than
one.
"""

import math
from collections.abc import Iterator

import msgspec

# Of DistributedDataParallel by default: the bucket that is ready first is small, so that the exchange begins early.
FIRST_BUCKET_MIB = 1.0
BUCKET_MIB = 25.0
MIB = 2**20


class Interconnect(msgspec.Struct, frozen=True, kw_only=True):
    """What joins the devices; of unlike links in the ring the slowest counts.

    Args:
        gb_per_s: what a device sends to the next, 10⁹ bytes a second, one direction.
        latency_us: from sending a message to the next device until it has come, µs, beside its bytes.
        overlap: whether exchange and backward pass run at the same time; on CPUs they want the same cores.
    """

    gb_per_s: float
    latency_us: float = 0.0
    overlap: bool = True


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A training step of one device, measured.

    Args:
        step_ms: median duration, ms.
        backward_ms: of its last backward pass, ms.
        gradient_mib: gradients of it, MiB.
        images: images of it.
    """

    step_ms: float
    backward_ms: float
    gradient_mib: float
    images: int


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """A step on `devices` devices, each with as many images as the one had (weak scaling).

    Args:
        devices: how many.
        step_ms: the step of one device and what is exposed, ms.
        images_per_s: of all devices together.
        efficiency: step of one device / this step.
        allreduce_ms: all-reduces of all buckets one after another, ms.
        exposed_ms: what of them is left when the backward pass is over, ms.
    """

    devices: int
    step_ms: float
    images_per_s: float
    efficiency: float
    allreduce_ms: float
    exposed_ms: float


def all_reduce_ms(mib: float, devices: int, interconnect: Interconnect) -> float:
    """2·(n - 1) messages of 1/n of the bytes, each latency + bytes / bandwidth, ms."""
    message_ms = interconnect.latency_us / 1e3 + mib * MIB / devices / interconnect.gb_per_s / 1e6
    return 2 * (devices - 1) * message_ms


def buckets(gradient_mib: float) -> Iterator[float]:
    """The gradients in the portions that are all-reduced, MiB, in the order they become ready."""
    first = min(FIRST_BUCKET_MIB, gradient_mib)
    yield first
    rest = gradient_mib - first
    for _ in range(math.ceil(rest / BUCKET_MIB)):
        yield min(BUCKET_MIB, rest)
        rest -= BUCKET_MIB


def predict(step: Step, devices: int, interconnect: Interconnect) -> Prediction:
    """The step on `devices` devices.

    Gradients become ready in proportion to their bytes; a bucket's all-reduce waits for it, and for the one before.
    """
    ready = 0.0 if interconnect.overlap else step.backward_ms
    over = total = 0.0
    for bucket in buckets(step.gradient_mib):
        if interconnect.overlap:
            ready += step.backward_ms * bucket / step.gradient_mib
        took = all_reduce_ms(bucket, devices, interconnect)
        over = max(over, ready) + took
        total += took
    # The last bucket is ready when the backward pass is over: nothing hides its all-reduce.
    exposed = max(0.0, over - step.backward_ms)
    step_ms = step.step_ms + exposed
    return Prediction(
        devices=devices,
        step_ms=step_ms,
        images_per_s=step.images * devices / step_ms * 1e3,
        efficiency=step.step_ms / step_ms,
        allreduce_ms=total,
        exposed_ms=exposed,
    )
