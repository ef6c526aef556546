"""A case is one point of the matrix. Every axis is declared here, once: flag, id and column follow from the field."""

import itertools
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from bench import runtimes  # noqa: F401 (its engines register themselves as implementations)
from bench.errors import UsageError
from bench.implementations import IMPLEMENTATIONS


class CaseError(UsageError):
    """An axis, a value or an id that does not exist: one line with what was given and what is allowed."""


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """How a field of `Case` shows outside.

    Args:
        help: what the axis varies, for `--help` and the results' schema.
        part: the field's part of the id; `{}` stands for the value.
        rare: left out of the id at its default, so that a new axis renames no old case.
        allowed: the values, where the field's type does not list them.
        expects: what a value is, in words, where there is no list.
        short: form of a setting that a machine completes (`matrix.cases`), where there is one.
    """

    help: str
    part: str = "{}"
    rare: bool = False
    allowed: Callable[[], Sequence[str]] | None = None
    expects: str = ""
    short: str = ""


PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One point of the matrix, named by its id everywhere: `infer-eager-fp32-nchw-bilinear-b1-256x256-1cpu`."""

    task: Annotated[
        Literal["infer", "train", "layer"],
        Axis(
            help="one forward pass, one training step (forward, loss, backward, optimizer), "
            "or one convolution-BatchNorm-ReLU of the network alone (`layer`)"
        ),
    ] = "infer"
    implementation: Annotated[
        str, Axis(help="who runs the network's forward pass", allowed=lambda: tuple(IMPLEMENTATIONS))
    ] = "eager"
    precision: Annotated[
        Literal["fp32", "tf32", "amp_bf16", "amp_fp16", "bf16", "fp16"],
        Axis(
            help="arithmetic: IEEE fp32, TF32 convolutions, autocast to bf16 or fp16, "
            "or weights and activations in bf16 or fp16"
        ),
    ] = "fp32"
    layout: Annotated[
        Literal["nchw", "nhwc"], Axis(help="memory format of weights and images: contiguous, or channels_last")
    ] = "nchw"
    upsampling: Annotated[
        Literal["bilinear", "transposed"], Axis(help="bilinear interpolation, or transposed convolution")
    ] = "transposed"
    batch: Annotated[
        PositiveInt, Axis(help="images a step, on each device", part="b{}", expects="a whole number from 1")
    ] = 1
    size: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"\A[1-9][0-9]{0,5}x[1-9][0-9]{0,5}\Z")],
        Axis(help="image height and width", expects="HEIGHTxWIDTH in pixels, such as 512x512"),
    ] = "256x256"
    devices: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"\A[1-9][0-9]{0,3}(cpu|gpu)\Z")],
        Axis(
            help="how many, and of which kind; of CPUs, processes that share the cores out among them",
            expects="their number and kind, such as 1cpu, 1gpu, 2gpu; in a setting the kind may be left to the machine",
            short="[1-9][0-9]{0,3}",
        ),
    ] = "1cpu"
    width: Annotated[
        PositiveInt,
        Axis(help="channels of the first level", part="w{}", rare=True, expects="a whole number from 1"),
    ] = 64
    depth: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=6)],
        Axis(help="levels below the first", part="d{}", rare=True, expects="a whole number from 1 to 6"),
    ] = 4
    container: Annotated[
        Literal["unet", "sequential", "ordered", "modulelist", "moduledict"],
        Axis(help="what holds the same layers (`unet.containers`)", rare=True),
    ] = "unet"
    modification: Annotated[
        Literal["none", "head", "vector", "plane", "supervision", "features"],
        Axis(help="a change to the network (`unet.modify`)", rare=True),
    ] = "none"
    activations: Annotated[
        Literal["kept", "recomputed"],
        Axis(help="kept for the backward pass, or recomputed block by block (activation checkpointing)", rare=True),
    ] = "kept"
    threads: Annotated[
        Annotated[int, msgspec.Meta(ge=0, le=4096)],
        Axis(
            help="CPU threads of a process",
            part="t{}",
            rare=True,
            expects="a whole number; 0 shares the cores out among the processes",
        ),
    ] = 0
    layer: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"\A(inc|down[1-6]|up[1-6])_[12]\Z")],
        Axis(
            help="which convolution-BatchNorm-ReLU the task `layer` runs: its block, and the first or second in it",
            rare=True,
            expects="a block and 1 or 2, such as inc_2, down3_1, up4_2",
        ),
    ] = "inc_2"
    regime: Annotated[
        Literal["burst", "sustained"],
        Axis(
            help="seconds of steps on a device that was idle, or half a minute: clocks and heat have settled", rare=True
        ),
    ] = "burst"
    cache: Annotated[
        Literal["warm", "cold"],
        Axis(help="the device's last-level cache as the last step left it, or cleared before each step", rare=True),
    ] = "warm"
    frame: Annotated[
        Literal["whole", "padded", "tiled"],
        Axis(help="images as they are, mirrored to a multiple of 2^depth and cut, or tile by tile", rare=True),
    ] = "whole"
    strategy: Annotated[
        Literal["auto", "single", "ddp", "dp", "replicas"],
        Axis(
            help="how devices share a step: DistributedDataParallel, DataParallel, or a process each with its share of "
            "the inputs; auto, one device: single, training: ddp, inference: replicas",
            rare=True,
        ),
    ] = "auto"
    scaling: Annotated[
        Literal["weak", "strong"],
        Axis(help="whether `batch` is each device's, or that of all together, shared out among them", rare=True),
    ] = "weak"
    accumulation: Annotated[
        PositiveInt,
        Axis(
            help="forward and backward passes a training step; gradients are exchanged in the last alone (`no_sync`)",
            part="a{}",
            rare=True,
            expects="a whole number from 1",
        ),
    ] = 1
    batchnorm: Annotated[
        Literal["local", "syncbn"],
        Axis(help="statistics of a batch: each device's own, or those of all together (SyncBatchNorm)", rare=True),
    ] = "local"

    def __post_init__(self) -> None:
        """One case, one id: what `auto` stands for is no other case, nor is what changes nothing on one device."""
        if self.strategy == self._usual_strategy:
            msgspec.structs.force_setattr(self, "strategy", "auto")
        if self.devices[:-3] == "1":
            msgspec.structs.force_setattr(self, "scaling", "weak")

    @property
    def _usual_strategy(self) -> str:
        if self.devices[:-3] == "1":
            return "single"
        return "ddp" if self.task == "train" else "replicas"

    @property
    def shared_by(self) -> str:
        """The strategy, `auto` resolved."""
        return self._usual_strategy if self.strategy == "auto" else self.strategy

    @property
    def id(self) -> str:
        """The case's name, unique and free of spaces, slashes and quotes."""
        return "-".join(
            axis.part.format(getattr(self, name)) for name, axis in AXES.items() if not axis.rare or self.changed(name)
        )

    def changed(self, axis: str) -> bool:
        """Whether an axis is not at its default."""
        return bool(getattr(self, axis) != _DEFAULTS[axis])

    @property
    def height(self) -> int:
        """Image height in pixels."""
        return int(self.size.split("x")[0])

    @property
    def breadth(self) -> int:
        """Image width in pixels (`width` is the network's)."""
        return int(self.size.split("x")[1])

    @property
    def device_count(self) -> int:
        """How many devices the case runs on."""
        return int(self.devices[:-3])

    @property
    def processes(self) -> int:
        """How many processes the case runs in: one a device, but for DataParallel, whose one process drives all."""
        return 1 if self.strategy == "dp" else self.device_count

    @property
    def on_gpu(self) -> bool:
        """Whether the devices are GPUs."""
        return self.devices.endswith("gpu")

    @property
    def joined_batch(self) -> int:
        """Images of one forward pass over all devices."""
        return self.batch if self.scaling == "strong" else self.batch * self.device_count

    @property
    def images(self) -> int:
        """Images a step over all devices."""
        return self.joined_batch * self.accumulation

    def share(self, rank: int) -> slice:
        """Which images of the joined batch are those of a process; the first ones take what is left over."""
        each, more = divmod(self.joined_batch, self.processes)
        first = rank * each + min(rank, more)
        return slice(first, first + each + (rank < more))


