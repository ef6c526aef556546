"""Who runs the network: one decorated function an implementation, from model and case to a callable.

To add one, write such a function here, or in a module of your own and name it with `--load MODULE`; axis values,
ids, parity, memory, tables and skips follow.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from bench.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn
    from torch.fx import GraphModule

    from bench.case import Case
    from bench.machine import Machine

    Build = Callable[[nn.Module, Case], Callable[..., Any]]
    Need = Callable[[Case, Machine], str | None]


class UnsupportedError(Exception):
    """The implementation cannot run this case, which only building it could tell; the text says why."""


class Implementation(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the registry.

    Args:
        name: the value of the axis `implementation`.
        build: from the eager network, in the case's layout and on its device, and the case to what is called with
            the images; parameters stay those of the network.
        needs: each returns why a case cannot run on a machine, or None. They run in the parent, without torch.
        compiles: whether the first call compiles: the estimate of the time left wants to know, and a cold start.
        one_size: whether it takes images of the size of its first call alone.
        rewrites: whether it makes another network, which DistributedDataParallel then goes around; otherwise the
            implementation goes around DistributedDataParallel, as torch.compile wants it in order to overlap the two.
    """

    name: str
    build: Build
    needs: tuple[Need, ...] = ()
    compiles: bool = False
    one_size: bool = False
    rewrites: bool = False


IMPLEMENTATIONS: dict[str, Implementation] = {}


def implementation(
    name: str, *needs: Need, compiles: bool = False, one_size: bool = False, rewrites: bool = False
) -> Callable[[Build], Build]:
    """Register the decorated function as implementation `name`.

    Raises:
        ValueError: the name is taken, or would break an id.
    """
    if name in IMPLEMENTATIONS or not name.replace("_", "").isalnum():
        raise ValueError(
            f"implementation name {name!r}: expected letters, digits and '_', and none of {[*IMPLEMENTATIONS]}"
        )

    def register(build: Build) -> Build:
        IMPLEMENTATIONS[name] = Implementation(
            name=name, build=build, needs=needs, compiles=compiles, one_size=one_size, rewrites=rewrites
        )
        return build

    return register


def cxx(_: Case, machine: Machine) -> str | None:
    """A need: the C++ compiler that torch.compile takes for a CPU."""
    return machine.cxx_missing


def _cuda(case: Case, _: Machine) -> str | None:
    return None if case.on_gpu else "no CUDA device"


def _kept(case: Case, _: Machine) -> str | None:
    return None if case.activations == "kept" else "a fused network keeps the raw convolutions and recomputes the rest"


def _graphable(case: Case, _: Machine) -> str | None:
    return None if case.on_gpu else "CUDA graphs are for CUDA devices: no CUDA device"


def _constant_weights(case: Case, _: Machine) -> str | None:
    return None if case.task != "train" else "for inference alone: training changes the weights"


@implementation("eager")
def eager(model: nn.Module, _: Case) -> Callable[..., Any]:
    """PyTorch, operation by operation: the baseline."""
    return model


class Recorded:
    """A network, recorded as one CUDA graph at its first call and replayed from then on."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._graph: Callable[..., Any] | None = None

    def __call__(self, *inputs: Tensor) -> Any:  # noqa: ANN401 (whatever the network gives)
        """Replay; the result is overwritten by the next call."""
        import kernels

        if self._graph is None:
            self._graph = kernels.Graphed(self.network, *inputs)
        return self._graph(*inputs)


@implementation("eager_graph", _graphable, _constant_weights, one_size=True)
def eager_graph(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`eager`, the whole forward in one CUDA graph: what launching costs, and nothing else, is taken away."""
    return Recorded(model)


