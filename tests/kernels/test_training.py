"""A fused model that trains: eager's gradients and statistics, from the raw convolutions alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import kernels
from kernels.conv_moments import conv_moments
from kernels.limits import relative_l2, relative_l2_limit
from kernels.problem import DTYPES
from unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own, with Inductor


def block(**options: Any) -> nn.Sequential:  # noqa: ANN401
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, **options)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU())


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Logits, and the gradients of input and parameters for an upstream gradient that is the same for every model."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.device, y.dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), list(torch.autograd.grad(y, [x, *parameters], upstream, allow_unused=True))


def same_as_in_fp64(model: nn.Module, x: Tensor, fused: nn.Module | None = None) -> None:
    """Outputs, gradients and buffers of the fused model as of eager in fp64; the limit grows with the layers."""
    exact = copy.deepcopy(model).double()
    fused = kernels.fuse(model, training=True) if fused is None else fused
    (mine, gradients), (truth, exact_gradients) = step(fused, x), step(exact, x.double())
    layers = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    deepest = max(m.weight[0].numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    limit = 4 * layers * relative_l2_limit("fp32", deepest)
    assert relative_l2(mine, truth) <= limit
    scale = max(float(gradient.norm()) for gradient in exact_gradients if gradient is not None)
    for one, other in zip(gradients, exact_gradients, strict=True):
        assert one is not None
        assert other is not None
        # A bias before a BatchNorm has no gradient but rounding.
        assert relative_l2(one, other) <= limit or float((one - other).norm()) <= 1e-7 * scale
    for one, other in zip(fused.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.3},
    "average of all batches": {"momentum": None},
    "no statistics": {"track_running_stats": False},
    "no affine parameters": {"affine": False},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_batch_norm_trains_as_pytorch_s(variant: str, *, training: bool, device: torch.device) -> None:
    model = block(**VARIANTS[variant]).to(device)
    eager = copy.deepcopy(model).train(training)
    fused = kernels.fuse(model.train(training), training=True)
    for seed in range(2):
        x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed)).to(device)
        same_as_in_fp64(eager, x, fused)
        eager(x)  # what the fp64 copy was asked of counts for the statistics of the next
    assert list(fused.state_dict()) == list(eager.state_dict())


def test_a_batch_norm_frozen_in_a_model_that_trains(device: torch.device) -> None:
    model = nn.Sequential(*block(), *block()[1:], nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)).to(device).train()
    model[1].eval()
    model[1].running_mean.fill_(0.2)
    model[-1].eval().requires_grad_(requires_grad=False)
    assert kernels.fusion_report(kernels.fuse(model, training=True)).chains_fused == 2
    same_as_in_fp64(model, torch.randn(2, 3, 5, 6, device=device))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_small_deviation_around_a_large_mean(precision: str, device: torch.device) -> None:
    # 1e3 ± 1: sums of squares in fp32 would leave nothing of the variance.
    x = torch.randn(2, 16, 24, 40, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.zeros(16, 16, 3, 3, device=device)
    weight[range(16), range(16), 1, 1] = 1
    bias = torch.full((16,), 1e3, device=device)
    for memory in (torch.contiguous_format, torch.channels_last):
        given = x.to(DTYPES[precision]).contiguous(memory_format=memory)
        z, mean, var = conv_moments(given, weight, bias)
        var_of_z, mean_of_z = torch.var_mean(z.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double(), mean_of_z, rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double(), var_of_z, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [(9, 14), pytest.param((8, 12), marks=pytest.mark.slow)])
@pytest.mark.parametrize("bilinear", [False, True])
def test_gradients_of_the_whole_unet(*, bilinear: bool, size: tuple[int, int], device: torch.device) -> None:
    torch.manual_seed(0)
    model = UNet(3, 2, bilinear, width=4, depth=2).to(device)
    report = kernels.fusion_report(kernels.fuse(model, training=True))
    assert (report.chains_fused, report.chains_left) == (10, 0)
    around = [what for entry in report.fused for what in entry.around]
    assert (around.count("max-pool"), around.count("two sources")) == (2, 2)
    same_as_in_fp64(model, torch.randn(2, 3, *size, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bilinear", [False, True])
def test_the_unet_saves_at_most_six_tenths_of_eager_s_activations(*, bilinear: bool, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = UNet(3, 2, bilinear).to(dtype)
        image = torch.empty(2, 3, 512, 512, dtype=dtype)
    mine, eager = (saved_bytes(one, image) for one in (kernels.fuse(model, training=True), model))
    assert mine <= 0.6 * eager, mine / eager


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    there = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sum(storage.nbytes() for storage in kept.values())


class Shifted(nn.Module):
    """Features that something changes between the chain that made them and the one that reads them."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second = block(), block()
        self.second[0] = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y.add_(1) if self.in_place else y + 1
        return self.second(y)


def test_features_changed_in_place_are_kept_as_the_convolution_read_them(device: torch.device) -> None:
    model, in_place = (Shifted(in_place=way).to(device) for way in (False, True))
    in_place.load_state_dict(model.state_dict())
    same_as_in_fp64(model, torch.randn(2, 3, 5, 6, device=device), kernels.fuse(in_place, training=True))


