"""The fused convolution: both families, every layout, the values that hide mistakes, and PyTorch's other modes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies

from kernels import convolve
from kernels.conv_bn_relu import KERNEL, conv_bn_relu, reference
from kernels.convolve import family_of
from kernels.launch import place
from kernels.limits import elementwise_limit, relative_l2, relative_l2_limit
from kernels.problem import INTERPRETER, Problem, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def problem(n: int, h: int, w: int, i: int, o: int, precision: str = "fp32") -> Problem:
    return Problem(batch=n, height=h, width=w, in_channels=i, out_channels=o, precision=precision)


def arguments(shape: Problem, device: torch.device) -> tuple[Any, ...]:
    return KERNEL.inputs(shape, device, torch.Generator().manual_seed(0))


def exact(given: tuple[Any, ...]) -> Tensor:
    return reference(*(a.double().cpu() if isinstance(a, torch.Tensor) else a for a in given))


def magnitude(given: tuple[Any, ...]) -> Tensor:
    x, weight, bias, mean, var, gamma, beta = (tensor.double().cpu().abs() for tensor in given[:7])
    return reference(x, weight, bias, -mean, var, gamma, beta, given[7], False)  # noqa: FBT003


# Tiles smaller than the tensors, so that programs meet at every edge: rows, columns, output and input channels.
CUTS = [(4, 4, 16, 16), (2, 8, 16, 32), (16, 1, 32, 16)]
# 40 channels are no multiple of a block: descriptors fill with zeros, pointers gather; 32 they step through in blocks.
CASES = [
    (Settings(family=family, rows=r, columns=c, out_block=o, in_block=i, warps=4, stages=2), channels, precision)
    for family, channels in (("tma", 40), ("pointer", 40), ("pointer", 32))
    for (r, c, o, i), precision in zip(CUTS * 2, ("tf32", "fp16", "bf16", "fp16", "bf16", "fp32"), strict=True)
    if family == "pointer" or precision != "fp32"
]


@pytest.mark.parametrize(("cut", "channels", "precision"), CASES, ids=str)
def test_every_tile_edge(cut: Settings, channels: int, precision: str, device: torch.device) -> None:
    if device.type == "cuda" and cut.family == "tma":
        if place(device)[0] < 90:
            pytest.skip("needs TMA")
        cut = dataclasses.replace(cut, out_block=64)
    shape = problem(1, 6, 9, channels, 24, precision)
    given = arguments(shape, device)
    launch = KERNEL.launcher(given, shape, cut)
    launch().fill_(float("nan"))
    result, truth = launch().cpu(), exact(given)
    assert relative_l2(result, truth) <= relative_l2_limit(precision, 9 * channels)
    error = (result.double() - truth).abs()
    assert (error <= elementwise_limit(precision, 9 * channels, truth, magnitude(given))).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "NCHW": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
    "a window": lambda x: torch.nn.functional.pad(x, [3, 1, 2, 2])[:, :, 2:-2, 3:-1],
    "half the channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :],
    "every second image": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "one image for all": lambda x: x[:1].expand(x.shape),
    "a constant": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "not 16-byte aligned": lambda x: (
        torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:]
        .view(x.shape[0], *x.shape[2:], x.shape[1])
        .permute(0, 3, 1, 2)
    ),
}


@pytest.mark.parametrize("channels", [16, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_where_it_is(layout: str, channels: int, device: torch.device) -> None:
    x, *rest = arguments(problem(2, 7, 9, channels, 16, "fp16"), device)
    x = LAYOUTS[layout](x)
    before = x.clone()
    result = conv_bn_relu(x, *rest)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(result.cpu(), exact((x, *rest))) <= relative_l2_limit("fp16", 9 * channels)
    assert torch.equal(x, before)


def test_only_layouts_that_descriptors_can_read_go_to_them() -> None:
    x = arguments(problem(2, 7, 9, 16, 16, "fp16"), torch.device("cpu"))[0]
    found = {name: family_of(layout(x)) for name, layout in LAYOUTS.items()}
    descriptors = {"channels_last", "a window", "half the channels"}
    assert found == {name: "tma" if name in descriptors else "pointer" for name in LAYOUTS}


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=strategies.builds(
        problem,
        strategies.integers(0, 3),
        strategies.integers(1, 20),
        strategies.integers(1, 35),
        strategies.integers(1, 70),
        strategies.integers(1, 70),
        strategies.sampled_from(["fp32", "fp16", "bf16"]),
    ),
    channels_last=strategies.booleans(),
    relu=strategies.booleans(),
    present=strategies.tuples(*[strategies.booleans()] * 3),
)
def test_any_size(
    shape: Problem, *, channels_last: bool, relu: bool, present: tuple[bool, bool, bool], device: torch.device
) -> None:
    x, weight, bias, mean, var, gamma, beta, eps, _ = arguments(shape, device)
    x = x if channels_last else x.contiguous()
    bias, gamma, beta = (t if there else None for t, there in zip((bias, gamma, beta), present, strict=True))
    given_to = (x, weight, bias, mean, var, gamma, beta, eps, relu)
    result = conv_bn_relu(*given_to).cpu()
    assert result.shape == (shape.batch, shape.out_channels, shape.height, shape.width)
    assert relative_l2(result, exact(given_to)) <= 1.5 * relative_l2_limit(shape.precision, 9 * shape.in_channels)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("channels", [16, 5])
def test_nan_and_infinity_stay_what_and_where_they_are(channels: int, device: torch.device) -> None:
    given = arguments(problem(1, 12, 9, channels, 16), device)
    given[0][0, 0, 5, 2] = float("nan")
    given[0][0, 4, 9, 7] = float("inf")
    given[0][0, 4, 9, 8] = float("-inf")
    result = conv_bn_relu(*given).cpu()
    torch.testing.assert_close(result, exact(given).float(), equal_nan=True, rtol=1e-4, atol=1e-4)
    assert result.isnan().any()


def test_a_channel_of_tiny_variance_does_not_overflow_fp16(device: torch.device) -> None:
    given = list(arguments(problem(1, 8, 8, 16, 16, "fp16"), device))
    given[4] = torch.full_like(given[4], 0)
    given[7] = 1e-10  # scale 1e5, past fp16's 65504
    given[0] = given[0] / 1000
    given[3] = given[3] * 0
    given[2] = given[2] * 0
    result = conv_bn_relu(*given)
    assert result.isfinite().all()
    assert relative_l2(result.cpu(), exact(tuple(given))) <= relative_l2_limit("fp16", 144)


def test_the_shift_is_added_in_fp32(device: torch.device) -> None:
    # conv = -256 exactly, shift = 257, no bf16 number: 1 where it is added in fp32, 0 or 2 where it was rounded before.
    x = torch.ones(1, 16, 3, 3, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(16, 16, 3, 3, dtype=torch.bfloat16, device=device)
    weight[:, :, 1, 1] = -16
    mean, var = torch.zeros(16, device=device), torch.ones(16, device=device)
    beta = torch.full((16,), 257.0, device=device)
    result = conv_bn_relu(x, weight, None, mean, var, None, beta, 0.0, relu=True)
    assert torch.equal(result.cpu(), torch.ones(1, 16, 3, 3, dtype=torch.bfloat16))


def test_offsets_past_two_to_the_31_do_not_wrap(device: torch.device) -> None:
    # Six rows 2^29 elements apart; only the touched pages exist. The stride fits in 32 bits, five times the stride not.
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    far = 2**29
    memory = torch.empty(5 * far + 4096, dtype=torch.float16, device=device)
    x = memory.as_strided((1, 16, 6, 8), (1, 1, far, 16))
    _, *rest = arguments(problem(1, 6, 8, 16, 16, "fp16"), device)
    x.copy_(torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(2)))
    near = x.contiguous(memory_format=torch.channels_last)
    shape = KERNEL.problem((x, *rest))
    capability, _ = place(device)
    for family in ("pointer", "tma") if capability == INTERPRETER or capability >= 90 else ("pointer",):
        cut = Settings(family=family, rows=8, columns=16, out_block=64, in_block=16, warps=4, stages=2)
        result = KERNEL.launcher((x, *rest), shape, cut)()
        assert relative_l2(result.cpu(), exact((near, *rest))) <= relative_l2_limit("fp16", 144)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["tma", "pointer"])
def test_a_tensor_of_more_than_two_to_the_31_elements(family: str) -> None:
    capability, _ = place(torch.device("cuda"))
    if (family == "tma" and capability < 90) or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs TMA and 24 GiB of GPU memory")
    shape = problem(9, 2048, 2048, 64, 64, "bf16")
    x = torch.randn(1, 64, 2048, 2048, device="cuda", dtype=torch.bfloat16).expand(9, -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    _, *rest = arguments(problem(1, 8, 8, 64, 64, "bf16"), torch.device("cuda"))
    result = KERNEL.launcher((x, *rest), shape, KERNEL.settings(shape, capability, family=family))()
    assert torch.equal(result[8], result[0])
    corner = exact((x[8:, :, -9:, -9:], *rest))
    assert relative_l2(result[8:, :, -8:, -8:].cpu(), corner[:, :, 1:, 1:]) <= relative_l2_limit("bf16", 576)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_alone(amp: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and amp is torch.float16 and not torch.amp.is_autocast_available("cpu"):
        pytest.skip("no fp16 autocast on this CPU")
    given = arguments(problem(1, 8, 8, 16, 16), device)
    with torch.autocast(device.type, dtype=amp):
        result = conv_bn_relu(*given)
        again = conv_bn_relu(*given)
    x, weight, *rest = given
    assert result.dtype == amp
    assert torch.equal(result, again)
    truth = exact((x.to(amp), weight.to(amp), *rest))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[amp]
    assert relative_l2(result.cpu(), truth) <= relative_l2_limit(precision, 144)


def test_autocast_does_not_pack_again(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import packing

    calls = []
    original = packing.Sources.pack
    monkeypatch.setattr(packing.Sources, "pack", lambda *a: calls.append(a[1]) or original(*a))
    given = arguments(problem(1, 8, 8, 16, 16), device)
    for _ in range(3):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            conv_bn_relu(*given)
    assert calls == [torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_are_eager_s(dtype: torch.dtype, device: torch.device) -> None:
    given = arguments(problem(2, 5, 7, 8, 6), device)
    tensors = [t.to(dtype) for t in given[:7]]
    gradients = []
    for function in (conv_bn_relu, reference):
        leaves = [t.detach().clone().requires_grad_(i not in {3, 4}) for i, t in enumerate(tensors)]
        if function is reference:
            leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
        y = function(*leaves, 1e-5, True)  # noqa: FBT003
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(device, y.dtype)
        y.backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for mine, truth in zip(*gradients, strict=True):
        assert (mine is None) == (truth is None)
        if mine is not None:
            assert mine.dtype == dtype
            assert relative_l2(mine, truth) <= tolerance


def test_a_cpu_tensor_without_the_interpreter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = arguments(problem(1, 4, 4, 4, 4), torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"unsupported.*CUDA device.*TRITON_INTERPRET=1"):
        conv_bn_relu(*given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0].double(), *a[1:]), "fp16, bf16 or fp32"),
        (lambda a: (a[0][0], *a[1:]), r"\(N, I, H, W\)"),
        (lambda a: (a[0], a[1][:, :2], *a[2:]), r"weight \(O, 4, 3, 3\)"),
        (lambda a: (a[0], a[1][..., :1], *a[2:]), r"weight \(O, 4, 3, 3\)"),
        (lambda a: (a[0][:, :, :0], *a[1:]), "at least one pixel"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(
    change: Callable[..., tuple[Any, ...]], message: str, device: torch.device
) -> None:
    given = change(arguments(problem(1, 4, 4, 4, 4), device))
    for target in (given, tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in given)):
        with pytest.raises(RuntimeError, match=message):
            conv_bn_relu(*target)


def test_one_launch_and_no_copy_for_each_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    original = convolve.launch
    monkeypatch.setattr(
        convolve, "launch", lambda kernel, *a, **k: launches.append(kernel) or original(kernel, *a, **k)
    )
    for layout, channels in itertools.product((LAYOUTS["channels_last"], LAYOUTS["NCHW"]), (3, 16)):
        x, *rest = arguments(problem(1, 8, 8, channels, 16, "fp16"), device)
        conv_bn_relu(layout(x), *rest)
    assert len(launches) == 4
