"""What a chart compares and what it holds fixed: the same case stands in several scenes, one a chart."""

from collections.abc import Collection, Mapping

import msgspec

from bench.case import AXES, Case

# Of one network on one device, what is tried to make it faster or smaller.
CONFIGURATION = ("container", "modification", "activations", "layout", "precision", "implementation")
# Chart → axes that vary in it. What is not named here is held, and a change of it makes another scene.
FREE: Mapping[str, Collection[str]] = {
    "ladder": CONFIGURATION,
    "upsampling": (*CONFIGURATION, "upsampling"),
    "devices": (*CONFIGURATION, "devices"),
    "front": (*CONFIGURATION, "upsampling"),
    "break_even": CONFIGURATION,
    "history": CONFIGURATION,
    "roofline": CONFIGURATION,
}


def scene(case: Case, chart: str) -> str:
    """What `chart` holds fixed for this case, as an id: `infer-transposed-b1-256x256-1cpu`."""
    return "-".join(AXES[name].part.format(getattr(case, name)) for name in _held(case, chart))


def title(case: Case, chart: str = "ladder") -> str:
    """The same in words: `infer · transposed · batch 1 · 256x256 · 1cpu`."""
    named = {name: f"{name} {{}}" for name in ("batch", "width", "depth", "threads", "accumulation")}
    return " · ".join(named.get(name, "{}").format(getattr(case, name)) for name in _held(case, chart))


def alone(case: Case) -> Case:
    """The case that one device of these runs: how several share a step and a batch is no question there."""
    device = f"1{case.devices[-3:]}"
    return msgspec.structs.replace(case, devices=device, strategy="auto", scaling="weak", batchnorm="local")


def rung(case: Case) -> str:
    """What the chart varies, as a label: `compile amp_bf16`, `eager fp32 nhwc`; what is as usual is not said."""
    changed = [str(getattr(case, name)) for name in reversed(CONFIGURATION[:4]) if case.changed(name)]
    return " ".join([case.implementation, case.precision, *changed])


def family(implementation: str) -> str:
    """The part of its name that a colour stands for: `compile_max_autotune` → `compile`."""
    return implementation.partition("_")[0]


def _held(case: Case, chart: str) -> list[str]:
    return [name for name, axis in AXES.items() if name not in FREE[chart] and (not axis.rare or case.changed(name))]