def test_a_sum_in_place_behind_a_chain_without_relu(device: torch.device) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = block(), block()[:2]
            self.second[0] = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = self.second(y)
            z += y
            return nn.functional.relu_(z)

    same_as_in_fp64(Residual().to(device), torch.randn(2, 3, 5, 6, device=device))


def test_one_module_used_twice(device: torch.device) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()
            self.block[0] = nn.Conv2d(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    model = Twice().to(device)
    assert kernels.fusion_report(kernels.fuse(model, training=True)).chains_fused == 2
    same_as_in_fp64(model, torch.randn(2, 6, 5, 6, device=device))
    assert model.block[1].num_batches_tracked == 2


def test_parameters_and_buffers_are_those_of_the_model_given() -> None:
    model = UNet(3, 2, width=2, depth=1)
    fused = kernels.fuse(model, training=True)
    pairs = [
        *zip(model.parameters(), fused.parameters(), strict=True),
        *zip(model.buffers(), fused.buffers(), strict=True),
    ]
    assert all(one is other for one, other in pairs)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert type(model) is UNet
    assert fused.training
    assert not fused.eval().training
    assert fused.train().inc.training
    assert model.training


def test_copies_train_by_themselves_and_inference_takes_over(device: torch.device) -> None:
    torch.manual_seed(0)
    model = UNet(3, 2, width=2, depth=1).to(device)
    trained = kernels.fuse(model, training=True)
    other = copy.deepcopy(trained)
    assert kernels.fusion_report(other) == kernels.fusion_report(trained)
    assert other.outc.conv.weight is not trained.outc.conv.weight
    x = torch.randn(2, 3, 4, 6, device=device)
    other(x).sum().backward()
    assert model.inc.double_conv[0].weight.grad is None
    plain = UNet(3, 2, width=2, depth=1).to(device)
    plain.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = plain.eval()(x)
    for deployed in (kernels.fuse(other), kernels.fuse(kernels.fuse(other), training=True).eval(), other.eval()):
        with torch.no_grad(), kernels.Account(kernels.KERNELS) as account:
            torch.testing.assert_close(deployed(x).contiguous(), expected, rtol=1e-4, atol=1e-5)
        assert {call.kernel for call in account.calls} <= {"conv_bn_relu", "conv_bn_relu_pool", "conv_transpose"}


def test_evaluation_without_gradients_is_inference_s(
    lively: Callable[[nn.Module], nn.Module], device: torch.device
) -> None:
    model = lively(UNet(3, 2, width=2, depth=1)).to(device)
    fused = kernels.fuse(model, training=True)
    x = torch.randn(2, 3, 5, 6, device=device)
    with torch.no_grad(), kernels.Account(kernels.KERNELS) as account:
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    names = [call.kernel for call in account.calls]
    assert (names.count("conv_bn_relu_pool"), names.count("conv_moments")) == (1, 0)


def test_a_batch_of_nothing_and_of_one_value(device: torch.device) -> None:
    model = block().to(device)
    fused = kernels.fuse(model, training=True)
    assert fused(torch.empty(0, 3, 4, 4, device=device)).shape == (0, 6, 4, 4)
    assert model[1].num_batches_tracked == 1
    assert torch.equal(model[1].running_var.cpu(), torch.ones(6))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(torch.randn(1, 3, 1, 1, device=device))


def test_a_sync_batch_norm_and_its_convolution_stay_as_they_are(device: torch.device) -> None:
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(block())
    synced[0] = nn.Conv2d(6, 6, 3, padding=1)
    model = nn.Sequential(*block(), *synced).to(device)
    report = kernels.fusion_report(kernels.fuse(model, training=True))
    assert report.chains_fused == 1
    assert [(entry.part, entry.reason) for entry in report.left if entry.chain] == [
        ("3", "its BatchNorm is a SyncBatchNorm")
    ]
    same_as_in_fp64(model, torch.randn(2, 3, 5, 6, device=device))


def test_a_batch_norm_synchronized_after_fusing_is_refused_by_name() -> None:
    # Its chain would take the statistics of one process, and say nothing.
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(kernels.fuse(block(), training=True))
    for mode in (True, False):
        with pytest.raises(TypeError, match=r"there is now a SyncBatchNorm\(6, .*: put it there before fuse\("):
            fused.train(mode)(torch.randn(2, 3, 5, 6))


def test_a_forward_that_asks_for_its_mode_stays_as_written(device: torch.device) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.block(x), 0.5, self.training)

    class Frozen(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.block(x)

    x = torch.randn(2, 3, 4, 5, device=device)
    for kind, why in ((Dropping, "asks whether it trains"), (Frozen, "a region without gradients")):
        fused = kernels.fuse(kind(), training=True).to(device)
        report = kernels.fusion_report(fused)
        assert [reason for _, reason in report.untraced] == [f"its forward {'opens ' * (kind is Frozen)}{why}"]
        assert report.chains_fused == 1
        assert fused(x).requires_grad is (kind is Dropping)
        assert torch.equal(fused.eval()(x), fused(x))
