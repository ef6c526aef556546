"""A fused model in the loops that people train with: fits, mixed precision, checkpoints, many processes."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.conv_moments import conv_moments
from kernels.conv_transpose import conv_transpose
from kernels.norm_relu import norm_relu
from kernels.norm_relu_gradient import norm_relu_gradient
from unet import UNet
from unet.blocks import DoubleConv

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def picture(side: int) -> tuple[Tensor, Tensor]:
    """A photograph (1, 3, side, side) in 0…1, and where it is brighter than its median."""
    import skimage

    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float() / 255
    image = F.interpolate(image, size=(side, side), mode="area")
    brightness = image.mean(1)
    return image, (brightness > brightness.median()).long()


def pair(device: torch.device, model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    """A model, two chains where none is given, and its twin fused for training."""
    torch.manual_seed(0)
    model = (DoubleConv(3, 2) if model is None else model).to(device)
    return model, kernels.fuse(copy.deepcopy(model), training=True)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-4) -> None:
    for mine, theirs in zip(one, other, strict=True):
        far = float((mine - theirs).detach().norm())
        assert far <= tolerance * float(theirs.detach().norm()) + 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("bilinear", [False, True])
def test_twenty_steps_on_a_photograph_go_as_eager_s(*, bilinear: bool, device: torch.device) -> None:
    model, fused = pair(device, UNet(3, 2, bilinear, width=8, depth=1))
    image, mask = (tensor.to(device) for tensor in picture(16))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9) for one in (model, fused)]
    losses: list[tuple[float, ...]] = []
    for _ in range(20):
        both = []
        for one, optimizer in zip((model, fused), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(one(image), mask)
            loss.backward()
            optimizer.step()
            both.append(loss.item())
        losses.append(tuple(both))
        assert losses[-1][1] == pytest.approx(losses[-1][0], rel=1e-3), losses
    assert losses[-1][1] < losses[0][1] / 2
    close(list(fused.parameters()), list(model.parameters()), 1e-2)
    close([b.float() for b in fused.buffers()], [b.float() for b in model.buffers()], 1e-2)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler_skips_infinite_steps(amp: torch.dtype, device: torch.device) -> None:
    _, fused = pair(device)
    image, mask = (tensor.to(device) for tensor in picture(6))
    before = [parameter.clone() for parameter in fused.parameters()]
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for weight, moved in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=amp):
            logits = fused(image)
            assert logits.dtype == amp
            loss = F.cross_entropy(logits.float(), mask) * weight
        scaler.scale(loss).backward()
        assert {p.grad.dtype for p in fused.parameters()} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        changed = [not torch.equal(p, old) for p, old in zip(fused.parameters(), before, strict=True)]
        assert any(changed) is moved
    assert scaler.get_scale() == 2.0**9


@pytest.mark.slow
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_are_as_near_to_fp32_as_eager_s(amp: torch.dtype, device: torch.device) -> None:
    model, fused = pair(device, UNet(3, 2, width=4, depth=1))
    image, mask = (tensor.to(device) for tensor in picture(12))
    exact = copy.deepcopy(model)
    F.cross_entropy(exact(image), mask).backward()
    truth = torch.cat([gradient.flatten() for gradient in gradients(exact)])
    errors = []
    for one in (fused, model):
        with torch.autocast(device.type, dtype=amp):
            loss = F.cross_entropy(one(image).float(), mask)
        loss.backward()
        found = torch.cat([gradient.flatten() for gradient in gradients(one)])
        errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[0] <= 1.5 * errors[1], errors


def test_accumulated_gradients_are_those_of_the_sum(device: torch.device) -> None:
    model, fused = pair(device)
    for seed in range(2):
        x = torch.randn(1, 3, 6, 4, generator=torch.Generator().manual_seed(seed)).to(device)
        for one in (model, fused):
            one(x).square().sum().backward()
    close(gradients(fused), gradients(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(*, reentrant: bool, device: torch.device) -> None:
    model, fused = pair(device)
    x = torch.randn(2, 3, 6, 4, device=device, requires_grad=True)
    for one in (model, fused):
        checkpoint(one, x, use_reentrant=reentrant).square().sum().backward()
    close(gradients(fused), gradients(model))
    assert fused.double_conv[1].num_batches_tracked == model.double_conv[1].num_batches_tracked == 2


def test_blocks_fused_one_by_one_keep_the_unet_s_own_checkpoints(device: torch.device) -> None:
    model, _ = pair(device, UNet(3, 2, width=2, depth=1))
    other = copy.deepcopy(model)
    for name, child in list(other.named_children()):
        setattr(other, name, kernels.fuse(child, training=True))
    other.checkpoint_blocks = model.checkpoint_blocks = True
    x = torch.randn(2, 3, 6, 4, device=device)
    for one in (model, other):
        one(x).square().sum().backward()
    close(gradients(other), gradients(model))
    assert other.inc.double_conv[1].num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_around(device: torch.device) -> None:
    model, fused = pair(device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 4, device=device)
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    close(gradients(fused), gradients(model))
    close([b.float() for b in fused.buffers()], [b.float() for b in model.buffers()])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_around_by_inductor(device: torch.device) -> None:
    model, fused = pair(device)
    x = torch.randn(2, 3, 6, 4, device=device)
    model(x).square().sum().backward()
    torch.compile(fused, fullgraph=True)(x).square().sum().backward()
    close(gradients(fused), gradients(model))


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("bilinear", [False, True])
def test_deterministic_where_it_is_asked_for(*, bilinear: bool, device: torch.device) -> None:
    _, fused = pair(device, UNet(3, 2, bilinear, width=2, depth=1))
    x = torch.randn(2, 3, 6, 5, device=device)
    found = []
    for _ in range(2):
        fused.zero_grad()
        fused(x).square().sum().backward()
        found.append(gradients(fused))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_second_backward_is_refused_as_pytorch_refuses_it(device: torch.device) -> None:
    _, fused = pair(device)
    loss = fused(torch.randn(2, 3, 4, 4, device=device)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_weight_changed_before_the_backward_pass_is_refused_as_pytorch_refuses_it(device: torch.device) -> None:
    _, fused = pair(device)
    loss = fused(torch.randn(2, 3, 4, 4, device=device)).sum()
    with torch.no_grad():
        fused.double_conv[3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_belong_together_is_refused_by_name(device: torch.device) -> None:
    x, weight = torch.randn(1, 3, 4, 4, device=device), torch.randn(2, 3, 3, 3, device=device)
    table = torch.ones(4, 2, device=device)
    z = conv_moments(x, weight, None)[0]
    none = z[:, :, :0, :0]
    wrong = (
        (lambda: conv_moments(x.double(), weight, None), "fp16, bf16 or fp32"),
        (lambda: conv_moments(x, weight[:, :2], None), r"weight \(O, 3, 3, 3\)"),
        (lambda: conv_moments(x, weight.to("meta"), None), "put them on one device"),
        (lambda: conv_moments(x, weight, torch.ones(1, device=device)), r"each of 2 channels is wanted; given \(1,\)"),
        (
            lambda: conv_transpose(x, torch.ones(3, 2, 2, 2, device=device), torch.ones(1, device=device)),
            "of 2 channels",
        ),
        (lambda: norm_relu(z.contiguous(), table, True, False, False), "channels_last memory"),  # noqa: FBT003
        (lambda: norm_relu(z, table[:3], True, False, False), r"a table \(4, 2\) in fp32"),  # noqa: FBT003
        (lambda: norm_relu_gradient(z, none, z, table, table[:2].T.contiguous().T, True, False), "contiguous sums"),  # noqa: FBT003
        (lambda: norm_relu(z, table.to("meta"), True, False, False), "put them on one device"),  # noqa: FBT003
    )
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(TypeError, match="before it is wrapped; given DataParallel: fuse its module first"):
        kernels.fuse(nn.DataParallel(nn.Conv2d(3, 3, 3)), training=True)


RANK = """
import sys, torch
from torch import distributed, nn
import kernels
from unet import UNet

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = UNet(3, 2, width=2, depth=1)
wrapped = nn.parallel.DistributedDataParallel(model if sys.argv[3] == "eager" else kernels.fuse(model, training=True))
x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(rank))
for _ in range(2):
    model.zero_grad()
    wrapped(x).square().sum().backward()
torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{sys.argv[3]}{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_one_gradient_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kind in ("fused", "eager"):
        ranks = [
            subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path), kind], stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        assert [(rank.communicate(timeout=300)[1][-2000:], rank.returncode)[1] for rank in ranks] == [0, 0]
        (tmp_path / "store").unlink(missing_ok=True)
    fused, other, eager = (torch.load(tmp_path / name) for name in ("fused0.pt", "fused1.pt", "eager0.pt"))
    assert all(itertools.starmap(torch.equal, zip(fused, other, strict=True)))
    close(fused, eager)