_HINTS: Mapping[str, Any] = typing.get_type_hints(Case, include_extras=True)


def _axes() -> dict[str, Axis]:
    return {name: next(m for m in _HINTS[name].__metadata__ if isinstance(m, Axis)) for name in Case.__struct_fields__}


AXES: Mapping[str, Axis] = _axes()
_DEFAULTS: Mapping[str, Any] = dict(zip(Case.__struct_fields__, Case.__struct_defaults__, strict=True))


def allowed(name: str) -> str:
    """What an axis accepts, in words: its values, or their form."""
    axis = AXES[name]
    if axis.expects:
        return axis.expects
    return ", ".join(_listed(name))


def rank(case: Case) -> tuple[tuple[int, tuple[int, ...], str], ...]:
    """Where a case stands among others, whatever the order in which they ran: axis by axis, values as they are listed.

    Where they are not, numbers decide, and then the text.
    """
    return tuple(rank_of(name, getattr(case, name)) for name in AXES)


def rank_of(name: str, given: str | int) -> tuple[int, tuple[int, ...], str]:
    """Where a value stands among those of axis `name`."""
    listed = _listed(name)
    place = listed.index(str(given)) if str(given) in listed else len(listed)
    return place, tuple(map(int, re.findall(r"\d+", str(given)))), str(given)