@implementation("compile", cxx, compiles=True)
def compile_(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`torch.compile` with its defaults (Inductor)."""
    import torch

    compiled: Callable[..., Any] = torch.compile(model)
    return compiled


@implementation("folded", _constant_weights)
def folded(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`eager` with each BatchNorm folded into the convolution before it: y = γ(Wx − μ)/σ + β is a convolution too."""
    return _folded(model)


@implementation("folded_graph", _graphable, _constant_weights, one_size=True)
def folded_graph(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`folded`, the whole forward in one CUDA graph."""
    return Recorded(_folded(model))


def _folded(model: nn.Module) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, of parts that are not used here
        from torch.fx.experimental.optimization import fuse

    return cast("GraphModule", fuse(model))


def _unknown_to_autocast(case: Case, _: Machine) -> str | None:
    casts = case.precision.startswith("amp_")
    return f"autocast casts nothing for this op: {case.precision.removeprefix('amp_')} instead" if casts else None


@implementation("cudnn_relu_graph", _graphable, _constant_weights, _unknown_to_autocast, one_size=True)
def cudnn_relu_graph(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`folded_graph` with each ReLU in its convolution's epilogue: cuDNN's own fusion, which Inductor never uses."""
    return Recorded(_convolutions_with_relu(_folded(model)))


def _convolutions_with_relu(network: GraphModule) -> GraphModule:
    import torch
    from torch import nn

    graph, layers = network.graph, dict(network.named_modules())
    for relu in graph.find_nodes(op="call_module"):
        source = relu.args[0]
        if not isinstance(layers[relu.target], nn.ReLU) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv = layers[source.target]
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
            continue
        with graph.inserting_before(relu):
            weight, bias = (graph.get_attr(f"{source.target}.{name}") for name in ("weight", "bias"))
            given = (source.args[0], weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            relu.replace_all_uses_with(graph.call_function(torch.cudnn_convolution_relu, given))
        graph.erase_node(relu)
        graph.erase_node(source)
    network.recompile()
    return network


@implementation("compile_reduce_overhead", _graphable, cxx, compiles=True)
def compile_reduce_overhead(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`torch.compile(mode="reduce-overhead")`: Inductor's kernels, replayed from CUDA graphs."""
    return _step_by_step(model, "reduce-overhead")


@implementation("compile_max_autotune", cxx, compiles=True)
def compile_max_autotune(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`torch.compile(mode="max-autotune")`: candidates of each kernel are timed; on a GPU in CUDA graphs as well."""
    return _step_by_step(model, "max-autotune")


def _step_by_step(model: nn.Module, mode: str) -> Callable[..., Any]:
    import torch

    compiled: Callable[..., Any] = torch.compile(model, mode=mode)

    def call(*inputs: Tensor) -> Any:  # noqa: ANN401 (whatever the network gives)
        # The outputs of the step before may be overwritten: graphs own their memory.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*inputs)

    return call


@implementation("compile_freezing", cxx, _constant_weights, compiles=True)
def compile_freezing(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`torch.compile` with the weights as constants: BatchNorm folded in, weights packed for their kernels."""
    import torch

    compiled: Callable[..., Any] = torch.compile(model, options={"freezing": True})
    return compiled


@implementation("triton", _cuda, _kept, rewrites=True)
def triton(model: nn.Module, case: Case) -> Callable[..., Any]:
    """Our fused kernels for every conv-BatchNorm-ReLU chain of the network, in training with their backward pass."""
    return _fused(model, training=case.task == "train")


def _fused(model: nn.Module, *, training: bool = False, fold: bool = False) -> nn.Module:
    import kernels

    fused = kernels.fuse(model, training=training, fold_transposed=fold)
    report = kernels.fusion_report(fused)
    if report.chains_left or not report.chains_fused:
        # A network that runs half by cuDNN would be somebody else's speed under our name.
        raise UnsupportedError(str(report))
    return fused


@implementation("triton_graph", _cuda, _constant_weights, one_size=True)
def triton_graph(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`triton`, the whole forward in one CUDA graph: no launch waits for Python."""
    return Recorded(_fused(model))


def _foldable(case: Case, _: Machine) -> str | None:
    if case.task == "layer":
        return "one layer alone has nothing to be folded into"
    return (
        None if case.upsampling == "transposed" else "bilinear upsampling is no convolution to be folded into another"
    )


@implementation("triton_fold", _cuda, _constant_weights, _foldable, rewrites=True)
def triton_fold(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`triton` with each transposed convolution folded into the one behind it: the map between is never made."""
    return _fused(model, fold=True)


@implementation("triton_fold_graph", _cuda, _constant_weights, _foldable, one_size=True)
def triton_fold_graph(model: nn.Module, _: Case) -> Callable[..., Any]:
    """`triton_fold`, the whole forward in one CUDA graph."""
    return Recorded(_fused(model, fold=True))


def load(modules: Iterable[str]) -> None:
    """Import modules that register implementations of their own, also from the folder one stands in.

    Raises:
        UsageError: there is no such module, or it cannot be imported.
    """
    modules = list(modules)
    here = str(Path.cwd())
    if modules and here not in sys.path:
        sys.path.insert(0, here)
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever somebody's module does on import
            raise UsageError(f"cannot load {module!r}: {type(error).__name__}: {error}") from error
