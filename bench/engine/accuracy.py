"""Whether the fast result is still the result: every speed has its agreement with fp32 eager beside it."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bench.engine.metric import Found, Metric
from bench.precision import full_precision
from bench.results import Settings
from bench.subject import Subject

# An implementation may be this much further from fp32 than eager itself is at the same precision. Gradients of one step
# scatter more than logits: over six images and both upsamplings, bf16 gradients of torch.compile on a CPU were 0.78 to
# 1.58 times as far off as eager's.
MARGIN = {"infer": 1.5, "layer": 1.5, "train": 2.5}
# Two right fp32 evaluations differ by the order of their sums: logits by 1.6e-7, gradients by up to 1.1e-3 (seen). The
# floors lie above that and below what arithmetic of fewer bits would show.
FLOOR = {"infer": 1e-4, "layer": 1e-4, "train": 4e-3}
CLASS_AGREEMENT = 0.99
# Of the change that one step makes to BatchNorm's running statistics; a network that forgets to is off by all of it.
# Statistics kept in bf16 (8 bits) round most of a step away: there eager itself is the measure, as with gradients.
STATISTICS = 0.1
# Agreement on classes says something only about a network that can tell them apart.
MEANINGFUL_DICE = 0.9
# A checkpoint's network was fitted to something else; where it calls all of our picture one class, it agrees by itself.
LARGEST_CLASS = 0.99


class Accuracy(Metric):
    """Distance from eager in IEEE fp32 with the same fitted weights, on the same images; after all timing."""

    order = 90
    columns: ClassVar = {
        "rel_l2": "‖y − y₃₂‖₂ / ‖y₃₂‖₂ of the outputs (infer); its root mean square over the gradients (train)",
        "rel_l2_limit": "what rel_l2 may be: 1.5 times (train 2.5) that of eager at the same precision and frame, "
        "with a floor",
        "max_abs": "max |y − y₃₂| of logits (infer) or gradients (train)",
        "class_agreement": "share of pixels with the class that fp32 eager gives (infer)",
        "dice": "2·|A∩B| / (|A| + |B|) of the foreground, against fp32 eager's (infer)",
        "statistics_rel_l2": "error of BatchNorm's running statistics after one step, over their change in it (train)",
        "statistics_limit": "what that may be: 0.1, or 2.5 times what eager shows at the same precision",
        "loss_rel_error": "|loss − loss₃₂| / |loss₃₂| (train)",
        "fitted_dice": "Dice of the fitted weights on a part of the picture kept from the fit",
        "largest_class": "share of the pixels that fp32 eager gives its most frequent class (infer)",
        "agreement_meaningful": "whether fitted_dice is at least 0.9 and the head is the fitted one; of a checkpoint, "
        "whether largest_class is at most 0.99",
    }

    def measure(self, subject: Subject, settings: Settings) -> Found:  # noqa: ARG002 (nothing to set)
        """Compare one step, from the fitted weights, with eager in fp32 and with eager at the case's precision."""
        untouched = subject.untouched()
        subject.mirror()
        found = _inference(subject) if subject.network is None else _training(subject, subject.network)
        if subject.fitted_dice is not None:
            found["fitted_dice"] = subject.fitted_dice
        if subject.case.task != "layer":
            found["agreement_meaningful"] = _meaningful(subject, found)
        found.fault = _fault(found) if untouched else "the implementation wrote into its inputs"
        return found


def _meaningful(subject: Subject, found: Found) -> bool:
    if subject.fitted_dice is not None:
        return subject.fitted_dice >= MEANINGFUL_DICE and subject.case.modification != "head"
    largest = found.get("largest_class", 1.0)
    return isinstance(largest, float) and largest <= LARGEST_CLASS


def _fault(found: Found) -> str:
    rel_l2, limit, agreement = found["rel_l2"], found["rel_l2_limit"], found.get("class_agreement", 1.0)
    # Written so that a NaN is a fault, and an infinity is not within an infinite limit.
    if not (isinstance(rel_l2, float) and isinstance(limit, float) and rel_l2 <= limit and math.isfinite(rel_l2)):
        return f"relative L2 {rel_l2:.3g} against fp32 eager, limit {limit:.3g}"
    if not (isinstance(agreement, float) and agreement >= CLASS_AGREEMENT):
        return f"class agreement {agreement:.4f} with fp32 eager, limit {CLASS_AGREEMENT}"
    statistics, most = found.get("statistics_rel_l2", 0.0), found.get("statistics_limit", 0.0)
    if not (isinstance(statistics, float) and isinstance(most, float) and statistics <= most):
        return f"BatchNorm's running statistics are {statistics:.3g} of a step's change off, limit {most:.3g}"
    return ""


