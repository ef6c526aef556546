"""Two sources of any two sizes: padded, cropped, interpolated, each as PyTorch would before a concatenation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies

from kernels.conv_bn_relu import KERNEL, conv_bn_relu, reference
from kernels.limits import relative_l2, relative_l2_limit
from kernels.problem import Problem
from kernels.two_sources import PLACEMENTS

if TYPE_CHECKING:
    from collections.abc import Callable

sizes = strategies.integers(1, 19)


@pytest.mark.slow
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    size=strategies.tuples(sizes, sizes),
    low=strategies.tuples(sizes, sizes),
    channels=strategies.tuples(*[strategies.sampled_from([3, 8, 16, 24])] * 2),
    placement=strategies.sampled_from(PLACEMENTS[1:]),
    upsample=strategies.booleans(),
    half=strategies.booleans(),
    dense=strategies.booleans(),
)
def test_any_two_sizes(
    size: tuple[int, int],
    low: tuple[int, int],
    channels: tuple[int, int],
    placement: str,
    *,
    upsample: bool,
    half: bool,
    dense: bool,
    device: torch.device,
) -> None:
    dtype, precision = (torch.float16, "fp16") if half else (torch.float32, "fp32")
    total = sum(channels)
    problem = Problem(batch=1, height=size[0], width=size[1], in_channels=total, out_channels=16, precision=precision)
    x, *layers = KERNEL.inputs(problem, device, torch.Generator().manual_seed(0))
    x = x[:, : channels[0]]  # a view: every channel of it lies between others
    second = torch.randn(1, channels[1], *low, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    if dense:
        x, second = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, second))
    arguments = (x, *layers, second, placement, upsample)
    result = conv_bn_relu(*arguments)
    exact = reference(*(a.double().cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
    assert relative_l2(result.cpu(), exact) <= 1.5 * relative_l2_limit(precision, 9 * total)


def test_nan_beyond_the_first_picture_is_not_read(device: torch.device) -> None:
    # What is cropped of the second source lies where the convolution pads with zeros.
    problem = Problem(batch=1, height=6, width=5, in_channels=16, out_channels=16, precision="fp16", second_channels=8)
    x, *layers, second, _, _ = KERNEL.inputs(problem, device, torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(second, [0, 2, 0, 3], value=float("nan"))
    wide = wide.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv_bn_relu(x, *layers, wide, "end"), conv_bn_relu(x, *layers, second, "exact"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s[:, :, 1:], "exact"), r"without padding both sources have one size; given \(6, 5\) and \(5, 5\)"),
        (lambda s: (s.double(), "end"), "both sources have one dtype and device"),
        (lambda s: (s[0], "end"), r"the second source is \(N, C, h, w\)"),
        (lambda s: (s[:, :3], "end"), r"takes a weight \(O, 11, 3, 3\)"),
        (lambda s: (s, "left"), "placement is one of"),
    ],
)
def test_sources_that_do_not_belong_together_are_refused_by_name(
    change: Callable[..., tuple[torch.Tensor, str]], message: str, device: torch.device
) -> None:
    problem = Problem(batch=1, height=6, width=5, in_channels=16, out_channels=16, precision="fp16", second_channels=8)
    x, *layers, second, _, _ = KERNEL.inputs(problem, device, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=message):
        conv_bn_relu(x, *layers, *change(second))


@pytest.mark.parametrize("half", [False, True])
def test_offsets_of_the_second_source_past_two_to_the_31_do_not_wrap(*, half: bool, device: torch.device) -> None:
    # Rows 2^29 elements apart; only the touched pages exist.
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    dtype, precision = (torch.float16, "fp16") if half else (torch.float32, "fp32")
    far = 2**29
    for upsample in (False, True):
        shape = {"batch": 1, "height": 6, "width": 6, "in_channels": 16, "out_channels": 16, "second_channels": 8}
        problem = Problem(**shape, upsample=upsample, precision=precision)
        x, *layers, near, placement, _ = KERNEL.inputs(problem, device, torch.Generator().manual_seed(0))
        rows = near.shape[2]
        memory = torch.empty((rows - 1) * far + 4096, dtype=dtype, device=device)
        second = memory.as_strided(near.shape, (1, 1, far, 8))
        second.copy_(near)
        result = conv_bn_relu(x, *layers, second, placement, upsample)
        exact = reference(
            *(a.double().cpu() if isinstance(a, torch.Tensor) else a for a in (x, *layers, near, placement, upsample))
        )
        assert relative_l2(result.cpu(), exact) <= relative_l2_limit(precision, 144)
