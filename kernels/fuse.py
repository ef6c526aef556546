"""`fuse(model)`: the same network with its conv → BatchNorm → ReLU chains as kernels, for inference or training.

The result is a deep copy whose class is a subclass of the model's own with a generated forward. The tree of modules is
untouched, so the state_dict is the same by construction, and `isinstance`, deepcopy and pickle hold.

Not seen by the fused model: hooks put on a module inside it after fusing (those there before are respected: what
carries them stays a module of its own), other attributes changed after fusing that the forward branches on, writes
through `.data` (see `kernels.packing`), and state that a forward keeps outside its modules.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any, Self

import torch
from torch import fx, nn

from kernels import conv_transpose, folded_packing
from kernels.chains import Fused, Left, join, rewrite, why_not
from kernels.packing import Sources
from kernels.packing import renew as renew_packed
from kernels.patterns import why_not_transposed
from kernels.trace import Untraceable, trace

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_NOT_TRACED = "called by a forward that could not be traced"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionReport:
    """What `fuse` did.

    `fused` has an entry for each call of a convolution that runs in the kernel, with what runs in it too; `transposed`
    the path of each transposed convolution that runs as one; `left` what runs as it was; `untraced` the path of each
    forward that could not be traced, and why.
    """

    fused: tuple[Fused, ...]
    transposed: tuple[str, ...]
    left: tuple[Left, ...]
    untraced: tuple[tuple[str, str], ...]

    @property
    def chains_fused(self) -> int:
        """Number of conv-BatchNorm(-ReLU) chains that run as one kernel."""
        return len(self.fused)

    @property
    def chains_left(self) -> int:
        """Number of conv-BatchNorm chains that run as they were."""
        return sum(entry.chain for entry in self.left)

    def __str__(self) -> str:
        """For people: lines of counts, then a line for everything that was left, with its reason."""
        lines = [f"{self.chains_fused} chains fused, {self.chains_left} left"]
        around = Counter(what for entry in self.fused for what in entry.around)
        lines += [f"  in their kernels: {', '.join(f'{count} × {what}' for what, count in around.items())}"] * bool(
            around
        )
        lines += [f"  {len(self.transposed)} transposed convolutions as kernels"] * bool(self.transposed)
        lines += [f"  {path or 'the model'}: forward not traced, children tried: {why}" for path, why in self.untraced]
        lines += [f"  {entry.part}: left: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def fuse(model: nn.Module, *, training: bool = False, fold_transposed: bool = False) -> nn.Module:
    """A copy of `model` in which every chain the kernels know runs as Triton ops.

    Same inputs, same outputs within the precision's rounding (feature maps are channels_last in memory), same
    state_dict. What can't be fused runs as it did; `fusion_report` says what and why. Where a forward can't be traced,
    the forwards of its children are tried.

    For inference each chain is one kernel. With `training` a chain is a convolution that also yields its channels'
    moments and a pass that normalizes; its gradients and running statistics are eager's, and of its activations the raw
    convolution alone is kept for the backward pass. A SyncBatchNorm, whose statistics are those of all processes, and
    the convolution before it run as they did: `convert_sync_batchnorm` comes before `fuse`, and a chain that finds its
    BatchNorm2d replaced afterwards raises TypeError.

    The kernels give the same bits at every call; what stays PyTorch's, weight gradients among it, does under
    `torch.use_deterministic_algorithms(True)`. Other threads may run models, and fuse them, meanwhile.

    Args:
        model: any nn.Module, in training mode or not, on any device; it is not changed.
        training: the copy shares parameters and buffers with `model`, so that an optimizer, a DistributedDataParallel
            or a checkpoint of either serves both; move and convert the model first. Modules stay in the modes they
            are in, and `train()` and `eval()` work as ever. A forward that was traced keeps no activation checkpoints
            of its own.
        fold_transposed: take each transposed convolution into the convolution that reads its result beside another's
            (`kernels.conv_bn_relu_up`), for inference alone. The map between is then never made: fewer bytes, products
            and live activations, and other roundings, of products of both layers' weights.

    Returns:
        for inference a module in evaluation mode; `train()` on it raises.

    Raises:
        TypeError: `model` is compiled, scripted or, for training, wrapped: it has no Python forward to rewrite.
        ValueError: transposed convolutions are to be folded into others for training.
    """
    if training and fold_transposed:
        raise ValueError("fold_transposed is for inference: layers that are trained are not folded into one another")
    if isinstance(model, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):  # noqa: SLF001 - no public name
        raise TypeError(
            f"fuse takes a model before it is compiled or scripted; given {type(model).__name__}: fuse it first"
        )
    if training and isinstance(model, _WRAPPERS):
        raise TypeError(f"fuse takes a model before it is wrapped; given {type(model).__name__}: fuse its module first")
    shared = (*model.parameters(), *model.buffers()) if training else ()
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    _unfuse(model)
    model = model if training else model.eval()
    report = _Collector(training, fold_transposed)
    _fuse_unit(model, "", report)
    if not isinstance(model, _FusedModule):
        _swap(model, None, report)
    vars(model)["_fusion_report"] = report.finished()
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What `fuse` did to this model.

    Raises:
        TypeError: `model` did not come from `fuse`.
    """
    report = vars(model).get("_fusion_report")
    if not isinstance(report, FusionReport):
        raise TypeError(f"fusion_report takes what fuse returned; given {type(model).__name__}")
    return report


