"""`fuse` on networks of every kind: the same answers and state_dict, and an honest report of what was left."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

import kernels
from kernels.trace import trace
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable


def same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """Biased convolutions, functional ReLUs, BatchNorm without affine parameters, a sum between, a last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding="same")
        self.first_norm = nn.BatchNorm2d(12, affine=False)
        self.second = nn.Conv2d(12, 12, (3, 3), padding=(1, 1), bias=False)
        self.second_norm = nn.BatchNorm2d(12, eps=1e-3)
        self.third = nn.Conv2d(12, 6, 3, padding=1)
        self.third_norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)), inplace=True)
        x = (x + self.second_norm(self.second(input=x))).relu_()
        return F.leaky_relu(self.third_norm(self.third(x)), 0.2)


class Separable(nn.Module):
    """Groups, dilation, strides and 1×1 that must be left alone; one module used twice; a tap of a raw convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.pointwise = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.dilated = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU())
        self.reflected = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8))
        self.shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.tapped, self.tapped_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.batch_statistics = nn.BatchNorm2d(8, track_running_stats=False)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.reflected(self.dilated(self.pointwise(self.depthwise(self.stem(x)))))
        x = self.shared(self.shared(x))
        raw = self.tapped(x)
        return raw, self.batch_statistics(self.last(self.tapped_norm(raw)))


class Branching(nn.Module):
    """Control flow on sizes around blocks that can be traced; a dictionary comes out; a pre-activation block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8)
        )
        self.pre = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.out, self.out_norm = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, *, double: bool = False) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
            if x.shape[-1] % 2:
                x = F.pad(x, [0, 1])
        x = self.pre(x)
        return {"out": F.relu(self.out_norm(self.out(x))) * (2 if double else 1)}


FOREIGN = {"residual": (Residual, 3, 0), "separable": (Separable, 2, 7), "branching": (Branching, 2, 1)}


