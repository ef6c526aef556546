"""Whether a case makes sense on a machine: the one place that decides `unsupported`, without importing torch."""

from bench.case import Case
from bench.implementations import IMPLEMENTATIONS
from bench.machine import Machine
from bench.picture import SMALLEST

BEARABLE = 1_000_000
"""Pixels by channels squared of the first level that a CPU without 16-bit convolutions computes in about a second.

Seen on one without AVX-512: 272 s a forward pass for 256 · 256 pixels and 64 channels, which takes 0.86 s in fp32.
"""


def unsupported(case: Case, machine: Machine) -> str | None:
    """Why `case` cannot be measured on `machine`, or None if it can."""
    own = (_nodes, _gpu if case.on_gpu else _cpu, _precision, _image, _network, _layer, _frame, _strategy)
    needs = (*own, *IMPLEMENTATIONS[case.implementation].needs, _half)
    return next((why for need in needs if (why := need(case, machine))), None)


def _nodes(case: Case, machine: Machine) -> str | None:
    if case.processes % machine.nodes:
        what = "1 process" if case.processes == 1 else f"{case.processes} processes"
        return f"{what} cannot be shared out evenly among {machine.nodes} nodes"
    return None


def _gpu(case: Case, machine: Machine) -> str | None:
    if not machine.gpus:
        return "no CUDA device"
    if machine.torch_cuda is None:
        return f"torch {machine.torch_version} is built without CUDA"
    if case.device_count > len(machine.gpus) * machine.nodes:
        return f"{case.device_count} GPUs wanted, {len(machine.gpus)} here{_on_each(machine)}"
    return None


def _cpu(case: Case, machine: Machine) -> str | None:
    if case.precision == "tf32":
        return "TF32 is arithmetic of CUDA devices"
    if case.strategy == "dp":
        return "DataParallel on CPUs silently passes everything through: one network, one process"
    if case.processes > machine.cores * machine.nodes:
        return f"{case.processes} processes wanted, {machine.cores} CPU cores here{_on_each(machine)}"
    return None


def _on_each(machine: Machine) -> str:
    return f" and on each of {machine.nodes} nodes" if machine.nodes > 1 else ""


def _precision(case: Case, _: Machine) -> str | None:
    if case.task == "train" and case.precision == "fp16":
        return "AdamW's steps vanish in fp16 weights (they round to 11 bits): train with amp_fp16"
    return None


def _half(case: Case, machine: Machine) -> str | None:
    half = case.precision.removeprefix("amp_")
    if case.on_gpu or half == "fp32" or machine.cpu_half is None or half in machine.cpu_half:
        return None
    if case.batch * case.height * case.breadth * case.width**2 <= BEARABLE:
        return None
    return f"no {half} convolutions on this CPU: PyTorch's own loop is hundreds of times slower than fp32"


def _network(case: Case, _: Machine) -> str | None:
    if case.container != "unet" and (case.modification != "none" or case.activations != "kept"):
        return "changes and recomputation are of the class UNet, not of its other containers"
    if case.activations != "kept" and case.task != "train":
        return "inference keeps no activations"
    return None


def _layer(case: Case, _: Machine) -> str | None:
    if case.task != "layer":
        if case.layer != Case().layer:
            return f"layer {case.layer} is for the task layer"
        return "a cold cache is for the task layer: a network fills it by itself" if case.cache == "cold" else None
    if case.device_count > 1:
        return "a layer runs on one device"
    if case.container != "unet" or case.modification != "none":
        return "layers are named as the plain UNet names them"
    level = case.layer.partition("_")[0].lstrip("incdowup") or "0"
    return f"a network of depth {case.depth} has no layer {case.layer}" if int(level) > case.depth else None


def _frame(case: Case, _: Machine) -> str | None:
    if case.frame == "whole":
        return None
    if case.task != "infer" or case.modification != "none":
        return "padding and tiles are for inference of one map of logits from one image"
    if case.frame == "tiled" and IMPLEMENTATIONS[case.implementation].one_size:
        return "it takes one size, and tiles at the image's edges have others"
    return None


def _strategy(case: Case, _: Machine) -> str | None:  # noqa: PLR0911 (one line a reason)
    strategy, many = case.shared_by, case.device_count > 1
    if strategy == "single" and many:
        return f"one device wanted by strategy single, {case.device_count} by devices"
    if strategy != "single" and not many:
        return f"strategy {strategy} shares a step among several devices: there is one"
    if strategy == "ddp" and case.task != "train":
        return "DistributedDataParallel averages gradients, inference has none: replicas is its strategy"
    if strategy == "replicas" and case.task == "train":
        return "replicas exchange no gradients: ddp is the strategy of training"
    if strategy == "dp" and case.implementation != "eager":
        return "DataParallel makes new replicas of the network at every call, for PyTorch to run operation by operation"
    if case.accumulation > 1 and case.task != "train":
        return "inference has no gradients to accumulate"
    if case.batchnorm == "syncbn" and strategy != "ddp":
        return f"SyncBatchNorm synchronizes the ranks of ddp, not {strategy}"
    if case.batchnorm == "syncbn" and IMPLEMENTATIONS[case.implementation].rewrites:
        return f"the kernels of {case.implementation} take the statistics of one device"
    return None


def smallest_side(case: Case) -> int:
    """Fewest pixels a side that the network of a case can halve so often, and that a picture is cut to."""
    return max(SMALLEST, 1 << case.depth)


def image_too_small(case: Case) -> str | None:
    """Why the network cannot take images of the case's size, or None if it can."""
    smallest = smallest_side(case)
    if min(case.height, case.breadth) < smallest:
        return f"an image of {case.size} is too small for {case.depth} halvings: {smallest} pixels a side at least"
    return None


def _image(case: Case, _: Machine) -> str | None:
    if (why := image_too_small(case)) is not None:
        return why
    smallest = case.share(case.processes - 1)
    if smallest.start == smallest.stop:
        return f"{case.joined_batch} images cannot be shared among {case.processes} processes"
    if case.batchnorm == "syncbn":
        return None
    images = case.joined_batch // case.device_count
    if case.task == "train" and images * (case.height // 2**case.depth) * (case.breadth // 2**case.depth) == 1:
        return "BatchNorm cannot train on one value a channel: a larger image or batch"
    return None