def renew(model: nn.Module) -> None:
    """Bring a fused model's packed weights up to date in place, as its next call would: before a graph's replay."""
    for module in model.modules():
        for convolution_path, batch_norm_path, head_path, transposed_path in getattr(module, "_fused_chains", ()):
            conv, norm = module.get_submodule(convolution_path), module.get_submodule(batch_norm_path)
            running: Any = norm.running_mean
            if running is None:  # a chain that trains and has nothing packed
                continue
            layers: Any = (
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.weight,
                norm.bias,
                norm.eps,
            )
            if other_path := head_path or transposed_path:
                other: Any = module.get_submodule(other_path)
                layers += (other.weight, other.bias)
            renew_packed(folded_packing.Sources(*layers) if transposed_path else Sources(*layers))
        for path in getattr(module, "_fused_transposed", ()):
            layer: Any = module.get_submodule(path)
            renew_packed(conv_transpose.Sources(layer.weight, layer.bias))


class _FusedModule(nn.Module):
    """What a model's class is joined with.

    `_fused_chains` are paths of each (convolution, BatchNorm, 1×1 convolution or "", transposed convolution or "")
    taken in, `_fused_transposed` of each transposed convolution that is a kernel by itself.
    """

    _fused_chains: tuple[tuple[str, str, str, str], ...]
    _fused_transposed: tuple[str, ...]
    _eager: type[nn.Module]
    _trains: bool
    _folds: bool

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - nn.Module's signature
        """Evaluation mode alone, unless fused for training: one kernel a chain uses the running statistics."""
        if mode and not self._trains:
            raise RuntimeError(
                "this model was fused for inference and can't be trained: fuse with training=True, or train the model "
                "given to fuse, then fuse it again or load its state_dict here"
            )
        return super().train(mode)

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        # The class is made at run time and has no name to import: deepcopy and pickle take the model and fuse it again.
        state = dict(vars(self))
        del state["_fused_chains"], state["_fused_transposed"]
        return _revive, (self._eager, state, self._trains, self._folds)


def _revive(eager: type[nn.Module], state: dict[str, Any], trains: bool, folds: bool) -> nn.Module:  # noqa: FBT001 - of a pickle
    module = eager.__new__(eager)
    module.__setstate__(state)
    report = _Collector(trains, folds)
    _fuse_unit(module, "", report)
    if not isinstance(module, _FusedModule):
        _swap(module, None, report)
    return module


