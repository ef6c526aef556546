"""Which cases a run consists of: presets sized for the machine, and what the options make of them."""

import random
from collections.abc import Callable, Mapping, Sequence

from bench.case import Case, CaseError, product, vary
from bench.machine import Machine, usable_gpus

IMPLEMENTATION = ("eager", "compile", "triton")
EITHER_UPSAMPLING = (
    *("eager", "eager_graph"),
    *("compile", "compile_reduce_overhead", "compile_max_autotune", "compile_freezing"),
    *("triton", "triton_graph"),
)
EVERY_IMPLEMENTATION = (*EITHER_UPSAMPLING, "triton_fold_graph")
UPSAMPLING = ("bilinear", "transposed")
SCALING = ("1gpu", "2gpu", "4gpu", "8gpu")


def smoke(machine: Machine) -> tuple[Case, ...]:
    """Two cases in seconds: that the whole way works."""
    devices = ("1gpu",) if usable_gpus(machine) else ("1cpu",)
    return product(task=("infer", "train"), width=(8,), size=("64x64",), devices=devices)


def quick(machine: Machine) -> tuple[Case, ...]:
    """The comparison at a glance, within 15 minutes on two cores."""
    return _quick_gpu() if usable_gpus(machine) else _quick_cpu()


def _quick_cpu() -> tuple[Case, ...]:
    matrix = product(
        task=("infer", "train"),
        upsampling=UPSAMPLING,
        precision=("fp32", "amp_bf16"),
        implementation=IMPLEMENTATION,
    )
    # A "device" is one core here: one process with one thread against two with one each. That is half of the machine,
    # and the second case takes some forty steps, alone, together and with exchange: with the pixels and parameters of
    # the others the pair would be a fifth of the run.
    scaling = product(
        task=("train",), upsampling=("bilinear",), threads=(1,), size=("128x128",), devices=("1cpu", "2cpu")
    )
    return matrix + scaling


def _quick_gpu() -> tuple[Case, ...]:
    # channels_last is what Tensor Cores read: the layout anyone who measures speed on them would choose.
    one: dict[str, Sequence[str | int]] = {"devices": ("1gpu",), "size": ("512x512",), "layout": ("nhwc",)}
    big: dict[str, Sequence[str | int]] = {**one, "batch": (16,)}
    return (
        product(
            task=("infer",),
            batch=(1, 16),
            upsampling=UPSAMPLING,
            precision=("amp_bf16",),
            implementation=IMPLEMENTATION,
            **one,
        )
        + product(task=("infer",), precision=("fp32", "tf32", "amp_fp16"), implementation=IMPLEMENTATION, **big)
        + product(task=("train",), upsampling=UPSAMPLING, precision=("amp_bf16",), implementation=IMPLEMENTATION, **big)
        + product(task=("train",), precision=("fp32", "tf32", "amp_fp16"), implementation=IMPLEMENTATION, **big)
        + product(task=("train",), precision=("amp_bf16",), **{**big, "devices": ("2gpu",)})
    )


def full(machine: Machine) -> tuple[Case, ...]:
    """Every axis in all its values, most of them in every combination; hours rather than minutes."""
    gpu = bool(usable_gpus(machine))
    here: dict[str, Sequence[str | int]] = {"devices": ("1gpu",) if gpu else ("1cpu",)}
    sizes: dict[str, Sequence[str | int]] = {"size": ("256x256", "512x512"), "batch": (1, 16) if gpu else (1, 4)}
    exact = ("fp32", "tf32") if gpu else ("fp32",)
    matrix = product(
        task=("infer", "train"),
        upsampling=UPSAMPLING,
        precision=(*exact, "amp_bf16", "amp_fp16") if gpu else (*exact, "amp_bf16"),
        layout=("nchw", "nhwc"),
        implementation=IMPLEMENTATION,
        **here,
        **sizes,
    )
    pure = product(
        task=("infer", "train"),
        precision=("bf16", "fp16") if gpu else ("bf16",),
        implementation=IMPLEMENTATION,
        layout=("nhwc",),
        **here,
        **sizes,
    )
    others = product(
        task=("infer",),
        precision=("fp32", "amp_bf16"),
        implementation=tuple(name for name in EVERY_IMPLEMENTATION if name not in IMPLEMENTATION),
        layout=("nhwc",),
        **here,
        **sizes,
    )
    layers = product(
        task=("layer",),
        layer=("inc_2", "down2_2", "down4_2", "up1_1", "up4_1"),
        implementation=IMPLEMENTATION,
        precision=("fp32", "bf16"),
        layout=("nhwc",),
        cache=("warm", "cold"),
        **here,
    )
    scaling = product(
        task=("train",),
        implementation=("eager", "compile"),
        precision=("fp32", "amp_bf16"),
        threads=(0,) if gpu else (1,),
        devices=("1gpu", "2gpu") if gpu else ("1cpu", "2cpu"),
    )
    return tuple(dict.fromkeys(matrix + pure + others + layers + scaling))