def _listed(name: str) -> tuple[str, ...]:
    values = AXES[name].allowed
    return tuple(values() if values is not None else map(str, typing.get_args(_HINTS[name].__origin__)))


def value(name: str, text: str) -> str | int:
    """The value of axis `name` written as `text`.

    Raises:
        CaseError: there is no such axis, or the axis has no such value.
    """
    if name not in AXES:
        raise CaseError(f"unknown axis {name!r}; the axes are {', '.join(AXES)}")
    listed = AXES[name].allowed
    try:
        found: str | int = msgspec.convert(text, _HINTS[name], strict=False)
    except msgspec.ValidationError:
        found = ""
    if found == "" or (listed is not None and found not in listed()):
        raise CaseError(f"{name}={text!r} is not possible; allowed: {allowed(name)}")
    return found


def parse_axes(settings: Iterable[str]) -> dict[str, tuple[str | int, ...]]:
    """`["batch=1,8", "task=infer"]` → `{"batch": (1, 8), "task": ("infer",)}`; what is short stays as written.

    Raises:
        CaseError: a text that is not `name=value[,value…]`, or names what does not exist.
    """
    axes: dict[str, tuple[str | int, ...]] = {}
    for text in settings:
        name, equals, values = text.partition("=")
        if not equals:
            raise CaseError(f"{text!r} is not an axis setting; expected name=value[,value...], such as batch=1,8")
        short = AXES[name].short if name in AXES else ""
        axes[name] = axes.get(name, ()) + tuple(
            part if short and re.fullmatch(short, part) else value(name, part) for part in values.split(",")
        )
    return axes


def parse_id(text: str) -> Case:
    """The case that has this id.

    Raises:
        CaseError: no case has it.
    """
    parts = text.split("-")
    fields: dict[str, str | int] = {}
    for name, axis in AXES.items():
        written = re.fullmatch(re.escape(axis.part).replace(r"\{\}", "(.+)"), parts[0]) if parts else None
        if axis.rare and (written is None or not _has(name, written[1])):
            continue
        if written is None:
            raise CaseError(f"{text!r} is no case's id: it has no {name}; `python -m bench list` prints ids")
        fields[name] = value(name, written[1])
        parts.pop(0)
    if parts:
        raise CaseError(
            f"{text!r} is no case's id: {'-'.join(parts)!r} is left over; `python -m bench list` prints ids"
        )
    return Case(**fields)  # type: ignore[arg-type]  # `value` has checked each against the field's type


def _has(name: str, text: str) -> bool:
    try:
        value(name, text)
    except CaseError:
        return False
    return True


def product(**axes: Sequence[str | int]) -> tuple[Case, ...]:
    """Every combination of the given values, the first axis varying slowest; axes not named stay at their default."""
    return tuple(
        Case(**dict(zip(axes, values, strict=True)))  # type: ignore[arg-type]  # literals of presets, checked by a test
        for values in itertools.product(*axes.values())
    )


def vary(cases: Iterable[Case], axes: Mapping[str, Sequence[str | int]]) -> tuple[Case, ...]:
    """Each case once for each combination of the values in `axes`; cases that become equal are kept once, in order."""
    varied = (
        msgspec.structs.replace(case, **dict(zip(axes, values, strict=True)))
        for case in cases
        for values in itertools.product(*axes.values())
    )
    return tuple(dict.fromkeys(varied))