def _unfuse(model: nn.Module) -> None:
    """Give every module that was fused before its own class again."""
    for module in model.modules():
        if isinstance(module, _FusedModule):
            for name in ("_fused_chains", "_fused_transposed", "_fusion_report"):
                vars(module).pop(name, None)
            module.__class__ = module._eager  # type: ignore[assignment] # noqa: SLF001 - ours


@dataclasses.dataclass
class _Collector:
    training: bool
    fold: bool
    fused: list[Fused] = dataclasses.field(default_factory=list)
    transposed: list[str] = dataclasses.field(default_factory=list)
    left: list[Left] = dataclasses.field(default_factory=list)
    untraced: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def finished(self) -> FusionReport:
        fused, transposed, left = tuple(self.fused), tuple(self.transposed), tuple(self.left)
        return FusionReport(fused=fused, transposed=transposed, left=left, untraced=tuple(self.untraced))


def _fuse_unit(module: nn.Module, path: str, report: _Collector) -> None:
    """Fuse one module's forward, or, where it can't be rewritten, its children's."""
    if isinstance(module, _FusedModule):
        return
    try:
        _refuse_unswappable(module)
        graph = trace(module, modes=report.training)
    except Untraceable as why:
        if type(module).forward is not nn.Module.forward:
            report.untraced.append((path, str(why)))
        _fuse_children(module, path, report)
        return
    # What carries hooks is called as a whole; inside, it is a forward of its own.
    for node in graph.nodes:
        if node.op == "call_module":
            child = module.get_submodule(str(node.target))
            if next(child.children(), None) is not None:
                _fuse_unit(child, join(path, str(node.target)), report)
    rewritten = rewrite(module, graph, path, trained=report.training, fold=report.fold)
    report.fused += rewritten.fused
    report.transposed += rewritten.transposed
    report.left += rewritten.left
    if rewritten.fused or rewritten.transposed:
        strip = len(path) + 1 if path else 0
        chains = ((one.convolution, one.batch_norm, one.head, one.transposed) for one in rewritten.fused)
        paths = tuple(tuple(one[strip:] for one in chain) for chain in chains)
        _swap(module, graph, report, paths, tuple(one[strip:] for one in rewritten.transposed))


def _fuse_children(module: nn.Module, path: str, report: _Collector) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            report.left.append(_unreached(child, join(path, name), module))
        elif isinstance(child, nn.ConvTranspose2d):
            report.left.append(Left(part=join(path, name), reason=why_not_transposed(child) or _NOT_TRACED))
        elif next(child.children(), None) is not None:
            _fuse_unit(child, join(path, name), report)


def _unreached(convolution: nn.Conv2d, path: str, parent: nn.Module) -> Left:
    norms = [child for child in parent.children() if isinstance(child, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001
    chain = any(norm.num_features == convolution.out_channels for norm in norms)
    reason = why_not(convolution) or _NOT_TRACED
    return Left(part=path, reason=reason, chain=chain)


def _refuse_unswappable(module: nn.Module) -> None:
    for method in ("__deepcopy__", "__reduce__", "__reduce_ex__"):
        if getattr(type(module), method, None) is not getattr(nn.Module, method, None):
            raise Untraceable(f"its class copies itself ({method}), which would undo the fusion")


def _swap(
    module: nn.Module,
    graph: fx.Graph | None,
    report: _Collector,
    chains: tuple[tuple[str, ...], ...] = (),
    transposed: tuple[str, ...] = (),
) -> None:
    eager = type(module)
    body: dict[str, Any] = {"_eager": eager, "__doc__": eager.__doc__, "__module__": eager.__module__}
    body["_trains"], body["_folds"] = report.training, report.fold
    if graph is not None:
        body["forward"] = type(fx.GraphModule(module, graph)).forward
    vars(module).update(_fused_chains=chains, _fused_transposed=transposed)
    module.__class__ = type(f"Fused{eager.__name__}", (_FusedModule, eager), body)
