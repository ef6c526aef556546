"""The steps of a campaign: each a command that anyone can give by hand, with the longest it may take."""

import importlib.util
from collections.abc import Mapping

import msgspec

from bench.machine import Machine, usable_gpus

LAYERS = tuple(
    f"{block}_{number}"
    for block in ("inc", *(f"{way}{level}" for way in ("down", "up") for level in range(1, 5)))
    for number in (1, 2)
)
# Short measurements of many cases: a campaign is there to see everything once.
RESUMED = ("-m", "pytest", "bench", "--resume", "--seed", "0", "--time-limit-s", "240")
BRIEF = ("--measure-s", "2", "--warmup-s", "0.5", "--warmup-extra-s", "2")
BRIEFER = ("--measure-s", "0.5", "--warmup-s", "0.2", "--warmup-extra-s", "0.5")
BF16 = {"precision": "bf16", "layout": "nhwc", "size": "512x512", "devices": "1gpu", "threads": "0"}
# What a CPU does in seconds: no figure, but the whole way.
TOY = {"precision": "fp32", "size": "32x32", "width": "4", "depth": "2", "threads": "1", "batch": "1"}
TOY |= {"upsampling": "transposed", "implementation": "eager,folded,triton"}
MOST_WORKERS = 8


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step.

    Args:
        name: as in `--steps`; its folder in DIR.
        what: it finds out.
        command: what follows `python`, given in the top folder of the project; `{out}` stands for DIR.
        limit_s: longest that one attempt may take.
        least_s: with less than that left it is not begun.
        gpu: whether it needs one.
        goes_on: whether the command, given again, goes on where it was stopped.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit_s: float = 520.0
    least_s: float = 45.0
    gpu: bool = True
    goes_on: bool = True


def steps(machine: Machine, *, toy: bool) -> tuple[Step, ...]:
    """All steps in the order in which they are worth their time: what is right first, then targets, tuning, rivals."""
    both = {"upsampling": "bilinear,transposed"}
    layer = {**BF16, "task": "layer", "layer": ",".join(LAYERS), "batch": "1,16", "upsampling": "transposed"}
    infer, train = {**BF16, "task": "infer", "batch": "1,16", **both}, {**BF16, "task": "train", "batch": "16", **both}
    rivals = "eager,folded_graph,cudnn_relu_graph,triton_graph,triton_fold_graph"
    compiled = "compile,compile_max_autotune"
    small = {**TOY, "devices": "1gpu" if usable_gpus(machine) else "1cpu"} if toy else {}

    def measured(name: str, what: str, axes: Mapping[str, str], *options: str, into: str = "") -> Step:
        given = {**axes, **small, **({"layer": "inc_2"} if toy and "layer" in axes else {})}
        words = [word for axis, values in given.items() for word in ("--axis", f"{axis}={values}")]
        pace = BRIEFER if toy or "layer" in axes else BRIEF
        command = (*RESUMED, *pace, "--results", f"{{out}}/{into or name}", *options, *words)
        return Step(name=name, what=what, command=command, gpu=not toy)

    return (
        Step(name="tests", what="every kernel right on this GPU", command=_tests(machine), limit_s=240, goes_on=False),
        Step(
            name="ceilings",
            what="best copy, best matrix product in each precision",
            command=("-m", "bench", "ceilings", "--json", "{out}/ceilings/ceilings.json"),
            limit_s=90,
            gpu=not toy,
            goes_on=False,
        ),
        measured("layers", "cuDNN layer by layer", {**layer, "implementation": "folded_graph,cudnn_relu_graph"}),
        Step(
            name="tune",
            what="launch settings of every layer",
            command=("-m", "bench", "tune", "--batch", "1,16", "--precision", "bf16"),
        ),
        # One run file: its table compares them.
        measured("network", "the fused network and its rivals", {**infer, "implementation": rivals}, "--ceilings"),
        measured(
            "training",
            "training steps",
            {**train, "implementation": "eager,compile,triton"},
            "--ceilings",
            into="network",
        ),
        measured("compiled", "torch.compile", {**infer, "implementation": compiled}, "--ceilings", into="network"),
        measured(
            "fused_layers", "our kernel layer by layer", {**layer, "implementation": "triton_graph"}, into="layers"
        ),
        measured("page", "the preset h200, as far as time goes", {}, "--preset", "smoke" if toy else "h200"),
    )


def _tests(machine: Machine) -> tuple[str, ...]:
    """Side by side where pytest-xdist is: compiling takes most of their time, and a lost context ends one worker."""
    workers: tuple[str, ...] = ()
    if importlib.util.find_spec("xdist"):
        workers = ("-n", str(min(machine.cores, MOST_WORKERS)), "--max-worker-restart", "1000")
    return ("-m", "pytest", "tests", "-m", "gpu", "-v", "--junitxml={out}/tests/tests.xml", *workers)