def _inference(subject: Subject) -> Found:
    outputs = _poisoned_forward(subject)
    with full_precision():
        reference = subject.forward(subject.eager("fp32"), "fp32", "whole")
    at_precision = _at_precision(subject, outputs, reference, lambda: subject.forward(subject.eager()))
    found = Found(
        rel_l2=rel_l2(outputs, reference),
        rel_l2_limit=_limit(subject, rel_l2(at_precision, reference)),
        max_abs=_max_abs(outputs, reference),
    )
    if subject.case.task == "layer":  # features are no classes
        return found
    classes, expected = _classes(outputs[0]), _classes(reference[0])
    both = ((classes == 1) & (expected == 1)).sum()
    total = (classes == 1).sum() + (expected == 1).sum()
    found["class_agreement"] = float((classes == expected).double().mean())
    found["dice"] = float(2 * both / total) if total else 1.0
    found["largest_class"] = float(expected.flatten().bincount().max() / expected.numel())
    return found


def _classes(logits: Tensor) -> Tensor:
    """The class of each pixel; a single logit says foreground where it is above 0."""
    return logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()


def _poisoned_forward(subject: Subject) -> tuple[Tensor, ...]:
    """A forward whose output memory held NaN before: what the implementation does not write cannot pass."""
    with torch.inference_mode():
        for output in subject.forward(subject.call):
            output.fill_(float("nan"))
    outputs = subject.forward(subject.call)
    subject.synchronize()
    return outputs


class _Step(NamedTuple):
    """What one training step found: loss, gradients, and BatchNorm's running statistics behind it."""

    loss: Tensor
    gradients: list[Tensor]
    statistics: Tensor


def _training(subject: Subject, network: nn.Module) -> Found:
    subject.restore()
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))
    own = _Step(*subject.gradients(subject.call, network), _statistics(network))
    with full_precision():
        eager = subject.eager("fp32")
        before = _statistics(eager)
        exact = _eager_step(subject, eager, "fp32")
    change = exact.statistics - before
    rough = _at_precision(subject, own, exact, lambda: _eager_step(subject, subject.eager(), subject.case.precision))

    def apart(step: _Step) -> float:
        return float((step.statistics - exact.statistics).norm() / change.norm())

    return Found(
        rel_l2=_each_rel_l2(own.gradients, exact.gradients),
        rel_l2_limit=_limit(subject, _each_rel_l2(rough.gradients, exact.gradients)),
        max_abs=_max_abs(own.gradients, exact.gradients),
        statistics_rel_l2=apart(own),
        statistics_limit=max(STATISTICS, MARGIN["train"] * apart(rough)),
        loss_rel_error=abs(float(own.loss) / float(exact.loss) - 1),
    )


def _eager_step(subject: Subject, eager: nn.Module, precision: str) -> _Step:
    """One step of eager, which runs alone on this rank: the mean over ranks is what DistributedDataParallel gives."""
    loss, gradients = subject.gradients(eager, eager, precision)
    subject.group.average(gradients)
    return _Step(loss, gradients, _statistics(eager))


def _statistics(network: nn.Module) -> Tensor:
    """Copies of the running means and variances, flat, fp32; counters left out."""
    return torch.cat([b.detach().flatten().float() for b in network.buffers() if b.is_floating_point()])


T = TypeVar("T")


def _at_precision(subject: Subject, found: T, reference: T, eager: Callable[[], T]) -> T:
    """What eager gives at the case's precision; computed only where it is not known already."""
    if subject.case.precision == "fp32" and subject.case.frame == "whole":
        return reference
    return found if subject.case.implementation == "eager" else eager()


def _max_abs(tensors: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(tensors, reference, strict=True))


def _limit(subject: Subject, eager: float) -> float:
    return max(MARGIN[subject.case.task] * eager, FLOOR[subject.case.task])


def rel_l2(tensors: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Over all tensors together, summed in fp64."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(tensors, reference, strict=True))
    size = sum(float(b.double().square().sum()) for b in reference)
    if not size:
        return 0.0 if not apart else float("inf")
    return float((apart / size) ** 0.5)


def _each_rel_l2(tensors: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Root mean square of the relative L2 of each tensor: a small layer counts as much as the one with the largest."""
    apart = [rel_l2([a], [b]) ** 2 for a, b in zip(tensors, reference, strict=True)]
    return float((sum(apart) / len(apart)) ** 0.5)