def h200(_: Machine) -> tuple[Case, ...]:
    """Everything that a 141 GB GPU is bought for: each implementation in its best layout, over batches and sizes.

    About 250 cases. On another machine they are `unsupported`, or what its memory says.
    """
    one: dict[str, Sequence[str | int]] = {"devices": ("1gpu",), "layout": ("nhwc",), "size": ("512x512",)}
    often: dict[str, Sequence[str | int]] = {
        "task": ("infer",),
        "precision": ("amp_bf16", "bf16"),
        "batch": (1, 16, 64),
    }
    infer = product(upsampling=UPSAMPLING, implementation=EITHER_UPSAMPLING, **often, **one)
    infer += product(implementation=("triton_fold_graph",), **often, **one)
    exact = product(
        task=("infer",), implementation=EVERY_IMPLEMENTATION, precision=("fp32", "tf32", "fp16"), batch=(16,), **one
    )
    large = product(
        task=("infer",),
        implementation=("eager", "compile", "triton_graph"),
        precision=("bf16",),
        batch=(1, 4),
        **{**one, "size": ("1024x1024", "2048x2048")},
    )
    train = product(
        task=("train",),
        upsampling=UPSAMPLING,
        implementation=("eager", "compile", "compile_max_autotune"),
        precision=("fp32", "tf32", "amp_bf16", "bf16"),
        batch=(16, 64),
        **one,
    )
    lean = product(task=("train",), precision=("amp_bf16",), activations=("recomputed",), batch=(16, 64), **one)
    layers = product(
        task=("layer",),
        implementation=("eager", "compile_freezing", "triton"),
        precision=("bf16",),
        layer=("inc_1", "inc_2", "down1_2", "down2_2", "down3_2", "down4_2", "up1_1", "up2_1", "up3_1", "up4_1"),
        batch=(16,),
        cache=("warm", "cold"),
        **one,
    )
    sustained = product(
        task=("infer", "train"), precision=("amp_bf16",), batch=(64,), regime=("burst", "sustained"), **one
    )
    scaling = product(task=("train",), precision=("amp_bf16",), batch=(16,), **{**one, "devices": SCALING})
    return tuple(dict.fromkeys(infer + exact + large + train + lean + layers + sustained + scaling))


def ci(machine: Machine) -> tuple[Case, ...]:
    """What the gate times, base against head: small cases, within ten minutes in all on two cores."""
    if usable_gpus(machine):
        one: dict[str, Sequence[str | int]] = {"devices": ("1gpu",), "layout": ("nhwc",), "precision": ("amp_bf16",)}
        return product(
            task=("infer",), batch=(1, 8), upsampling=UPSAMPLING, implementation=("eager", "triton"), **one
        ) + product(task=("infer", "train"), batch=(8,), implementation=("compile",), **one)
    # One thread: two that wait for each other stand still for seconds where others use the cores too.
    small: dict[str, Sequence[str | int]] = {"threads": (1,), "width": (16,), "depth": (3,), "size": ("96x96",)}
    return (
        product(task=("infer", "train"), upsampling=UPSAMPLING, **small)
        + product(task=("infer",), precision=("amp_bf16",), **small)
        + product(task=("infer",), layout=("nhwc",), **small)
        # Two levels: compiling deeper ones takes minutes, and the graph's kernels are the same ones more often.
        + product(task=("infer", "train"), implementation=("compile",), **{**small, "depth": (2,)})
    )


PRESETS: Mapping[str, Callable[[Machine], tuple[Case, ...]]] = {
    "smoke": smoke,
    "quick": quick,
    "full": full,
    "ci": ci,
    "h200": h200,
}


def cases_of(preset: str) -> Callable[[Machine], tuple[Case, ...]]:
    """From a machine to the cases of a preset.

    Raises:
        CaseError: there is no such preset.
    """
    if preset not in PRESETS:
        raise CaseError(f"unknown preset {preset!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[preset]


def shuffled(cases: Sequence[Case], seed: int) -> tuple[Case, ...]:
    """The cases in an order drawn at random: what warms up, ages or competes meanwhile meets all of them alike."""
    mixed = list(cases)
    random.Random(seed).shuffle(mixed)  # noqa: S311 (an order, not a secret)
    return tuple(mixed)


def cases(
    machine: Machine,
    *,
    preset: str = "quick",
    axes: Mapping[str, Sequence[str | int]] | None = None,
    chosen: Sequence[Case] = (),
) -> tuple[Case, ...]:
    """The cases of a run: those `chosen`, or else the preset's, each at every combination of `axes`.

    Raises:
        CaseError: an unknown preset.
    """
    return vary(chosen or cases_of(preset)(machine), completed(axes or {}, machine))


def completed(axes: Mapping[str, Sequence[str | int]], machine: Machine) -> Mapping[str, Sequence[str | int]]:
    """The settings with their kind of devices: plain numbers are GPUs where torch can drive one, otherwise CPUs."""
    if "devices" not in axes:
        return axes
    kind = "gpu" if usable_gpus(machine) else "cpu"
    return {**axes, "devices": [f"{count}{kind}" if str(count).isdigit() else count for count in axes["devices"]]}