@pytest.mark.parametrize("name", FOREIGN)
def test_networks_not_ours(name: str, lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    torch.manual_seed(0)
    kind, fused_chains, left_chains = FOREIGN[name]
    model = lively(kind()).to(device)
    fused = kernels.fuse(model)
    report = kernels.fusion_report(fused)
    assert (report.chains_fused, report.chains_left) == (fused_chains, left_chains), str(report)
    for size in ((8, 12), (7, 11)):
        x = torch.randn(2, 3, *size, device=device)
        with torch.no_grad():
            same(fused(x), model(x))
    assert list(fused.state_dict()) == list(model.state_dict())
    again = copy.deepcopy(fused)
    with torch.no_grad():
        same(again(x), model(x))
    assert kernels.fusion_report(again) == report


def test_the_report_names_each_reason() -> None:
    report = kernels.fusion_report(kernels.fuse(Separable()))
    reasons = {entry.part: entry.reason for entry in report.left}
    assert reasons == {
        "stem.0": "stride (2, 2)",
        "depthwise.0": "groups 8",
        "pointwise.0": "kernel size (1, 1), padding (0, 0)",
        "dilated.0": "dilation (2, 2), padding (2, 2)",
        "reflected.0": "padding mode reflect",
        "tapped": "its output is read elsewhere too",
        "last": "its BatchNorm keeps no running statistics",
    }
    assert [entry.convolution for entry in report.fused] == ["shared.0", "shared.0"]
    assert "2 chains fused, 7 left" in str(report)


def test_an_untraceable_forward_is_reported_and_its_children_are_fused() -> None:
    report = kernels.fusion_report(kernels.fuse(Branching()))
    ((path, why),) = report.untraced
    assert path == ""
    assert "control flow" in why
    assert [entry.convolution for entry in report.fused] == ["blocks.0.0", "blocks.1.0"]
    assert {entry.part: entry.chain for entry in report.left} == {"pre.2": False, "out": True}


def test_training_is_refused_by_name() -> None:
    fused = kernels.fuse(Residual())
    for model in (fused, kernels.fuse(Branching())):
        with pytest.raises(RuntimeError, match=r"fused for inference.*train the model given to fuse"):
            model.train()
        assert not model.training
        assert not any(module.training for module in model.modules())
    assert fused.eval() is fused


def test_the_model_given_is_not_changed() -> None:
    model = Residual().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernels.fuse(model)
    assert model.training
    assert type(model) is Residual
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "fuse again"])
def test_copies_are_fused_too(how: str, lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    fused = kernels.fuse(lively(UNet(3, 2, width=2, depth=1))).to(device)
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fused))  # noqa: S301 - written here
    elif how == "fuse again":
        other = kernels.fuse(fused)
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert isinstance(other, UNet)
    assert type(other).__name__ == "FusedUNet"
    assert kernels.fusion_report(other) == kernels.fusion_report(fused)
    x = torch.randn(1, 3, 4, 6, device=device)
    with torch.no_grad(), kernels.Account(kernels.KERNELS) as account:
        same(other(x), fused(x))
    launched = [call.kernel for call in account.calls]
    assert launched[: len(launched) // 2] == launched[len(launched) // 2 :]
    assert len(launched) == 2 * 7


def test_strict_loading_both_ways() -> None:
    model, fused = UNet(3, 2, width=2, depth=2), kernels.fuse(UNet(3, 2, width=2, depth=2))
    fused.load_state_dict(model.state_dict())
    model.load_state_dict(fused.state_dict())
    assert "inc.double_conv.1.num_batches_tracked" in fused.state_dict()


def test_hooks_keep_firing(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    model = lively(UNet(3, 2, width=2, depth=2)).to(device)
    seen: list[str] = []
    for path in ("inc.double_conv.0", "down1.maxpool_conv.1.double_conv.1", "up1.conv", "up2.conv.double_conv.2"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
    fused = kernels.fuse(model)
    x = torch.randn(1, 3, 8, 8, device=device)
    with torch.no_grad():
        expected = model(x)
        eager, seen[:] = list(seen), []
        same(fused(x), expected)
    assert seen == eager
    report = kernels.fusion_report(fused)
    assert {entry.part: entry.reason for entry in report.left if entry.chain} == {
        "inc.double_conv.0": "has hooks, which would not fire",
        "down1.maxpool_conv.1.double_conv.0": "its BatchNorm has hooks, which would not fire",
    }
    # The hooked container is called as a whole; inside it both chains are fused, and a hooked ReLU stays outside.
    assert {entry.convolution: entry.relu for entry in report.fused}["up2.conv.double_conv.0"] is False
    assert report.chains_fused == 8


class Odd(nn.Module):
    """A forward that a tracer would get wrong, around a chain that is fine."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen = how, 0, []
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "counts":
            self.calls += 1
        if self.how == "noise":
            return self.block(x) + torch.randn(4, 1, 1)
        if self.how == "autocast":
            with torch.autocast("cpu", enabled=False):
                return self.block(x)
        y = self.block(x)
        if self.how == "collects":
            self.seen.append(y)
        return y


@pytest.mark.parametrize("how", ["counts", "noise", "autocast", "collects"])
def test_a_forward_with_side_effects_stays_as_written(how: str, device: torch.device) -> None:
    fused = kernels.fuse(Odd(how))
    report = kernels.fusion_report(fused)
    assert [path for path, _ in report.untraced] == [""]
    assert report.chains_fused == 1
    assert (fused.calls, fused.seen) == (0, [])
    assert not any(name.startswith("_tensor_constant") for name in vars(fused))
    if device.type == "cpu":
        x = torch.randn(1, 3, 4, 4)
        with torch.no_grad():
            first, second = fused(x), fused(x)
        assert torch.equal(first, second) is (how != "noise")
        assert fused.calls == (2 if how == "counts" else 0)


def test_what_is_no_plain_module_is_left_by_name() -> None:
    class Mine(nn.Conv2d):
        pass

    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    patched = nn.Conv2d(4, 4, 3, padding=1)
    patched.forward = patched.forward
    model = nn.Sequential(
        *(Mine(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        *(weighted, nn.BatchNorm2d(4)),
        *(patched, nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.SyncBatchNorm(4)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
    )
    report = kernels.fusion_report(kernels.fuse(model))
    assert [entry.reason for entry in report.left] == [
        "is a Mine, not a plain Conv2d",
        "is a ParametrizedConv2d, not a plain Conv2d",
        "its forward was replaced on the instance",
        "its BatchNorm is a SyncBatchNorm",
        "no BatchNorm2d behind it",
    ]
    assert (report.chains_fused, report.chains_left) == (0, 4)


def test_a_functional_convolution_is_left_by_name() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(F.conv2d(x, self.weight, padding=1)))

    report = kernels.fusion_report(kernels.fuse(Functional()))
    assert [(entry.reason, entry.chain) for entry in report.left] == [("is a function call, not a module", True)]


def test_a_compiled_model_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="before it is compiled or scripted; given OptimizedModule"):
        kernels.fuse(torch.compile(nn.Sequential(nn.Conv2d(3, 3, 3)), backend="eager"))


def test_a_report_is_asked_of_fused_models_alone() -> None:
    with pytest.raises(TypeError, match="what fuse returned; given Conv2d"):
        kernels.fusion_report(nn.Conv2d(3, 3, 3))


def test_a_residual_read_before_an_in_place_relu(device: torch.device) -> None:
    class Aliasing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return y.relu_() + y + x.add_(1)

    model = Aliasing().eval().to(device)
    fused = kernels.fuse(model)
    assert [entry.relu for entry in kernels.fusion_report(fused).fused] == [False]
    x = torch.randn(1, 3, 5, 5, device=device)
    with torch.no_grad():
        same(fused(x.clone()), model(x.clone()))


def test_autocast(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    model = lively(UNet(3, 2, width=4, depth=2)).to(device)
    fused = kernels.fuse(model)
    x = torch.randn(1, 3, 16, 16, device=device)
    with torch.no_grad():
        truth = model(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mine, eager = fused(x), model(x)
    assert mine.dtype == eager.dtype == torch.bfloat16
    errors = [float((result.float() - truth).norm() / truth.norm()) for result in (mine, eager)]
    assert errors[0] <= 1.5 * errors[1], errors


def test_export(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    fused = kernels.fuse(lively(UNet(3, 2, width=2, depth=1))).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    program = torch.export.export(fused, (x,))
    assert sum("unet_kernels" in str(node.target) for node in program.graph.nodes) == 7
    with torch.no_grad():
        same(program.module()(x), fused(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own, when Inductor is imported
@pytest.mark.parametrize("grad", [True, False])
def test_compile_fullgraph(*, grad: bool, lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    fused = kernels.fuse(lively(UNet(3, 2, width=2, depth=1))).to(device)
    x = torch.randn(1, 3, 8, 8, device=device)
    with torch.set_grad_enabled(grad):
        same(torch.compile(fused, fullgraph=True)(x), fused(x))


def test_compile_without_inductor(lively: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    fused = kernels.fuse(lively(UNet(3, 2, width=2, depth=1))).to(device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for size in ((8, 8), (6, 10)):
            x = torch.randn(1, 3, *size, device=device)
            same(compiled(x), fused(x))


class InCompany(nn.Module):
    """While its forward runs, so does whatever else it was given."""

    def __init__(self, beside: Callable[[], object]) -> None:
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        self.beside()
        y: Tensor = self.chain(x)
        return y


def test_other_threads_go_on_while_a_forward_is_traced() -> None:
    served: list[object] = []

    def serve() -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            served.append(model.chain(torch.ones(1, 2, 4, 4)))

    def beside() -> None:
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()

    model = InCompany(beside)
    trace(model)
    assert [type(result) for result in served] == [Tensor]


def test_two_threads_that_fuse_leave_nothing_patched() -> None:
    entered = torch.no_grad.__enter__
    both, first_is_done = threading.Event(), threading.Event()

    def second() -> None:
        both.set()
        first_is_done.wait(30)

    thread = threading.Thread(target=lambda: trace(InCompany(second)))

    def first() -> None:
        thread.start()
        both.wait(1)  # it comes only where two are traced at once

    trace(InCompany(first))
    first_is_done.set()
    thread.join()
    assert torch.no_grad.__enter__ is entered
